"""The schedule of a ToE training: when it grows, how far, and by which distance."""

from bisect import bisect_right
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Integral, Real
from typing import Any


DISTANCES = ("cosine", "euclidean", "manhattan")

# recipes of the authors (DeiT, LV-ViT, EfficientTrain) and one that keeps fewer tokens and takes less time
_PRESETS: dict[str, dict[str, Any]] = {
    "deit": {"keep_rates": (0.5, 0.75, 1.0), "initial_keep_rate": 0.25},
    "lv-vit": {"keep_rates": (0.4, 0.7, 1.0), "initial_keep_rate": 0.2},
    "efficient-train": {"keep_rates": (0.6, 0.8, 1.0), "initial_keep_rate": 0.3},
    "fast": {"keep_rates": (0.3, 0.6, 1.0), "initial_keep_rate": 0.2},
}


@dataclass(frozen=True)
class ToEConfig:
    """Hyper-parameters of Token Expansion (arXiv 2404.00672, Sec. 3; defaults are the recipe for DeiT).

    Args:
        stage_starts (`tuple`, defaults to thirds of the training): Where each stage begins, rising. All integers:
            epochs, counted from 0; all floats: shares of the whole training, in `[0, 1)`. A zero fits both. Before the
            first start the model sees all tokens.
        keep_rates (`tuple` of `float`): Share r_s of the patch tokens that stage s hands on, rising, in `(0, 1]`;
            `int(tokens * r_s)` are kept. A rate of 1 is plain training.
        initial_keep_rate (`float`): Share r_0 of evenly spread tokens that every expansion starts from, in
            `(0, keep_rates[0]]`.
        expansion_steps (`int`): Sub-steps k in which a stage adds its tokens, at least 1.
        distance (`str`): `"cosine"`, `"euclidean"` or `"manhattan"`, all on L2-normalised tokens.
        after_layer (`int`): Number of encoder layers that see all tokens, at least 1.

    Raises:
        ValueError: If a value breaks its rule; the message names it.
    """

    stage_starts: tuple[int | float, ...] = (0.0, 1 / 3, 2 / 3)
    keep_rates: tuple[float, ...] = (0.5, 0.75, 1.0)
    initial_keep_rate: float = 0.25
    expansion_steps: int = 2
    distance: str = "cosine"
    after_layer: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage_starts", _as_tuple("stage_starts", self.stage_starts))
        object.__setattr__(self, "keep_rates", _as_tuple("keep_rates", self.keep_rates))
        self._check_starts()
        self._check_rates()
        for name in ("expansion_steps", "after_layer"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if self.distance not in DISTANCES:
            raise ValueError(f"`distance` must be one of {', '.join(map(repr, DISTANCES))}, got {self.distance!r}.")

    def _check_starts(self) -> None:
        starts = self.stage_starts
        integers = all(isinstance(start, int) for start in starts if start != 0)
        floats = all(isinstance(start, float) for start in starts if start != 0)
        if not (integers or floats):
            raise ValueError(
                f"`stage_starts` must be all integers (epochs) or all floats (shares of the training), got {starts}; "
                "write 0.5 for half of the training or 5 for the fifth epoch, not both."
            )
        if not (all(start >= 0 for start in starts) and all(a < b for a, b in pairwise(starts))):
            raise ValueError(f"`stage_starts` must rise strictly from 0 or later, got {starts}.")
        if not self.counts_epochs and starts[-1] >= 1.0:
            raise ValueError(
                f"`stage_starts` as shares must lie in [0, 1), got {starts[-1]} in {starts}, which is outside the "
                "training; use integers to count epochs."
            )

    def _check_rates(self) -> None:
        rates = self.keep_rates
        if len(rates) != len(self.stage_starts):
            raise ValueError(
                f"`keep_rates` needs one rate for each of the {len(self.stage_starts)} `stage_starts`, got {rates}."
            )
        if not (all(0 < rate <= 1 for rate in rates) and all(a < b for a, b in pairwise(rates))):
            raise ValueError(f"`keep_rates` must rise strictly within (0, 1], got {rates}.")
        first = self.initial_keep_rate
        if isinstance(first, bool) or not isinstance(first, (int, float)) or not first > 0:
            raise ValueError(
                f"`initial_keep_rate` must be a number above 0 so that at least one token is kept, got {first!r}."
            )
        if first > rates[0]:
            raise ValueError(
                f"`initial_keep_rate` must not be above the first keep rate, got {first} > {rates[0]}; lower it or "
                "raise `keep_rates[0]`."
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "ToEConfig":
        """Build a named recipe: `"deit"`, `"lv-vit"`, `"efficient-train"` or `"fast"`.

        Args:
            name (`str`): The recipe.
            **overrides: Fields that replace those of the recipe.

        Returns:
            `ToEConfig`

        Raises:
            ValueError: If the name is unknown.
        """
        if name not in _PRESETS:
            raise ValueError(f"`name` must be one of {', '.join(map(repr, _PRESETS))}, got {name!r}.")
        return cls(**(_PRESETS[name] | overrides))

    @property
    def counts_epochs(self) -> bool:
        """`bool`: Whether `stage_starts` are epochs; else they are shares of the training."""
        return any(isinstance(start, int) and start != 0 for start in self.stage_starts)

    @property
    def num_stages(self) -> int:
        """`int`: Number of stages S."""
        return len(self.stage_starts)

    def stage_at(self, progress: float) -> int:
        """Stage that training is in; 0 before the first start.

        Args:
            progress (`float`): Epochs or share of the training done, in the unit of `stage_starts`.

        Returns:
            `int`: Number of stages whose start is at or before `progress`.
        """
        return bisect_right(self.stage_starts, progress)

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, ready for JSON.

        Returns:
            `dict`
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def check_config(config: Any) -> None:
    """Refuse what is no schedule where one is wanted: the name of a recipe, a dict of fields, the class itself.

    Args:
        config (`Any`): What was passed as `config`.

    Raises:
        ValueError: If it is neither a `ToEConfig` nor `None`.
    """
    if config is None or isinstance(config, ToEConfig):
        return
    if isinstance(config, str) and config in _PRESETS:
        remedy = f"write `ToEConfig.preset({config!r})`"
    else:
        remedy = "make one by `ToEConfig(...)` or `ToEConfig.preset(name)`"
    raise ValueError(f"`config` must be a `ToEConfig`, got {config!r}; {remedy}.")


def _as_tuple(name: str, values: Any) -> tuple:
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise ValueError(f"`{name}` must be a list or tuple of numbers, got {values!r}.")
    values = tuple(values)
    if not values or any(isinstance(value, bool) or not isinstance(value, Real) for value in values):
        raise ValueError(f"`{name}` must hold at least one number and nothing else, got {values}.")
    return tuple(int(value) if isinstance(value, Integral) else float(value) for value in values)  # numpy's as well
