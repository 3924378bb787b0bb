"""What the runs of `kdfs_prune_cifar.py` cost on this machine, from a few steps of each kind."""

import copy
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from kdfs_prune_cifar_arms import ARMS, Arm, arguments, kdfs_config
from kdfs_prune_cifar_data import Images, collate
from kdfs_prune_cifar_networks import folded, load_teacher, random_network
from kdfs_prune_cifar_runs import epochs_of
from transformers import Trainer, TrainerCallback

from hf_efficient import KDFSTrainer
from hf_efficient.kdfs.trainer_kdfs import DistillationTrainer
from hf_efficient.results import write_whole


STEPS = 3


class Stopwatch(TrainerCallback):
    """Core seconds from the start of one step to the start of the next, batch and optimiser included."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.starts.append(time.process_time())


def step_seconds(trainer: Trainer) -> float:
    """Median of some steps, the first one left out."""
    watch = Stopwatch()
    trainer.add_callback(watch)
    trainer.args.max_steps, trainer.args.save_strategy = STEPS + 2, "no"
    trainer.train()
    starts = watch.starts[1:]
    return statistics.median(later - earlier for earlier, later in pairwise(starts))


def arm_seconds(arm: Arm, teacher: torch.nn.Module, data: Images, options: Any) -> tuple[float, float]:
    """Core seconds of a sampling step (0 for all but KDFS) and of a training step."""
    with tempfile.TemporaryDirectory() as folder:
        common = {"train_dataset": data, "data_collator": collate}

        def settings() -> Any:
            args = arguments(Path(folder), options, arm.depth, 0)
            args.disable_tqdm = True
            return args

        sampling = 0.0
        if arm.kind == "kdfs":
            config = kdfs_config(arm, options)
            trainer = KDFSTrainer(copy.deepcopy(teacher), settings(), config, folded(teacher), **common)
            sampling = step_seconds(trainer)
        model = (
            copy.deepcopy(teacher)
            if arm.kind == "dense"
            else random_network(teacher, arm.reduction, 0, options.exclude_layers)
        )
        weight = options.kd_weight if arm.distil else 0.0
        trainer = DistillationTrainer(model, settings(), teacher=folded(teacher), kd_weight=weight, **common)
        return sampling, step_seconds(trainer)


def estimate(options: Any) -> dict[str, float]:
    """Print the core-hours of every arm, and keep them in OUTPUT for `--status`."""
    rows = 50_000 if options.final else 45_000
    count = options.batch_size * 8
    data = Images(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 4, augment=True)
    hours: dict[str, float] = {}
    kinds: dict[tuple, tuple[float, float]] = {}
    total = 0.0
    for name in options.arm or ARMS:
        arm = ARMS[name]
        kind = (arm.kind == "dense", arm.kind == "kdfs", arm.depth, arm.distil, arm.reduction, *arm.settings)
        if kind not in kinds:
            kinds[kind] = arm_seconds(arm, load_teacher(options.weights, arm.depth, options.smoke), data, options)
        sampling, training = kinds[kind]
        share = 1 - options.fine_tune_share if arm.kind == "kdfs" else 0.0
        steps = -(-rows // options.batch_size) * epochs_of(options, arm.depth)
        hours[name] = steps * (share * sampling + (1 - share) * training) / 3600
        total += arm.seeds * hours[name]
        print(
            f"{name:24} {hours[name]:6.2f} core-hours a run, {arm.seeds} seeds "
            f"(steps of {sampling:.3f} and {training:.3f} core seconds)",
            flush=True,
        )
    print(f"{total:.1f} core-hours in all")
    options.output.mkdir(parents=True, exist_ok=True)
    write_whole(options.output / "estimate.json", json.dumps(hours, indent=1) + "\n")
    return hours
