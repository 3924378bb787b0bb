"""Share of right facts in descriptions, as an `evaluate` module: `evaluate.load("hf_efficient/metrics/facts")`."""

import re
from typing import Any

import datasets
import evaluate


# the scenes of `examples/dynamic_llava_scenes.py`: one object a field of a chessboard
PLACE = r"\b[a-d][1-4]\b"
THING = (
    r"(?P<size>small|large) (?P<colour>red|green|blue|yellow|purple|orange) "
    r"(?P<shape>circle|square|triangle|cross|ring)"
)
COUNTED = ("place", "colour", "shape")


class Facts(evaluate.Metric):
    """Share of the facts of true descriptions that other descriptions state too.

    A sentence that names a place and a thing states facts: that the place holds something, and one fact for each named
    group of the pattern of a thing. The first sentence about a place counts; a sentence about a place that is empty or
    was described before is `invented`.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of the facts of a true description that a description states, from 0 to 1.",
            citation="Defined in hf_efficient, for the drawn scenes of examples/dynamic_llava_scenes.py",
            inputs_description=(
                "predictions, references: descriptions, sentences ending in ' .'. compute(place=, thing=): regular "
                "expressions; thing has a named group for each fact. compute(counted=): the facts averaged in `facts`."
            ),
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        place: str = PLACE,
        thing: str = THING,
        counted: tuple[str, ...] = COUNTED,
    ) -> dict[str, Any]:
        """Count the facts.

        Args:
            predictions (`list[str]`): Descriptions to judge.
            references (`list[str]`): True descriptions.
            place (`str`): Pattern of a place.
            thing (`str`): Pattern of what is there, with a named group for each fact.
            counted (`tuple[str, ...]`): Facts averaged in `facts`, from "place" and the named groups.

        Returns:
            `dict`: Shares of all facts of the references: `facts`, `place` and one for each named group; `invented`,
            sentences a description that are about nothing; `per_description`, the counts behind them.

        Raises:
            ValueError: If a fact of `counted` is no group of `thing`, or the references state none.
        """
        names = ["place", *re.compile(thing).groupindex]
        unknown = [name for name in counted if name not in names]
        if unknown or not counted:
            raise ValueError(f"`counted` must name some of {', '.join(names)}, got {list(counted)}.")
        rows = [_grade(said, true, place, thing, names) for said, true in zip(predictions, references)]
        objects = sum(row["objects"] for row in rows)
        if not objects:
            raise ValueError("`references` must state at least one fact, got none: check `place` and `thing`.")
        shares = {name: sum(row[name] for row in rows) / objects for name in names}
        return {
            "facts": sum(shares[name] for name in counted) / len(counted),
            **shares,
            "invented": sum(row["invented"] for row in rows) / len(rows),
            "per_description": rows,
        }


def _read(text: str, place: str, thing: str) -> list[tuple[str, dict[str, str]]]:
    """Place and facts of every sentence that has both."""
    found = []
    for sentence in text.split(" ."):
        where, what = re.search(place, sentence), re.search(thing, sentence)
        if where and what:
            found.append((where[0], what.groupdict()))
    return found


def _grade(said: str, true: str, place: str, thing: str, names: list[str]) -> dict[str, int]:
    """Count the facts of one description."""
    truth, claims, invented = dict(_read(true, place, thing)), {}, 0
    for where, what in _read(said, place, thing):
        invented += where in claims or where not in truth
        claims.setdefault(where, what)
    counts = {"objects": len(truth), "place": sum(where in claims for where in truth), "invented": invented}
    for name in names[1:]:
        counts[name] = sum(claims[where][name] == what[name] for where, what in truth.items() if where in claims)
    return counts
