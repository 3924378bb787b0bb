"""Checkpoint folders of `kdfs_prune_cifar.py`: the pruned network and the given one, in half precision, with cards."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from kdfs_prune_cifar_arms import ARMS
from kdfs_prune_cifar_card import DATASET, PAPER, choices_table, plot_accuracy, plot_confusion, tables
from kdfs_prune_cifar_data import MEAN, STD, Images, accuracy
from kdfs_prune_cifar_networks import SHAPE
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTImageProcessor

from hf_efficient import KDFSPrunedModelForImageClassification, count_flops
from hf_efficient.hub import write_results
from hf_efficient.kdfs.figures_kdfs import plot_widths
from hf_efficient.kdfs.pruner_kdfs import measure_latency


NAME, DENSE_NAME = "resnet20-kdfs-cifar10", "resnet20-cifar10"
GIVEN = "[pytorch_resnet_cifar10](https://github.com/akamaster/pytorch_resnet_cifar10)"
USAGE = """
from PIL import Image
from transformers import pipeline

checkpoint = "{name}"  # this repository: its name on the Hub or a local copy
classify = pipeline("image-classification", checkpoint, trust_remote_code=True, dtype="float32")
print(classify(Image.new("RGB", (32, 32), (90, 140, 220)))[:3])
"""
LIMITS = [
    "It was trained and tested on CIFAR-10 images that were JPEG-compressed with 4:2:0 chroma. Its accuracy compares "
    "with what was measured on these images, not with published CIFAR-10 numbers.",
    "32x32 images of ten classes; other pictures get one of the ten names all the same.",
    'The weights are stored in half precision: load them with `dtype="float32"`, above all to train.',
]
PRUNED_LIMITS = [
    "At this size a network is bound by calls more than by arithmetic: half of the multiply-adds is not half of the "
    "time, see the measured times.",
    "Rates and the strength of distillation were tried with more recipes of KDFS than of the others, see the trials; "
    "every arm then got the same rate, and every arm with distillation the same.",
    "The authors train for 350 epochs; here every network had the epochs named in the table.",
    "Torch-Pruning cannot follow the parameter-free shortcuts, which pad with zeros, so here it prunes the first "
    "convolution of every block alone; KDFS prunes both.",
]


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `folder` when nothing went wrong."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}_", dir=folder.parent))
    try:
        yield building
        building.chmod(0o755)
        if folder.is_dir():
            shutil.rmtree(folder)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def save_network(model: PreTrainedModel, folder: Path, licence: Path | None) -> torch.nn.Module:
    """Save weights in half precision, image processor and licence; the network as those who load it get it."""
    model.half().save_pretrained(folder)
    ViTImageProcessor(size={"height": SHAPE[1], "width": SHAPE[2]}, image_mean=MEAN, image_std=STD).save_pretrained(
        folder
    )
    if licence is not None:
        shutil.copyfile(licence, folder / "LICENSE")
    return AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)


def document(name: str, value: float, results: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """What both cards have in common."""
    split = "train" if "training" in results["judged_on"] else "test"
    metric = {"dataset": DATASET["id"], "split": split, "type": "accuracy"}
    return {
        "name": name,
        "license": "bsd-2-clause",
        "datasets": [DATASET],
        "pipeline_tag": "image-classification",
        "usage": USAGE.format(name=name),
        "metrics": [{**metric, "name": "accuracy of these weights", "value": round(value, 4)}],
        "meta": results["meta"],
        **fields,
    }


def time_beside(dense: PreTrainedModel, model: torch.nn.Module, size: int) -> dict[str, float]:
    """Seconds of a forward pass of both networks in turns, and their ratio."""
    seconds = measure_latency({"dense": dense, "pruned": model}, SHAPE, batch_size=size)
    return {**seconds, "ratio": seconds["pruned"] / seconds["dense"]}


def time_table(times: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Both batch sizes of `time_beside` as a table of the card."""
    rows = [
        [size, f"{1000 * own['dense']:.2f}", f"{1000 * own['pruned']:.2f}", f"{own['ratio']:.2f}"]
        for size, own in times.items()
    ]
    return {
        "title": "Time of these weights",
        "columns": ["batch", "dense, ms", "pruned, ms", "pruned / dense"],
        "rows": rows,
        "note": "Shortest of 30 forward passes in turns, process CPU time, on the hardware below; on Linux with glibc "
        "told to keep freed memory (`examples/kdfs_prune_cifar_memory.py`), without which the ratio changes "
        "from start to start.",
    }


def write_pruned(
    folder: Path,
    source: Path,
    dense: PreTrainedModel,
    results: dict,
    choices: Path,
    held_out: Images,
    licence: Path | None,
) -> Path:
    """The network of the first KDFS run with the whole comparison; whole or not at all."""
    runs = results["runs"]
    own = next(run for run in runs if run["arm"] == "kdfs" and run["seed"] == 0)
    with whole_folder(folder) as building:
        model = KDFSPrunedModelForImageClassification.from_pretrained(source)
        model = save_network(model, building, licence)
        value = accuracy(model, held_out)
        times = {str(size): time_beside(dense, model, size) for size in (1, 64)}
        shutil.copy(source / "kdfs_config.json", building)
        report = {"layers": own["layers"], "flops": {"reduction": own["flops_reduction"]}}
        plot_widths(report, building / "widths.png")
        plot_accuracy(runs, results["summary"], building / "accuracy.png")
        before = own["macs"] / (1 - own["flops_reduction"]) / 1e6
        fields = {
            "title": "ResNet-20 for CIFAR-10, pruned by KDFS",
            "summary": f"A CIFAR ResNet-20 without {100 * own['flops_reduction']:.1f} % of its multiply-adds: "
            f"{own['macs'] / 1e6:.1f} M instead of {before:.1f} M, {own['parameters']:,} parameters. "
            f"{100 * value:.2f} % on the {results['judged_on']}, in half precision; {100 * own['accuracy']:.2f} % as "
            f"it was trained. The network it was pruned from is `{DENSE_NAME}`.",
            "method": "Every convolution of the residual blocks learned which of its filters to keep: logits, set at "
            "first by how much the loss depends on a filter for what it costs, were sampled by a straight-through "
            "Gumbel-softmax and trained with the weights under a target for the multiply-adds and the teacher's "
            "answers and feature maps. Then the dropped filters were cut out, which changes no answer "
            "since the masks act after normalisation, and the smaller network was trained on. Teacher and start: "
            f"the ResNet-20 of {GIVEN}, trained for two more epochs on these images before this project took it up.",
            "paper": PAPER,
            "tags": ["kdfs", "pruning", "resnet"],
            "tables": [
                *tables(runs, results["summary"], results["judged_on"]),
                time_table(times),
                *choices_table(choices),
            ],
            "pictures": [
                {"file": "accuracy.png", "caption": "Accuracy of every run; a line marks the mean of an arm."},
                {"file": "widths.png", "caption": "Filters of every convolution before and after."},
            ],
            "runs": [{key: run[key] for key in run if key not in ("log", "layers", "start")} for run in runs],
            "seeds": sorted({run["seed"] for run in runs}),
            "limits": LIMITS + PRUNED_LIMITS,
            "details": {
                **{name: own[name] for name in ("macs", "parameters", "layers")},
                "time": times,
                "figures": {row["arm"]: row for row in results["summary"]},
            },
        }
        write_results(building, document(NAME, value, results, **fields))
    return folder


def write_dense(folder: Path, teacher: PreTrainedModel, results: dict, held_out: Images, licence: Path | None) -> Path:
    """The network that all runs of its depth start from, with the answers it gives; whole or not at all."""
    given = next(run for run in results["runs"] if ARMS[run["arm"]].depth == 20)["teacher_accuracy"]
    macs = count_flops(teacher, SHAPE)
    with whole_folder(folder) as building:
        parameters = sum(parameter.numel() for parameter in teacher.parameters())
        model = save_network(teacher, building, licence)
        value = accuracy(model, held_out)
        rows = plot_confusion(model, held_out, building / "confusion.png")
        names = [model.config.id2label[index] for index in range(len(rows))]
        fields = {
            "title": "ResNet-20 for CIFAR-10",
            "summary": f"A CIFAR ResNet-20 of {parameters:,} parameters and {macs / 1e6:.1f} M multiply-adds, the "
            f"network from which `{NAME}` was pruned. {100 * value:.2f} % on the {results['judged_on']}.",
            "method": f"The ResNet-20 of {GIVEN} (residual blocks of two 3x3 convolutions, parameter-free shortcuts "
            "that pad with zeros), trained for two more epochs on these images, with crops and flips. This project "
            "did not train it: it was converted by `CifarResNetForImageClassification.from_original`.",
            "paper": {
                "title": "Deep Residual Learning for Image Recognition (CVPR 2016)",
                "url": "https://arxiv.org/abs/1512.03385",
            },
            "tags": ["resnet", "cifar"],
            "tables": [
                {
                    "title": f"Right answers on the {results['judged_on']}, by class",
                    "columns": ["class", "images", "right, %"],
                    "rows": [
                        [name, sum(row), f"{100 * row[index] / sum(row):.1f}"]
                        for index, (name, row) in enumerate(zip(names, rows))
                    ],
                }
            ],
            "pictures": [{"file": "confusion.png", "caption": "Images by true class (rows) and answer (columns)."}],
            "runs": [{"precision": "float32", "accuracy": given}, {"precision": "float16", "accuracy": value}],
            "seeds": [0],  # of the training that made it
            "limits": LIMITS,
            "details": {"macs": macs, "parameters": parameters},
        }
        write_results(building, document(DENSE_NAME, value, results, **fields))
    return folder
