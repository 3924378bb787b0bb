"""The runs of `toe_train_vit.py`: which are done, which are missing, and the processes they run in.

A part of that script, kept in a file of its own for its length. A long comparison takes several starts, on machines
that may be gone in between, so there are two folders. `--output` holds what is under way: a Trainer checkpoint after
every epoch. `--results` holds what is worth keeping, some megabytes in all: `run-ARM-SEED.json` of every finished run
and the weights in fp16 of the run that becomes the card. A run whose file lies there is not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_efficient import ToEConfig
from hf_efficient.toe import speedup_bound
from hf_efficient.toe.cost_toe import count_patches


ARMS = ("full", "toe", "random", "short")
# everything that decides what comes out of a run; runs of a comparison have it in common
RECIPE = (
    *("model", "epochs", "batch_size", "learning_rate", "weight_decay", "warmup", "label_smoothing", "shift", "flip"),
    *("width", "depth", "image_size", "patch_size", "validation_rows", "gpu", "bf16"),
)
# one allocation after the other of the same few sizes: keep the memory instead of handing it back to the system
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_ARENA_MAX": "1"}


# smallest value of the options that count something; ToE needs a layer before and one behind the expansion
LEAST = {"epochs": 1, "batch_size": 1, "width": 32, "depth": 2, "image_size": 1, "patch_size": 1}
LEAST |= {"processes": 1, "logging_steps": 1, "time": 1}


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Stop at options that no run could be made of, before the first one is started."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}.")
    if args.patch_size > args.image_size:
        parser.error(f"--patch-size must not be above --image-size, got {args.patch_size} > {args.image_size}.")
    for option, preset in (("--preset", args.preset), ("--fast-preset", args.fast_preset)):
        try:
            ToEConfig.preset(preset)
        except ValueError as error:
            parser.error(f"{option}: {error}")
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no GPU here; leave it out.")
    return args


def list_jobs(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Arm and seed of every run; the arms of a seed follow each other, so that they share a start."""
    jobs = [(arm, seed) for seed in args.seeds for arm in (ARMS if args.compare or args.arms else ("toe",))]
    jobs += [("fast", args.seeds[0])] if args.compare or args.arms else []
    return [job for job in jobs if args.arms is None or job[0] in args.arms]


def preset_of(args: argparse.Namespace, arm: str) -> str | None:
    return {"full": None, "fast": args.fast_preset}.get(arm, args.preset)


def epochs_of(args: argparse.Namespace, arm: str, model: PreTrainedModel) -> float:
    """Epochs of a run; `short` has those that the multiply-adds of ToE pay for on all tokens."""
    if arm != "short":
        return args.epochs
    patches = count_patches(model, torch.zeros(1, 3, args.image_size, args.image_size))
    return args.epochs / speedup_bound(model, patches, ToEConfig.preset(args.preset))[0]


def make_recipe(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    values = {name: getattr(args, name) for name in RECIPE}
    return {"dataset": Path(args.dataset).name, **values, "preset": preset_of(args, arm)}


def check_recipe(recipe: dict[str, Any], file: Path) -> None:
    """Stop where `file` belongs to another recipe: a mixture would be no comparison."""
    found = json.loads(file.read_text(encoding="utf-8"))
    found = found.get("recipe", found)
    for name, value in recipe.items():
        if found.get(name) != value:
            raise SystemExit(
                f"{file} is of a run with {name} {found.get(name)!r}, not {value!r}; give the same options as then, "
                "or other folders for --output and --results."
            )


def run_file(args: argparse.Namespace, arm: str, seed: int) -> Path:
    return args.results / f"run-{arm}-{seed}.json"


def read_run(args: argparse.Namespace, arm: str, seed: int) -> dict[str, Any] | None:
    """A finished run, or `None`."""
    file = run_file(args, arm, seed)
    if not file.exists():
        return None
    check_recipe(make_recipe(args, arm), file)
    return json.loads(file.read_text(encoding="utf-8"))


def last_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run and the Trainer's state in it."""
    # the state is written last: a checkpoint without it, or with half of it, was cut short
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            return path, json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
    return None


def show_status(args: argparse.Namespace, jobs: list[tuple[str, int]]) -> None:
    """Print what is done, half done and missing, with the core-hours measured so far and expected still."""
    runs = {job: read_run(args, *job) for job in jobs}
    timing = args.results / "timing.json"
    expected = json.loads(timing.read_text(encoding="utf-8"))["core_hours"] if timing.exists() else {}
    for arm in {arm for arm, _ in jobs}:
        done = [run["cpu_seconds"] / 3600 for job, run in runs.items() if run and job[0] == arm]
        expected = {**expected, arm: statistics.mean(done)} if done else expected
    spent_in_all, left_in_all, unknown = 0.0, 0.0, False
    print("run | state | epochs | core-hours spent | core-hours left")
    for (arm, seed), run in runs.items():
        half = None if run else last_checkpoint(args.output / f"{arm}-{seed}")
        state, epochs, spent, left = "missing", 0, 0.0, expected.get(arm)
        if run:
            state, epochs, spent, left = "done", run["recipe"]["epochs"], run["cpu_seconds"] / 3600, 0.0
            state += "" if "test_accuracy" in run or not args.final else ", not tested"
        elif half:
            clock = next((e for e in reversed(half[1]["log_history"]) if "cpu_seconds" in e), {"cpu_seconds": 0.0})
            state, epochs, spent = "under way", round(half[1]["epoch"] or 0), clock["cpu_seconds"] / 3600
            left = None if left is None else max(left - spent, 0.0)
        unknown = unknown or left is None
        spent_in_all, left_in_all = spent_in_all + spent, left_in_all + (left or 0.0)
        shown = "?" if left is None else f"{left:.2f}"
        print(f"{arm}-{seed} | {state} | {epochs} of {args.epochs} | {spent:.2f} | {shown}")
    print(f"in all | | | {spent_in_all:.2f} | {left_in_all:.2f}{' and more; --time measures it' if unknown else ''}")


def train_all(args: argparse.Namespace, jobs: list[tuple[str, int]]) -> None:
    """Start a process for each run that is not done, at most `--processes` at a time; they end with this one."""
    waiting, running = [job for job in jobs if read_run(args, *job) is None], []
    try:
        while waiting or running:
            while waiting and len(running) < args.processes:
                arm, seed = waiting.pop(0)
                command = [sys.executable, *sys.argv, "--run", arm, str(seed)]
                environment = os.environ | MEMORY | {"OMP_NUM_THREADS": "1"}
                running.append((f"{arm}-{seed}", subprocess.Popen(command, env=environment)))
            name, process = running.pop(0)
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                running.append((name, process))
            else:
                print(f"{name}: {'done' if process.returncode == 0 else 'failed, start again to go on'}", flush=True)
    finally:
        for _, process in running:
            process.terminate()
