"""Which runs of `kdfs_prune_cifar.py` are done, half done or missing; finished ones lie in a folder to keep."""

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import TrainerCallback

from hf_efficient.kdfs.resuming_kdfs import last_whole_checkpoint
from hf_efficient.results import write_whole


WEIGHTS = ("config.json", "model.safetensors", "kdfs_config.json")
START = "start.json"
TRAINING = ("epochs", "batch_size", "learning_rate", "weight_decay", "bf16")
DISTILLATION = ("kd_weight", "kd_temperature")
MASKS = (
    "fine_tune_share",
    "mask_learning_rate",
    "keep_margin",
    "importance_spread",
    "importance_images",
    "reconstruction_weight",
    "flops_weight",
    "exclude_layers",
)
RECIPE = TRAINING + DISTILLATION + MASKS


class Results:
    """Finished runs: `ARM-SEED.json`, a few kB each, and the weights that other runs or the card need (0.6 MB).

    Everything that goes on on another machine needs lies here; the folder can be committed.

    Args:
        folder (`Path`): Made when the first run is done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, arm: str, seed: int) -> dict[str, Any] | None:
        """A finished run, or `None`."""
        file = self.folder / f"{arm}-{seed}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def all(self) -> list[dict[str, Any]]:
        """All finished runs."""
        return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(self.folder.glob("*-[0-9]*.json"))]

    def weights(self, arm: str, seed: int) -> Path:
        """Folder of a run's network."""
        return self.folder / f"{arm}-{seed}"

    def save(self, result: dict[str, Any], network: Path | None = None) -> None:
        """Keep a finished run; the file comes last and means that it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{result['arm']}-{result['seed']}"
        if network is not None:
            unfinished = self.folder / f".{name}-{uuid.uuid4().hex}"
            unfinished.mkdir()
            for file in WEIGHTS:
                shutil.copyfile(network / file, unfinished / file)
            shutil.rmtree(self.folder / name, ignore_errors=True)
            os.replace(unfinished, self.folder / name)
        write_whole(self.folder / f"{name}.json", json.dumps(result, indent=1) + "\n")


def epochs_of(options: Any, depth: int) -> float:
    """Epochs in all of a run."""
    return options.epochs or (20.0 if depth == 20 else 10.0)


def options_of(arm: Any) -> tuple[str, ...]:
    """Names of the options that an arm uses."""
    names = TRAINING
    if arm.distil or arm.kind == "scratch":  # which takes the shape that KDFS has found
        names += DISTILLATION
    if arm.kind == "random":
        names += ("exclude_layers",)
    return names + MASKS if arm.kind in ("kdfs", "scratch") else names


def read_start(weights: Path | None) -> dict[str, Any] | None:
    """What `kdfs_prune_cifar_start.py` notes beside a network that has not seen the held-out rows, or `None`."""
    note = None if weights is None else weights / START
    return json.loads(note.read_text(encoding="utf-8")) if note and note.is_file() else None


def recipe(options: Any, arm: Any) -> dict[str, Any]:
    """What must be equal for two runs of an arm to be compared."""
    start = read_start(options.weights)
    return {name: getattr(options, name) for name in options_of(arm)} | {
        "epochs": epochs_of(options, arm.depth),
        "start": start and start["accuracy"],  # None: the network that was given
    }


def check_recipe(result: dict[str, Any], expected: dict[str, Any], folder: Path) -> None:
    """A run that is kept must have been made with the options of this start."""
    for name, value in expected.items():
        if result["recipe"].get(name) != value:
            raise SystemExit(
                f"{folder} holds {result['arm']} seed {result['seed']} with {name} {result['recipe'].get(name)} "
                f"instead of {value}; give the same options, or another --results and --output."
            )


def begin_run(folder: Path, arm: str, seed: int, options: dict[str, Any]) -> None:
    """Note the recipe of a run beside its checkpoints; what is half done goes on with the same one only."""
    note = folder / "recipe.json"
    if note.is_file():
        half_done = {"arm": arm, "seed": seed, "recipe": json.loads(note.read_text(encoding="utf-8"))}
        check_recipe(half_done, options, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(note, json.dumps(options) + "\n")


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Whether this process may do the run: one at a time; the claim ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "claim", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


class CpuClock(TrainerCallback):
    """Core seconds of a run over all its starts, written whenever a checkpoint is.

    Args:
        file (`Path`): Where they are kept.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.before = read_seconds(file)
        self.start = time.process_time()

    def seconds(self) -> float:
        """Core seconds so far."""
        return self.before + time.process_time() - self.start

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the time beside the checkpoint."""
        write_whole(self.file, json.dumps({"seconds": self.seconds()}) + "\n")


def read_seconds(file: Path) -> float:
    """What a `CpuClock` wrote."""
    return json.loads(file.read_text(encoding="utf-8"))["seconds"] if file.is_file() else 0.0


def _steps(folder: Path) -> tuple[int, int]:
    """Steps done and steps in all, of the newest checkpoint below a Trainer's folder."""
    found = last_whole_checkpoint(folder)
    if found is None:
        return 0, 0
    state = json.loads((Path(found) / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"], state["max_steps"]


def progress(folder: Path) -> float:
    """Share of a run's steps that its checkpoints hold, 0 to 1."""
    training = folder / "training"
    if (folder / "trained.json").is_file():
        return 1.0
    if not (training / "kdfs_run.json").is_file():
        done, total = _steps(training)
        return done / total if total else 0.0
    sampling, tuning = json.loads((training / "kdfs_run.json").read_text(encoding="utf-8"))["steps"]
    done = sampling if (training / "sampled.safetensors").is_file() else _steps(training / "sampling")[0]
    return (done + _steps(training / "fine_tuning")[0]) / (sampling + tuning)


def show_status(runs: list[tuple[str, int]], arms: dict[str, Any], results: Results, output: Path) -> dict[str, float]:
    """Print every run with its state and core-hours; hours of missing ones are those of the most similar done one.

    Args:
        runs (`list[tuple[str, int]]`): Arm and seed.
        arms (`dict[str, Arm]`): What they are.
        results (`Results`): Finished runs.
        output (`Path`): Checkpoints of runs that are half done.

    Returns:
        `dict`: Numbers of done and missing runs and core-hours.
    """
    finished = {(run["arm"], run["seed"]): run for run in results.all()}
    estimates = output.parent / "estimate.json"
    measured = json.loads(estimates.read_text(encoding="utf-8")) if estimates.is_file() else {}

    def hours(name: str) -> float | None:
        own = [run["core_hours"] for (arm, _), run in finished.items() if arm == name]
        kind = (arms[name].kind, arms[name].depth)
        like = [run["core_hours"] for (arm, _), run in finished.items() if (arms[arm].kind, arms[arm].depth) == kind]
        for found in (own, [measured[name]] if name in measured else [], like):
            if found:
                return sum(found) / len(found)
        return None

    spent = left = 0.0
    unknown = 0
    print(f"{'run':34} {'state':12} {'accuracy':>8} {'core-hours':>10}")
    for name, seed in runs:
        title, run = f"{name} seed {seed}", finished.get((name, seed))
        if run is not None:
            spent += run["core_hours"]
            print(f"{title:34} {'done':12} {run['accuracy']:8.4f} {run['core_hours']:10.2f}")
            continue
        folder = output / f"{name}-{seed}"
        share, guess = progress(folder), hours(name)
        used = read_seconds(folder / "cpu_seconds.json") / 3600
        state = f"{share:.0%} done" if share else "missing"
        rest = None if guess is None else guess * (1 - share)
        unknown += rest is None
        spent, left = spent + used, left + (rest or 0.0)
        words = "unknown" if rest is None else f"about {rest:.2f} left"
        print(f"{title:34} {state:12} {'':8} {used:10.2f}, {words}")
    done = sum(run in finished for run in runs)
    print(f"{done} of {len(runs)} runs done, {spent:.2f} core-hours; {left:.2f} left" + " and more" * bool(unknown))
    return {"done": done, "missing": len(runs) - done, "core_hours": spent, "core_hours_left": left}
