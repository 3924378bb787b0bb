"""Tables and picture of `toe_train_vit.py`.

A part of that script, kept in a file of its own for its length.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from toe_train_vit_data import Batches, Rows, decode
from toe_train_vit_runs import run_file
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_efficient import ToEConfig
from hf_efficient.metrics import load_metric
from hf_efficient.results import write_whole
from hf_efficient.toe import speedup_bound
from hf_efficient.toe.cost_toe import count_patches
from hf_efficient.toe.figures_toe import plot_accuracy


PRESETS = ("deit", "lv-vit", "efficient-train", "fast")
BOUND = (
    "The bound counts multiply-adds of the patch projection and of all layers (linear maps and attention), forward "
    "and backward. Head, normalisation, activations, optimiser and data are outside it, and all arms pay them, as ToE "
    "alone pays its selection: a measured ratio is to be near the bound, not above it by more than its error."
)
WORDS = {"full": "all tokens", "toe": "ToE", "random": "random drop", "fast": "ToE, faster preset"}
WORDS |= {"short": "all tokens, as many epochs as ToE pays for"}


def measure_test(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Accuracy on the test split, of the weights rounded as they are published."""
    images, labels, _ = decode(args.dataset, "test", args.image_size, args.output / "decoded")
    model = AutoModelForImageClassification.from_pretrained(folder).half().float().eval()
    rows, collate, metric = Rows(0, len(labels), augment=False), Batches(images, labels), load_metric("accuracy")
    for start in range(0, len(rows), 250):
        batch = collate([rows[i] for i in range(start, min(start + 250, len(rows)))])
        with torch.inference_mode():
            logits = model(pixel_values=batch["pixel_values"]).logits
        metric.add_batch(predictions=logits.argmax(-1), references=batch["labels"])
    return {"test_accuracy": metric.compute()["accuracy"], "test_images": len(rows)}


def finish_run(args: argparse.Namespace, run: dict[str, Any]) -> None:
    """Measure a trained model on the test split, behind `--final` alone, and keep the figures of the run."""
    file = run_file(args, run["arm"], run["seed"])
    if args.final and "test_accuracy" not in run:
        places = [args.output / f"{run['arm']}-{run['seed']}" / "model"]
        places += [args.results / "weights"] if (run["arm"], run["seed"]) == ("toe", args.seeds[0]) else []
        found = [place for place in places if (place / "config.json").exists()]
        if not found:
            raise SystemExit(f"{file.stem} has no weights left to test; remove {file} to train it again.")
        run |= measure_test(args, found[0])
    write_whole(file, json.dumps(run, indent=1) + "\n")


def print_bounds(args: argparse.Namespace, model: PreTrainedModel) -> None:
    """What the multiply-adds of every preset allow for this model."""
    patches = count_patches(model, torch.zeros(1, 3, args.image_size, args.image_size))
    for name in PRESETS:
        bound, shares = speedup_bound(model, patches, ToEConfig.preset(name))
        print(
            f"bound of {name}: {bound:.3f} times as fast; stages cost {', '.join(f'{s:.3f}' for s in shares)} of full"
        )
    print(BOUND)


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation; a single run has none."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def time_to(run: dict[str, Any], target: float) -> float | None:
    """CPU seconds until an epoch ended at the target accuracy or above."""
    return next((point["cpu_seconds"] for point in run["history"] if point["accuracy"] >= target), None)


def make_table(args: argparse.Namespace, runs: list[dict], model: PreTrainedModel) -> dict[str, Any]:
    """One row an arm: time, ratio next to its bound, accuracy, time to the accuracy of full tokens."""
    patches = count_patches(model, torch.zeros(1, 3, args.image_size, args.image_size))
    arms = {run["arm"]: [other for other in runs if other["arm"] == run["arm"]] for run in runs}
    full = {run["seed"]: run for run in arms.get("full", [])}
    target = statistics.mean(run["validation_accuracy"] for run in full.values()) if full else None
    clock, unit = ("wall_seconds", "minutes") if args.gpu else ("cpu_seconds", "CPU minutes")
    columns = ["arm", "runs", unit, "times as fast", "by yardstick", "bound", "share of bound, %", "validation, %"]
    columns += (["test, %"] if args.final else []) + ["CPU minutes to the accuracy of all tokens"]

    def speed(members: list[dict], name: str) -> float | None:
        pairs = [(full[run["seed"]][name], run[name]) for run in members if run["seed"] in full]
        return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs and all(map(all, pairs)) else None

    rows, figures = [], {}
    for arm, members in arms.items():
        preset = members[0]["recipe"]["preset"]
        bound = speedup_bound(model, patches, ToEConfig.preset(preset))[0] if preset else 1.0
        ratios = [speed(members, name) for name in (clock, "yardsticks")]
        reached = [] if target is None else [time_to(run, target) for run in members]
        minutes = [seconds / 60 for seconds in reached if seconds is not None]
        row = [WORDS[arm], len(members), spread([run[clock] / 60 for run in members], 1)]
        row += [f"{ratio:.3f}" if ratio else "" for ratio in ratios]
        row += [f"{bound:.3f}", f"{100 * ratios[0] / bound:.1f}" if ratios[0] else ""]
        row.append(spread([100 * run["validation_accuracy"] for run in members]))
        row += [spread([100 * run["test_accuracy"] for run in members])] if args.final else []
        rows.append(
            [*row, f"{spread(minutes, 1)} ({len(minutes)} of {len(members)} runs)" if minutes else "not reached"]
        )
        figures[arm] = {"speedup": ratios[0], "speedup_by_yardstick": ratios[1], "bound": bound}
        figures[arm]["share_of_bound"] = ratios[0] / bound if ratios[0] else None
        for name in ("validation_accuracy", "test_accuracy"):
            values = [run[name] for run in members if name in run]
            figures[arm] |= {name: statistics.mean(values)} if values else {}
            figures[arm] |= {f"{name}_deviation": statistics.stdev(values)} if len(values) > 1 else {}
    return {"columns": columns, "rows": rows, "figures": figures, "target": target, "patches": patches}


def report(args: argparse.Namespace, runs: list[dict], model: PreTrainedModel, meta: dict) -> dict[str, Any]:
    """Print the table, draw accuracy over time and write `results.json`."""
    table = make_table(args, runs, model)
    for line in [table["columns"], *table["rows"]]:
        print(" | ".join(str(cell) for cell in line))
    titled = [run | {"title": WORDS[run["arm"]]} for run in runs]
    plot_accuracy(titled, table["target"]).savefig(args.results / "accuracy_over_time.png", dpi=120)
    size = {"parameters": model.num_parameters(), "patches": table["patches"]}
    results = {"meta": meta, "dataset": Path(args.dataset).name, **size, "table": table, "runs": runs}
    write_whole(args.results / "results.json", json.dumps(results, indent=1) + "\n")
    return results
