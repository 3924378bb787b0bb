"""`hf-efficient quickstart`: the main job of every method on real, embedded data, in one table.

A method adds its part as `quickstart_<method>.py` in its folder and one entry in `_PARTS`. The module has one public
function, `run(checkpoints, output)`, which takes the folder of checkpoints and the folder for pictures and returns

    {
        "table": {"title": str, "columns": [str], "rows": [[str or number]]},   # what it did, item by item
        "summary": [[measure, without the method, with the method]],            # its rows of the last table
        "pictures": [{"file": str, "caption": str}],                            # written to `output`
        "notes": [str],                                                         # what a reader must know
        "details": {...},                                                       # more for --json, optional
    }

`output` is a temporary folder, whose pictures move on when the part has ended: a picture is there whole or not at all.
A part shows progress with `transformers.utils.logging.tqdm` and uses no network. The checkpoints and packages that it
needs stand in `_PARTS`: they are looked for before the first part starts.
"""

import argparse
import os
import sys
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .results import format_table, run_meta


class _Part(NamedTuple):
    """What one method shows, and what it needs."""

    module: str  # below this package
    checkpoints: tuple[str, ...] = ()  # folders of model_cards/
    packages: tuple[str, ...] = ()  # by import name


_PARTS: dict[str, _Part] = {
    "Dynamic-LLaVA": _Part(
        "dynamic_llava.quickstart_dynamic_llava",
        ("dynamic-llava-easy-vqa", "dynamic-llava-scenes"),
        ("easy_vqa", "matplotlib"),
    ),
    "ToE": _Part("toe.quickstart_toe", packages=("sklearn", "matplotlib")),
    "KDFS": _Part("kdfs.quickstart_kdfs", packages=("sklearn", "matplotlib")),
    "Pix2Pix": _Part("pix2pix.quickstart_pix2pix", ("pix2pix-cartoon2photo",), ("skimage", "cv2")),
}
_FILES = ("config.json", "model.safetensors")  # what a folder must hold to be a checkpoint


class Quickstart:
    """Run every method once on real data that comes with the clone and the wheels; no network is used.

    Says when a method is done, prints one table and writes pictures. The checkpoints are read from model_cards/ of a
    clone of the repository, the data from the wheels of the extra: pip install -e ".[quickstart]". What is missing is
    said before anything runs.

    Examples:
      hf-efficient quickstart
      hf-efficient quickstart --output ./pictures --json quickstart.json --quiet
    """

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of `quickstart` to `parser`."""
        parser.add_argument(
            "--output",
            metavar="DIR",
            default="hf_efficient_quickstart",
            help="folder for the pictures (default: ./hf_efficient_quickstart)",
        )

    @staticmethod
    def run(arguments: argparse.Namespace) -> dict[str, Any]:
        """Run all parts and put their results together."""
        os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes; this one never asks the Hub
        checkpoints = find_checkpoints()
        output = Path(arguments.output)
        if output.is_file():
            raise ValueError(f"--output {output} is a file; name a folder.")
        _check_needs(checkpoints)
        output.mkdir(parents=True, exist_ok=True)
        report: dict[str, Any] = {"meta": run_meta("hf-efficient quickstart"), "parts": {}}
        start = time.perf_counter()
        for number, (title, part) in enumerate(_PARTS.items(), 1):
            begin = time.perf_counter()
            with tempfile.TemporaryDirectory(prefix=".", dir=output) as unfinished:
                found = import_module(f".{part.module}", __package__).run(checkpoints, Path(unfinished))
                for picture in found["pictures"]:
                    os.replace(Path(unfinished) / picture["file"], output / picture["file"])
            found["seconds"] = round(time.perf_counter() - begin, 1)
            report["parts"][title] = found
            if not arguments.quiet:  # standard output is the result's
                sys.stderr.write(f"{title}: done in {found['seconds']} s ({number} of {len(_PARTS)})\n")
        report["seconds"] = round(time.perf_counter() - start, 1)
        report["text"] = _render(report, output)
        return report


def find_checkpoints() -> Path:
    """Find the folder of checkpoints beside the package.

    Returns:
        `Path`: `model_cards/` of the clone that the package runs from.

    Raises:
        FileNotFoundError: If the package does not run from a clone.
    """
    folder = Path(__file__).resolve().parent.parent / "model_cards"
    if not folder.is_dir():
        raise FileNotFoundError(
            "quickstart needs the checkpoints in model_cards/ beside the package, which a wheel does not carry: clone "
            'the repository and install it with pip install -e ".[quickstart]".'
        )
    return folder


def _check_needs(checkpoints: Path) -> None:
    """Look for everything that the parts need, so that nothing ends in the middle of the work."""
    for title, part in _PARTS.items():
        files = (checkpoints / name / file for name in part.checkpoints for file in _FILES)
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise FileNotFoundError(
                f"{title} needs the checkpoint {missing.parent}, but there is no {missing.name}: check out "
                f"model_cards/{missing.parent.name} of the repository again."
            )
        absent = [name for name in part.packages if find_spec(name) is None]
        if absent:
            raise ImportError(
                f'{title} needs {" and ".join(absent)}, not installed here: run pip install -e ".[quickstart]".'
            )


def _render(report: dict[str, Any], output: Path) -> str:
    lines = []
    summary = []
    for title, part in report["parts"].items():
        lines += [
            f"{title}: {part['table']['title']}",
            "",
            format_table(part["table"]["columns"], part["table"]["rows"]),
        ]
        lines += ["", *part["notes"], ""]
        summary += [
            [title, measure, without, with_, _ratio(without, with_)] for measure, without, with_ in part["summary"]
        ]
    lines += [format_table(["method", "measure", "without", "with", "with / without"], summary), ""]
    for part in report["parts"].values():
        lines += [f"{output / picture['file']}: {picture['caption']}" for picture in part["pictures"]]
    meta = report["meta"]
    lines.append(f"{report['seconds']} s on {meta['cpu']}, {meta['threads']} thread(s), {meta['date']}.")
    return "\n".join(lines)


def _ratio(without: Any, with_: Any) -> str:
    numbers = isinstance(without, int | float) and isinstance(with_, int | float)
    return f"{with_ / without:.2f}" if numbers and without else ""
