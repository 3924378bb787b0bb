"""Tables, plots and checkpoint of `pix2pix_cartoon.py`.

A part of that script, kept in a file of its own for its length.
"""

import argparse
import json
import re
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from hf_efficient import Pix2PixImageProcessor, Pix2PixModel, evaluate_robustness
from hf_efficient.hub import write_results
from hf_efficient.pix2pix.figures_pix2pix import save_picture
from hf_efficient.pix2pix.robustness_pix2pix import (
    FIGURES,
    IDENTITY,
    PAPER_PIXEL_DISSIMILARITY,
    RobustnessReport,
)
from hf_efficient.results import run_meta, write_whole


PIX2PIX = {
    "title": "Image-to-Image Translation with Conditional Adversarial Networks (arXiv 1611.07004)",
    "url": "https://arxiv.org/abs/1611.07004",
    "bibtex": "@inproceedings{isola2017pix2pix,\n  title={Image-to-Image Translation with Conditional Adversarial "
    "Networks},\n  author={Isola, Phillip and Zhu, Jun-Yan and Zhou, Tinghui and Efros, Alexei A},\n"
    "  booktitle={CVPR},\n  year={2017}\n}",
}
# folder of --dataset -> how the card names it
DATASETS = {
    "photos": {
        "id": "bsds500",
        "name": "photographs of BSDS500 (Arbelaez et al., 2011), centre square; the source names no licence",
        "url": "https://github.com/BIDS/BSDS500",
    },
    "skimage": {"id": "scikit-image", "name": "photographs that scikit-image ships"},
}
USAGE = """\
from transformers import pipeline

translate = pipeline("image-to-image", model="pix2pix-cartoon2photo", trust_remote_code=True)
translate("sample.png").save("photo.png")
"""


def report(args: argparse.Namespace, runs: list[dict[str, Any]], photos: Sequence[dict[str, Any]]) -> None:
    """Measure every run on `photos`, print the tables, write `results.json` and, on demand, the checkpoint."""
    meta = run_meta()
    models = {run["run"]: _published(args, run["run"]) for run in runs}
    robustness = evaluate_robustness(
        models,
        photos,
        severities=args.severities,
        image_column=args.column,
        features=args.features,
        trained_on={run["run"]: run["cartoonizer"] for run in runs},
        limit=args.limit,
        seed=args.seed,
    )
    page = robustness.save(args.output / "robustness")
    tables = [own_table(args, robustness, runs), cross_table(robustness), batch_table(args, robustness, runs)]
    tables[1:1] = [repeats_table(args.repeats, tables[0], runs[0])]
    tables = [table for table in [*tables, choices_table(args.choices)] if table["rows"]]
    for table in tables:
        print(f"\n{table['title']}\n" + " | ".join(table["columns"]))
        for row in table["rows"]:
            print(" | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    print(f"\n{page}: every figure, plots and samples")
    results = make_results(args, robustness, runs, tables, meta)
    write_whole(args.output / "results.json", json.dumps(results, indent=2) + "\n")
    if args.card:
        write_checkpoint(args, models[runs[0]["run"]], results, photos)


def _published(args: argparse.Namespace, name: str) -> Pix2PixModel:
    """The weights as they are published: rounded to half precision."""
    return Pix2PixModel.from_pretrained(args.output / name / "model").half().float().eval()


def own_table(args: argparse.Namespace, robustness: RobustnessReport, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Each model on the cartoons it was trained for, beside the cartoon itself."""
    rows = []
    for method in dict.fromkeys(run["cartoonizer"] for run in runs):
        own = [IDENTITY, *(run["run"] for run in runs if run["cartoonizer"] == method)]
        for model in own:
            figures = [robustness.curve(model, method, name).get(args.strength) for name in robustness.figures]
            if None not in figures:
                rows.append([model, method, *figures])
    columns = ["model", "cartoons", *(FIGURES[name][0] for name in robustness.figures)]
    title = f"Test photographs back from cartoons of the training strength {args.strength}"
    features = f" KID and feature cosine: features of {robustness.feature_network}." if args.features else ""
    return {"title": title, "columns": columns, "rows": rows, "note": f"{robustness.images} photographs.{features}"}


def cross_table(robustness: RobustnessReport) -> dict[str, Any]:
    """PSNR of every model on every cartoonizer, mean over the severities."""
    matrix = robustness.cross_matrix("psnr")
    rows = [[model, *(values.get(method, "") for method in robustness.methods)] for model, values in matrix.items()]
    columns = ["PSNR (dB) of", *(f"on {method}" for method in robustness.methods)]
    return {"title": "Trained on one, tested on all (mean over severities)", "columns": columns, "rows": rows}


def batch_table(args: argparse.Namespace, robustness: RobustnessReport, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch-size ablation beside the paper's figures."""
    rows = []
    for run in sorted(runs, key=lambda run: run["batch_size"]):
        if run["cartoonizer"] == "bilateral" and run["gan_loss"] != "none":
            value = robustness.curve(run["run"], "bilateral", "pixel_dissimilarity").get(args.strength)
            size = {"batch-8": 8, "batch-64": 64}.get(run["run"], 1)
            row = [run["batch_size"], run["images_seen"], run["steps"]]
            rows.append([*row, f"{value:.5f}", f"{PAPER_PIXEL_DISSIMILARITY[size]:.5f}"])
    note = "Cosine dissimilarity of pixels; the paper used other photographs and its own cartoons."
    columns = ["batch size", "images seen", "steps", "here", "paper"]
    return {"title": "Batch size at equal images seen", "columns": columns, "rows": rows, "note": note}


def repeats_table(folders: list[Path], own: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of the runs on the first cartoonizer that were repeated."""
    values = {row[0]: [row[2:]] for row in own["rows"] if row[1] == first["cartoonizer"]}
    for folder in folders:
        for row in json.loads((folder / "results.json").read_text(encoding="utf-8"))["tables"][0]["rows"]:
            values[row[0]].append(row[2:])
    rows = [
        [model, *(f"{statistics.mean(column):.4g} ± {statistics.stdev(column):.2g}" for column in zip(*seeds))]
        for model, seeds in values.items()
        if model != IDENTITY and len(seeds) == len(folders) + 1 > 1
    ]
    note = f"Mean ± standard deviation over {len(folders) + 1} seeds, the first of them in the table above."
    return {"title": "The same over seeds", "columns": ["model", *own["columns"][2:]], "rows": rows, "note": note}


def choices_table(folders: list[Path]) -> dict[str, Any]:
    """What trials with `--held-out` measured, one row a run; the settings that differ between them are columns."""
    names = ("gan_loss", "lambda_l1", "receptive_field", "discriminator_learning_rate", "dropout")
    rows, figures, count, epochs = [], (), 0, 0
    for folder in folders:
        trial = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        table, runs = trial["tables"][0], {run["run"]: run for run in trial["runs"]}
        figures, count = table["columns"][2:], trial["details"]["robustness"]["images"]
        for row in table["rows"]:
            if row[0] in runs:
                epochs, settings = runs[row[0]]["epochs"], [runs[row[0]][name] for name in names]
                rows.append([*("" if value is None else value for value in settings), *row[2:]])
    note = f"{epochs} epochs; measured on {count} training photographs that were held out, not on the test split."
    columns = ["loss", "weight of L1", "receptive field", "discriminator's rate", "dropout", *figures]
    return {"title": "How the settings were chosen", "columns": columns, "rows": rows, "note": note}


def repeated_seeds(folders: list[Path]) -> list[int]:
    return [run["seed"] for folder in folders for run in json.loads((folder / "results.json").read_text())["runs"]]


def findings(table: dict[str, Any], first: str) -> list[str]:
    """Say in words where the first model is better than the cartoon itself and than L1 alone, and where it is not."""
    rows = {row[0]: row[2:] for row in reversed(table["rows"]) if row[1] == table["rows"][0][1]}
    sentences = []
    for other, words in ((IDENTITY, "the cartoon itself"), ("l1", "the same network trained with L1 alone")):
        better: dict[bool, list[str]] = {True: [], False: []}
        for (name, higher), mine, theirs in zip(
            (FIGURES[name] for name in FIGURES), rows.get(first, []), rows.get(other, []), strict=False
        ):
            better[(mine > theirs) == higher].append(name)
        won, lost = (", ".join(better[side]) for side in (True, False))
        found = f"better in {won}; not better in {lost}" if won and lost else "better in every figure"
        found = found if won else "better in no figure"
        if other in rows:
            sentences.append(f"Beside {words} this checkpoint is {found}.")
    return sentences


def make_results(
    args: argparse.Namespace,
    robustness: RobustnessReport,
    runs: list[dict[str, Any]],
    tables: list[dict[str, Any]],
    meta: dict[str, Any],
) -> dict[str, Any]:
    """Everything that the card is rendered from."""
    first, folder = runs[0], Path(args.dataset).name
    parameters = _published(args, first["run"]).num_parameters()
    dataset = DATASETS.get(folder, {"id": re.sub(r"[^a-z0-9-]+", "-", folder.lower()).strip("-"), "name": folder})
    count = round(first["images_seen"] / first["epochs"])
    metrics = []
    for name in robustness.figures:
        value = robustness.curve(first["run"], first["cartoonizer"], name).get(args.strength)
        if value is not None:
            words = f"{FIGURES[name][0]}, {first['cartoonizer']} cartoons of strength {args.strength}"
            metrics.append({"dataset": dataset["id"], "split": "test", "type": name, "name": words, "value": value})
    return {
        "name": "pix2pix-cartoon2photo",
        "title": "Pix2Pix: cartoon to photograph",
        "summary": f"A U-Net of {args.channels} base channels and {parameters / 1e6:.1f} M parameters that turns "
        f"cartoons of {args.size} pixels into photographs, trained as a conditional GAN. It takes images of any size.",
        "method": "Photographs were cartoonized (bilateral filter and dark outlines); the network learned the way "
        f"back against a PatchGAN and an L1 loss of weight {first['lambda_l1']:g}. Loaded through the "
        "`image-to-image` task, which transformers 5 removed and this checkpoint brings along.",
        "paper": PIX2PIX,
        "license": "apache-2.0",
        "datasets": [dataset | {"name": f"{count} training and {robustness.images} test {dataset['name']}"}],
        "pipeline_tag": "image-to-image",
        "tags": ["pix2pix", "gan"],
        "usage": USAGE,
        "tables": tables,
        "pictures": [
            {"file": "samples.jpg", "caption": "test photographs: cartoons of severity 0 to 5, below them translated"},
            {"file": "robustness.png", "caption": "every figure by severity, model and cartoonizer"},
        ],
        "metrics": metrics,
        "runs": [{name: value for name, value in run.items() if name != "history"} for run in runs],
        "seeds": sorted({args.seed, *repeated_seeds(args.repeats)}),
        "limits": [
            *findings(tables[0], first["run"]),
            f"Trained at {args.size} pixels on {first['cartoonizer']} cartoons of strength {args.strength} drawn by "
            "this project; the second table tells how it does on others. Cartoons drawn by people were not tried.",
            "The adversarial loss pays for texture with noise: flat areas such as grass and sky get a faint pattern.",
            "One seed a run where no table says otherwise: differences of a few hundredths may be chance.",
        ],
        "sample": {"file": "sample.png", "text": ""},
        "details": {
            "parameters": parameters,
            "robustness": robustness.to_dict(),
            "history": {run["run"]: run["history"] for run in runs},
        },
        "meta": meta,
    }


def write_checkpoint(args: argparse.Namespace, model: Pix2PixModel, results: dict[str, Any], photos: Any) -> None:
    """Write the first model in half precision with everything that is pushed."""
    from hf_efficient import cartoonize

    first = results["runs"][0]
    args.card.mkdir(parents=True, exist_ok=True)
    plots = args.output / "robustness"
    shutil.copyfile(plots / "robustness.png", args.card / "robustness.png")
    with Image.open(plots / f"samples_{first['cartoonizer']}__{first['run']}.png") as sheet:
        save_picture(sheet.convert("RGB"), args.card / "samples.jpg")
    sample = cartoonize(photos[0][args.column], method=first["cartoonizer"], strength=args.strength)
    save_picture(sample, args.card / "sample.png")
    model.half().save_pretrained(args.card)
    Pix2PixImageProcessor.for_model(model.config).save_pretrained(args.card)
    write_results(args.card, results)
