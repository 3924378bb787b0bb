"""The part of KDFS in `hf-efficient quickstart`: a small CNN learns handwritten digits and is pruned by half."""

import io
import json
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from .configuration_cifar_resnet import CifarResNetConfig
from .configuration_kdfs import KDFSConfig
from .figures_kdfs import plot_widths
from .modeling_cifar_resnet import CifarResNetForImageClassification
from .pruner_kdfs import KDFSPruner, measure_latency


CARD = "resnet20-kdfs-cifar10"
SIZE, TEST_IMAGES, BATCH = 16, 500, 64
DENSE_EPOCHS, PRUNE_EPOCHS, REDUCTION = 6, 12, 0.5


def run(checkpoints: Path, output: Path) -> dict[str, Any]:
    """Train a CNN on scikit-learn's digits, prune half of its multiply-adds, compare before and after.

    Args:
        checkpoints (`Path`): Folder of the checkpoints; the CIFAR-10 figures of `resnet20-kdfs-cifar10` are quoted
            from there if it is there.
        output (`Path`): Folder for the picture.

    Returns:
        `dict`: Table, summary, pictures and notes, as `hf_efficient.quickstart` describes.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    set_seed(0)
    train, (images, labels) = load_digits_images()
    names = dict(enumerate("0123456789"))
    config = CifarResNetConfig(depth=8, hidden_sizes=[16, 32, 64], image_size=SIZE, id2label=names)
    model = CifarResNetForImageClassification(config)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # the Trainer prints its logs
        Trainer(model=model, args=_arguments(folder, DENSE_EPOCHS), train_dataset=train).train()
        pruner = KDFSPruner.from_pretrained(model)
        settings = KDFSConfig(target_flops_reduction=REDUCTION, round_to=8, kd_weight=1.0, mask_learning_rate=5e-2)
        args = _arguments(str(Path(folder) / "training"), PRUNE_EPOCHS)
        pruner.prune(Path(folder) / "pruned", settings, train, args=args)
    networks = {"before": model, "after": pruner.pruned_model}
    report = pruner.report
    accuracy = {name: _accuracy(network, images, labels) for name, network in networks.items()}
    milliseconds = {
        batch: {
            name: round(1e3 * seconds, 2)
            for name, seconds in measure_latency(networks, (3, SIZE, SIZE), batch_size=batch).items()
        }
        for batch in (1, BATCH)
    }
    picture = plot_widths(report, output / "kdfs_widths.png")
    return {
        "table": {
            "title": "filters of every convolution",
            "columns": ["layer", "before", "after"],
            "rows": [[layer["name"], layer["before"], layer["after"]] for layer in report["layers"]],
        },
        "summary": [
            [f"accuracy on {TEST_IMAGES} digits, %", *(round(100 * accuracy[name], 1) for name in networks)],
            ["multiply-adds", report["flops"]["before"], report["flops"]["after"]],
            ["parameters", report["parameters"]["before"], report["parameters"]["after"]],
            *(
                [f"milliseconds, batch {batch}", found["before"], found["after"]]
                for batch, found in milliseconds.items()
            ),
        ],
        "pictures": [{"file": picture.name, "caption": "Filters of every convolution before and after pruning."}],
        "notes": [
            f"The dense network was trained for {DENSE_EPOCHS} epochs; pruning and fine-tuning took {PRUNE_EPOCHS} "
            "more, so the accuracies show that pruning works, not that it helps.",
            *_quote(checkpoints / CARD / "results.json"),
        ],
        "details": {"report": report},
    }


def load_digits_images() -> tuple[list[dict[str, Any]], tuple[Tensor, Tensor]]:
    """Scikit-learn's 8x8 digits as three-channel images of 16x16.

    Returns:
        `tuple`: Training rows, and images of shape `(500, 3, 16, 16)` with labels of shape `(500,)` held out.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The digits come with scikit-learn; install `hf-efficient[quickstart]`.") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # (count, 1, 8, 8), from -1 to 1
    images = nn.functional.interpolate(images, size=SIZE, mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:TEST_IMAGES], order[TEST_IMAGES:]
    rows = [{"pixel_values": images[index].contiguous(), "labels": int(labels[index])} for index in rest.tolist()]
    return rows, (images[held_out].contiguous(), labels[held_out])


def _arguments(folder: str, epochs: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        seed=0,
        use_cpu=True,
        dataloader_pin_memory=False,
    )


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model.eval()(images).logits.argmax(dim=1) == labels).float().mean())


def _quote(file: Path) -> list[str]:
    """The CIFAR-10 result of the card beside, if it is there."""
    if not file.is_file():
        return []
    rows = json.loads(file.read_text(encoding="utf-8"))["details"]["figures"]
    pruned, dense = rows["kdfs"], rows.get("dense")
    sentence = (
        f"From the card of {CARD}: {100 * pruned['accuracy']:.2f} % on CIFAR-10 with "
        f"{100 * pruned['flops_reduction']:.0f} % fewer multiply-adds"
    )
    return [sentence + (f", {100 * dense['accuracy']:.2f} % dense, trained as long." if dense else ".")]
