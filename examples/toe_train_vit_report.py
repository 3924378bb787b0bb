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
from toe_train_vit_runs import run_file
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTImageProcessorPil

from hf_efficient import ToEConfig
from hf_efficient.hub import write_results
from hf_efficient.metrics import load_metric
from hf_efficient.results import write_whole
from hf_efficient.toe import speedup_bound
from hf_efficient.toe.cost_toe import count_patches
from hf_efficient.toe.figures_toe import plot_accuracy, plot_expansion


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


def choices_table(folder: Path, main: list[dict]) -> list[dict[str, Any]]:
    """The trials behind the recipe, from `folder/choices/NAME`, and runs of the chosen one, on held-out rows."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("choices/*/run-*.json"))]
    if not runs:
        return []
    rows, chosen = [], [run for run in main if run["arm"] in ("full", "toe") and run["seed"] == main[0]["seed"]]
    for run in runs + chosen:
        recipe, score = run["recipe"], f"{100 * run['validation_accuracy']:.2f}"
        options = [recipe["shift"], recipe["batch_size"], f"{recipe['learning_rate']:g}", recipe["epochs"]]
        known = f"{100 * run['test_accuracy']:.2f}" if "test_accuracy" in run else ""
        rows.append([*options, WORDS[run["arm"]], run["seed"], score, known])
    columns = ["crop, pixels", "batch", "learning rate", "epochs", "arm", "seed", "validation, %", "test, %"]
    note = "One run each, judged on held-out training rows. Chosen is the best on the mean of all tokens and ToE, in "
    note += f"the last {len(chosen)} rows; other seeds might choose another. Test figures of trials had no part in it."
    return [{"title": "Trials for the recipe", "columns": columns, "rows": rows, "note": note}]


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
    model = AutoModelForImageClassification.from_pretrained(args.results / "weights", dtype=torch.float16)
    args.card.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.card)
    side = {"height": args.image_size, "width": args.image_size}
    ViTImageProcessorPil(size=side, image_mean=[MEAN] * 3, image_std=[STD] * 3).save_pretrained(args.card)
    (args.card / "accuracy_over_time.png").write_bytes((args.results / "accuracy_over_time.png").read_bytes())
    images, labels, _ = decode(args.dataset, "train", args.image_size, args.output / "decoded")
    images, labels = images[-4:], labels[-4:]  # of the validation rows
    pixels = Batches(images, labels)([(row, False) for row in range(len(images))])["pixel_values"]
    kept = plot_expansion(model.float(), pixels, list(images.transpose(0, 2, 3, 1)), ToEConfig.preset(args.preset))
    kept.savefig(args.card / "kept_tokens.png", dpi=100)
    name = f"vit-toe-{results['dataset']}"
    machines = ", ".join(sorted({machine for run in results["runs"] for machine in run["machines"]}))
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
            f"thread, data and optimiser included; runs on: {machines}. The yardstick is the time of one "
            "plain pass, forward and backward, taken around every epoch: a ratio by it holds across machines, and "
            "where other work on the machine has stretched the CPU time of a run. Fewer epochs on all tokens are "
            "plain training: their distance from the bound is the error of these measurements. Random drop draws from "
            "the generator that also crops and mirrors the images: same rows, other crops. " + BOUND,
        }
    ]
    tables += choices_table(args.results, results["runs"])
    extra = sorted(args.results.glob("finetune*/table.json"))  # of toe_finetune_vit.py
    tables += [json.loads(file.read_text(encoding="utf-8")) for file in extra]
    timing = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in args.results.glob("timing.json")}
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
            "pictures": [
                {"file": "accuracy_over_time.png", "caption": "Validation accuracy over training time"},
                {
                    "file": "kept_tokens.png",
                    "caption": "Tokens that each stage keeps, as they are; blue, struck-out ones are merged into them",
                },
            ],
            "metrics": metrics,
            "runs": results["runs"],
            "seeds": args.seeds,
            "details": {"figures": results["table"]["figures"], **timing},
            "limits": [
                "Small images and a small network from scratch: the accuracies compare the arms with each other and "
                "not with published ones.",
                "How near ToE comes to all tokens depends on the recipe: see the trials.",
                *(["The images went through lossy JPEG compression."] if results["dataset"] == "cifar10" else []),
            ],
            "meta": results["meta"],
        },
    )
