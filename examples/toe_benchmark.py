"""What Token Expansion costs and saves on a ViT of DeiT-small shapes (12 blocks, 384 wide, 6 heads, 196 patches).

    python examples/toe_benchmark.py --json toe_benchmark.json          # medium, some ten minutes on one slow core
    python examples/toe_benchmark.py --preset small                     # under a minute

Forward and backward passes of one batch, one thread; the arms take turns in every round and the figures are medians
over the rounds of ratios within a round, so that a neighbour on the machine weighs on all arms alike. Reported:

* `selection_overhead_blocks`: time of the expansion over time of one block on all tokens (target: at most 0.05)
* `step_time_ratio`: time of a ToE step over that of all tokens and over that of random drop of the same number
  (target: within 3 % of random drop)
* `lora_step_time_ratio`: ToE over all tokens where only LoRA weights of rank 8 and the head train
* `run_speedup`: whole training over the default schedule, and `run_speedup_bound`, what its multiply-adds allow

Names that end in `_wall` are wall-clock time, the others process CPU time (on a GPU both are the time it was busy).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from hf_efficient import ToEConfig, TokenExpansion
from hf_efficient.results import run_meta, write_whole
from hf_efficient.toe import speedup_bound
from hf_efficient.toe.attachment_toe import ToEAttachment
from hf_efficient.toe.expansion_toe import RandomDrop


PATCHES = 196
PRESETS = {"small": {"batch_size": 2, "rounds": 3}, "medium": {"batch_size": 8, "rounds": 9}}


def make_model(device: str) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    ).to(device)


def clock(work: Callable[[], None], device: str) -> tuple[float, float]:
    """CPU and wall seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
        busy = time.perf_counter() - wall
        return busy, busy
    return time.process_time() - cpu, time.perf_counter() - wall


def steps(model: torch.nn.Module, batch: dict) -> Callable[..., Callable[[], None]]:
    """`make(expansion, stage)` makes a forward and backward pass; the hook is in for all, as in a training."""
    attachment = ToEAttachment(model, TokenExpansion(ToEConfig())).attach()
    on_gpu = batch["pixel_values"].is_cuda

    def make(expansion: TokenExpansion | None = None, stage: int = 0) -> Callable[[], None]:
        def work() -> None:
            if expansion is not None:
                attachment.expansion = expansion
                attachment.arm(stage)
            with torch.autocast("cuda" if on_gpu else "cpu", torch.bfloat16, enabled=on_gpu):
                loss = model(**batch).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

        return work

    return make


def make_arms(device: str, batch_size: int) -> dict[str, Callable[[], None]]:
    model = make_model(device).train()
    batch = {
        "pixel_values": torch.randn(batch_size, 3, 224, 224, device=device),
        "labels": torch.arange(batch_size, device=device),
    }
    toe, drop = TokenExpansion(ToEConfig()), RandomDrop(ToEConfig())
    with torch.no_grad():
        tokens = model.vit.layers[0](model.vit.embeddings(batch["pixel_values"]))
    tokens.requires_grad_()
    layer = model.vit.layers[1]

    def block() -> None:
        layer(tokens).sum().backward()
        layer.zero_grad(set_to_none=True)

    def select(stage: int) -> Callable[[], None]:
        return lambda: toe(tokens, stage).tokens.sum().backward()

    lora = get_peft_model(
        make_model(device), LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    ).train()
    step, lora_step = steps(model, batch), steps(lora, batch)
    arms = {"block": block, "full": step(), "lora full": lora_step()}
    for stage in (1, 2, 3):
        arms[f"toe {stage}"] = step(toe, stage)
    for stage in (1, 2):
        arms[f"select {stage}"] = select(stage)
        arms[f"random {stage}"] = step(drop, stage)
        arms[f"lora toe {stage}"] = lora_step(toe, stage)
    return arms


def measure(device: str, batch_size: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    arms = make_arms(device, batch_size)
    repeats = {name: 5 if name.startswith(("block", "select")) else 1 for name in arms}
    for name in ("block", "select 2", "full", "lora full"):
        arms[name]()  # warm up
    times = {name: [] for name in arms}
    for turn in range(rounds):
        names = list(arms) if turn % 2 == 0 else list(arms)[::-1]
        for name in names:
            taken = [clock(arms[name], device) for _ in range(repeats[name])]
            times[name].append(tuple(statistics.median(column) for column in zip(*taken)))
    return times


def summarise(times: dict[str, list[tuple[float, float]]], clock_index: int) -> dict:
    series = {name: [pair[clock_index] for pair in pairs] for name, pairs in times.items()}

    def ratio(above: str, below: str) -> float:
        return round(statistics.median(a / b for a, b in zip(series[above], series[below])), 4)

    # the default schedule spends a third of the training in each stage
    whole = [
        3 * full / (first + second + third)
        for full, first, second, third in zip(*(series[name] for name in ("full", "toe 1", "toe 2", "toe 3")))
    ]
    return {
        "selection_overhead_blocks": {str(stage): ratio(f"select {stage}", "block") for stage in (1, 2)},
        "step_time_ratio": {
            "full": {str(stage): ratio(f"toe {stage}", "full") for stage in (1, 2, 3)},
            "random": {str(stage): ratio(f"toe {stage}", f"random {stage}") for stage in (1, 2)},
        },
        "lora_step_time_ratio": {str(stage): ratio(f"lora toe {stage}", "lora full") for stage in (1, 2)},
        "run_speedup": round(statistics.median(whole), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--preset", choices=PRESETS, default="medium")
    parser.add_argument("--smoke", action="store_true", help="one round of one image: shows that it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, help="images in a batch (default: of the preset; 128 on a GPU)")
    args = parser.parse_args()
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: the folder does not exist; create it first.")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out.")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    meta = run_meta()
    settings = {"batch_size": 1, "rounds": 1} if args.smoke else dict(PRESETS[args.preset])
    if args.device == "cuda" and not args.smoke:
        settings = {"batch_size": 128, "rounds": 30}
    if args.batch_size:
        settings["batch_size"] = args.batch_size
    times = measure(args.device, **settings)
    wall = {f"{name}_wall": value for name, value in summarise(times, 1).items()}
    bound, shares = speedup_bound(make_model("meta"), PATCHES, ToEConfig())
    medians = {name: [round(statistics.median(c), 5) for c in zip(*pairs)] for name, pairs in times.items()}
    figures = summarise(times, 0) | wall
    figures["run_speedup_bound"] = round(bound, 4)
    figures["stage_cost_bound"] = {str(stage): round(share, 4) for stage, share in enumerate(shares, 1)}
    figures["meta"] = meta | {"device": args.device, **settings, "median_cpu_and_wall_seconds": medians}
    for name, value in figures.items():
        if name != "meta":
            print(f"{name:32} {value}")
    if args.json:
        write_whole(args.json, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
