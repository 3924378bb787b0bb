"""Tables, picture and checkpoint of `toe_train_vit.py`.

A part of that script, kept in a file of its own for its length.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from toe_train_vit_data import MEAN, STD, Batches, Rows, decode
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTImageProcessorPil

from hf_efficient import ToEConfig
from hf_efficient.hub import write_results
from hf_efficient.metrics import load_metric
from hf_efficient.results import write_whole
from hf_efficient.toe import speedup_bound
from hf_efficient.toe.cost_toe import count_patches
from hf_efficient.toe.figures_toe import plot_accuracy


WORDS = {"full": "all tokens", "toe": "ToE", "random": "random drop", "fast": "ToE, faster preset"}


def measure_test(args: argparse.Namespace, folder: Path, run: dict[str, Any]) -> None:
    """Accuracy on the test split, of the weights rounded as they are published; stored with the run."""
    if "test_accuracy" in run:
        return
    images, labels, _ = decode(args.dataset, "test", args.image_size, args.output / "decoded")
    model = AutoModelForImageClassification.from_pretrained(folder / "model").half().float().eval()
    rows, collate, metric = Rows(0, len(labels), augment=False), Batches(images, labels), load_metric("accuracy")
    for start in range(0, len(rows), 250):
        batch = collate([rows[i] for i in range(start, min(start + 250, len(rows)))])
        with torch.inference_mode():
            logits = model(pixel_values=batch["pixel_values"]).logits
        metric.add_batch(predictions=logits.argmax(-1), references=batch["labels"])
    run["test_accuracy"] = metric.compute()["accuracy"]
    run["test_images"] = len(rows)
    write_whole(folder / "run.json", json.dumps(run, indent=2) + "\n")


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
    full = {run["seed"]: run["cpu_seconds"] for run in arms.get("full", [])}
    target = statistics.mean(r["validation_accuracy"] for r in arms["full"]) if full else None
    columns = ["arm", "runs", "CPU minutes", "times as fast", "bound", "share of bound, %", "validation, %"]
    columns += (["test, %"] if args.final else []) + ["CPU minutes to the accuracy of all tokens"]
    rows, figures = [], {}
    for arm, members in arms.items():
        preset = members[0]["preset"]
        bound = speedup_bound(model, patches, ToEConfig.preset(preset))[0] if preset else 1.0
        same = [run for run in members if run["seed"] in full]
        spent = sum(run["cpu_seconds"] for run in same)
        speed = sum(full[run["seed"]] for run in same) / spent if same else None
        reached = [] if target is None else [time_to(run, target) for run in members]
        minutes = [seconds / 60 for seconds in reached if seconds is not None]
        row = [WORDS[arm], len(members), spread([run["cpu_seconds"] / 60 for run in members], 1)]
        row += [f"{speed:.3f}" if speed else "", f"{bound:.3f}", f"{100 * speed / bound:.1f}" if speed else ""]
        row.append(spread([100 * run["validation_accuracy"] for run in members]))
        row += [spread([100 * run["test_accuracy"] for run in members])] if args.final else []
        rows.append(
            [*row, f"{spread(minutes, 1)} ({len(minutes)} of {len(members)} runs)" if minutes else "not reached"]
        )
        figures[arm] = {"speedup": speed, "bound": bound, "share_of_bound": speed / bound if speed else None}
    return {"columns": columns, "rows": rows, "figures": figures, "target": target, "patches": patches}


def report(args: argparse.Namespace, folders: list[Path], model: PreTrainedModel, meta: dict) -> dict[str, Any]:
    """Print the table, draw accuracy over time and write `results.json`."""
    runs = []
    for folder in folders:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if args.final:
            measure_test(args, folder, run)
        runs.append(run)
    table = make_table(args, runs, model)
    for line in [table["columns"], *table["rows"]]:
        print(" | ".join(str(cell) for cell in line))
    plot_accuracy(runs, table["target"]).savefig(args.output / "accuracy_over_time.png", dpi=120)
    size = {"parameters": model.num_parameters(), "patches": table["patches"]}
    results = {"meta": meta, "dataset": Path(args.dataset).name, **size, "table": table, "runs": runs}
    write_whole(args.output / "results.json", json.dumps(results, indent=2) + "\n")
    return results


USAGE = """from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

name = "{name}"
processor = AutoImageProcessor.from_pretrained(name)
model = AutoModelForImageClassification.from_pretrained(name)
image = Image.open("picture.png").convert("RGB")
logits = model(**processor(images=image, return_tensors="pt")).logits
print(model.config.id2label[logits.argmax(-1).item()])"""

METHOD = (
    "Token Expansion (ToE) trains a vision transformer on fewer tokens that grow in stages: a spread-out subset is "
    "expanded by the tokens least like those already in, the rest is merged into its nearest kept token. Training "
    "gets cheaper; the model that comes out is a plain `ViTForImageClassification` and sees all tokens."
)


def write_checkpoint(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Plain ViT weights in fp16 of the first ToE run, image processor, `results.json` and card."""
    first = next(run for run in results["runs"] if run["arm"] == "toe")
    model = AutoModelForImageClassification.from_pretrained(args.output / f"toe-{first['seed']}" / "model")
    args.card.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.card)
    side = {"height": args.image_size, "width": args.image_size}
    ViTImageProcessorPil(size=side, image_mean=[MEAN] * 3, image_std=[STD] * 3).save_pretrained(args.card)
    (args.card / "accuracy_over_time.png").write_bytes((args.output / "accuracy_over_time.png").read_bytes())
    name = f"vit-toe-{results['dataset']}"
    metrics = [
        {"dataset": results["dataset"], "split": split, "type": "accuracy", "value": first[key], "name": words}
        for key, split, words in (
            ("test_accuracy", "test", "accuracy, test images"),
            ("validation_accuracy", "train", "accuracy, training rows held out"),
        )
        if key in first
    ]
    tables = [
        {
            "title": f"{args.epochs} epochs from scratch",
            "columns": results["table"]["columns"],
            "rows": results["table"]["rows"],
            "note": "Mean ± standard deviation over seeds. Time is process CPU time of the training epochs on one "
            "thread; the bound is what the schedule's multiply-adds allow.",
        }
    ]
    extra = args.output / "finetune" / "table.json"  # of toe_finetune_vit.py
    if extra.exists():
        tables.append(json.loads(extra.read_text(encoding="utf-8")))
    data = {"id": results["dataset"], "name": {"cifar10": "CIFAR-10, as JPEG"}.get(results["dataset"], name)}
    write_results(
        args.card,
        {
            "name": name,
            "title": f"A small ViT trained with Token Expansion on {results['dataset']}",
            "summary": f"A plain vision transformer of {results['parameters'] / 1e6:.1f} M parameters and "
            f"{results['patches']} tokens. It loads with transformers alone and runs no code of this repository.",
            "method": METHOD,
            "paper": {
                "title": "A General and Efficient Training for Transformer via Token Expansion (CVPR 2024)",
                "url": "https://arxiv.org/abs/2404.00672",
            },
            "license": "apache-2.0",
            "datasets": [data],
            "pipeline_tag": "image-classification",
            "tags": ["vit", "token-expansion"],
            "usage": USAGE.format(name=name),
            "tables": tables,
            "pictures": [{"file": "accuracy_over_time.png", "caption": "Validation accuracy over training time"}],
            "metrics": metrics,
            "runs": results["runs"],
            "seeds": args.seeds,
            "limits": [
                "Small images and a small network from scratch: the accuracies compare the arms with each other and "
                "not with published ones.",
                *(["The images went through lossy JPEG compression."] if results["dataset"] == "cifar10" else []),
            ],
            "meta": results["meta"],
        },
    )
