"""Clocks of `toe_train_vit.py`: what a training took, and what a step of each arm costs.

A part of that script, kept in a file of its own for its length.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from toe_train_vit_data import Batches, Rows
from toe_train_vit_report import BOUND
from toe_train_vit_runs import preset_of
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hf_efficient import ToEConfig, TokenExpansion
from hf_efficient.metrics import load_metric
from hf_efficient.results import run_meta, write_whole
from hf_efficient.toe import speedup_bound
from hf_efficient.toe.attachment_toe import ToEAttachment
from hf_efficient.toe.cost_toe import count_patches
from hf_efficient.toe.expansion_toe import RandomDrop


def accuracy(prediction: tuple) -> dict[str, float]:
    answers = prediction.predictions.argmax(-1)
    return load_metric("accuracy").compute(predictions=answers, references=prediction.label_ids)


class Yardstick:
    """CPU seconds of one plain pass, forward and backward, over a fixed batch: the unit of a machine and an hour.

    Starts of a run differ in processor and in what else runs there. Time over this unit, taken before and after every
    epoch, can be compared between them. Draws no random number that a training would miss.
    """

    def __init__(self, make_model: Callable[[], PreTrainedModel], batch_size: int, image_size: int):
        with torch.random.fork_rng(devices=[]):
            self.model = make_model().train()
            pixels = torch.randn(batch_size, 3, image_size, image_size)
        self.batch = {"pixel_values": pixels, "labels": torch.arange(batch_size) % self.model.config.num_labels}

    def __call__(self) -> float:
        """Seconds of the faster one of two passes."""
        taken = []
        for _ in range(2):
            start = time.process_time()
            self.model(**self.batch).loss.backward()
            taken.append(time.process_time() - start)
            self.model.zero_grad()
        return min(taken)


class Clock(TrainerCallback):
    """Time of the training epochs alone, kept in the trainer's log so that it survives a restart.

    Data, both passes and the optimiser are in it; decoding, evaluating and saving are not.
    """

    def __init__(self, yardstick: Yardstick | None = None, machine: str = ""):
        self.yardstick, self.machine = yardstick, machine

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Start the clocks behind data set-up and resuming."""
        self.unit = self.yardstick() if self.yardstick else None
        self.began = time.process_time(), time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        """Stop them before evaluating and saving."""
        before = next((e for e in reversed(state.log_history) if "cpu_seconds" in e), {})
        spent = {
            "cpu_seconds": time.process_time() - self.began[0],
            "wall_seconds": time.perf_counter() - self.began[1],
        }
        if self.yardstick:
            spent["yardsticks"] = spent["cpu_seconds"] / (0.5 * (self.unit + self.yardstick()))
        entry = {name: before.get(name, 0.0) + value for name, value in spent.items()}
        state.log_history.append({"epoch": state.epoch, "step": state.global_step, "cpu": self.machine, **entry})


def time_steps(args: argparse.Namespace, model: PreTrainedModel, batches: Batches, rows: int) -> dict[str, Any]:
    """Whole training steps of every arm and stage in turn: data, both passes, clipping, optimiser; no Trainer.

    Returns:
        `dict`: Seconds of a step by arm and stage, core-hours of a run by arm, speed by arm next to its bound.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    attachment = ToEAttachment(model, TokenExpansion()).attach()
    source, rows = Rows(0, rows, augment=True), rows - min(args.validation_rows, rows // 5)

    def step(expansion: TokenExpansion | None, stage: int, turn: int) -> float:
        start = time.process_time()
        batch = batches([source[(turn * args.batch_size + i) % rows] for i in range(args.batch_size)])
        if expansion is not None:
            attachment.expansion = expansion
            attachment.arm(stage)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = model(pixel_values=batch["pixel_values"]).logits
        loss = nn.functional.cross_entropy(logits.float(), batch["labels"], label_smoothing=args.label_smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        return time.process_time() - start

    plans = {arm: ToEConfig.preset(preset_of(args, arm)) for arm in ("toe", "random", "fast")}
    makers = {arm: (RandomDrop if arm == "random" else TokenExpansion)(config) for arm, config in plans.items()}
    shorter = [(arm, stage) for arm, plan in plans.items() for stage, r in enumerate(plan.keep_rates, 1) if r < 1]
    series: dict[tuple[str, int], list[float]] = {key: [] for key in [("full", 0), *shorter]}
    for turn in range(-1, args.time):
        for arm, stage in list(series) if turn % 2 else list(series)[::-1]:
            seconds = step(makers.get(arm), stage, turn)
            if turn >= 0:  # the first round warms up
                series[arm, stage].append(seconds)
    attachment.detach()
    full = series["full", 0]
    patches = count_patches(model, torch.zeros(1, 3, args.image_size, args.image_size))
    steps = args.epochs * -(-rows // args.batch_size)
    result = {"seconds": {f"{arm} {stage}": round(statistics.median(s), 4) for (arm, stage), s in series.items()}}
    result |= {"core_hours": {"full": steps * statistics.median(full) / 3600}, "arms": {}, "rounds": args.time}
    for arm, plan in plans.items():
        ends = [*plan.stage_starts[1:], 1.0]
        shares = [end - start for start, end in zip(plan.stage_starts, ends)]
        stages = [series.get((arm, stage), full) for stage in range(1, len(shares) + 1)]
        means = [sum(share * s for share, s in zip(shares, column)) for column in zip(*stages)]
        speed = statistics.median(a / b for a, b in zip(full, means))
        bound = speedup_bound(model, patches, plan)[0]
        result["core_hours"][arm] = steps * statistics.median(means) / 3600
        result["arms"][arm] = {"speedup": speed, "bound": bound, "share_of_bound": speed / bound}
    result["core_hours"]["short"] = result["core_hours"]["full"] / result["arms"]["toe"]["bound"]
    return result | {"meta": run_meta()}


def show_timing(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print and keep what `time_steps` measured."""
    for name, seconds in result["seconds"].items():
        print(f"{name}: {seconds:.3f} s a step")
    for arm, hours in result["core_hours"].items():
        figures = result["arms"].get(arm)
        words = f", {figures['speedup']:.3f} times as fast, bound {figures['bound']:.3f}" if figures else ""
        print(f"{arm}: {hours:.2f} core-hours a run{words}")
    print(BOUND)
    write_whole(args.results / "timing.json", json.dumps(result, indent=2) + "\n")
