"""Slice timm's `tf_efficientnet_lite0` with its ImageNet weights, distil it shortly, export it: the mechanics.

    python examples/kdfs_prune_timm.py --weights efficientnet_lite0/model.safetensors --data imagenet_sample.parquet
    python examples/kdfs_prune_timm.py --smoke

WEIGHTS is the state dict of timm's network (87.7 % on the 1,000 images of the sample, one per class), DATA a parquet
file with the columns `image` and `label`. The pass reads the structure, learns masks and distils on the first 800
images for `--steps` steps; about 20 minutes on one core for 120 steps of 16 images at 224 pixels. It says how far the
masked network and the sliced one are apart (expected: below 1e-5), whether onnxruntime agrees (below 1e-4), and how
often the sliced network gives the teacher's answer on the last 200 images. Eight hundred images cannot train an
ImageNet network: this demonstrates mechanics and claims no accuracy.
"""

import argparse
import faulthandler
import io
import json
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_efficient import KDFSConfig, KDFSPruner
from hf_efficient.kdfs.figures_kdfs import format_widths, plot_widths
from hf_efficient.kdfs.pruner_kdfs import measure_latency
from hf_efficient.results import run_meta, write_whole


ARCHITECTURE = "tf_efficientnet_lite0"


class Pictures(torch.utils.data.Dataset):
    """Images as bytes in memory, mean and standard deviation 0.5."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"pixel_values": self.images[index].float() / 127.5 - 1, "labels": int(self.labels[index])}


def load_pictures(file: Path | None, held_out: int, smoke: bool) -> tuple[Pictures, Pictures]:
    """Rows in an order that mixes the classes, cut into training and held-out rows."""
    if smoke:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (24, 3, 64, 64), generator=generator, dtype=torch.uint8)
        return Pictures(images[:16], torch.arange(16) % 5), Pictures(images[16:], torch.arange(8) % 5)
    import pyarrow.parquet as parquet

    table = parquet.read_table(file)
    pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"].to_pylist()]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(table["label"].to_pylist())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return Pictures(images[:-held_out], labels[:-held_out]), Pictures(images[-held_out:], labels[-held_out:])


def load_teacher(weights: Path | None, smoke: bool) -> TimmWrapperForImageClassification:
    """The network behind the timm wrapper, so that it trains and saves as any model of transformers."""
    side = 64 if smoke else 224
    config = TimmWrapperConfig(architecture=ARCHITECTURE, num_labels=5 if smoke else 1000)
    config.pretrained_cfg = {
        "input_size": [3, side, side],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    model = TimmWrapperForImageClassification(config)
    if not smoke:
        model.timm_model.load_state_dict(load_file(weights))
    return model.eval()


@torch.no_grad()
def answers(model: torch.nn.Module, data: Pictures, batch_size: int = 20) -> torch.Tensor:
    """Logits of all images, `(images, labels)`."""
    rows = [data[index]["pixel_values"] for index in range(len(data))]
    starts = range(0, len(rows), batch_size)
    return torch.cat([model.eval()(torch.stack(rows[start : start + batch_size])).logits for start in starts])


def run_onnx(file: Path, data: Pictures, batch_size: int = 7) -> torch.Tensor:
    """The same from onnxruntime, at a batch size other than the traced one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # its own pool would take every core
    session = onnxruntime.InferenceSession(str(file), options)
    rows = [data[index]["pixel_values"] for index in range(len(data))]
    found = []
    for start in range(0, len(rows), batch_size):
        images = torch.stack(rows[start : start + batch_size]).numpy()
        found.append(torch.from_numpy(session.run(["logits"], {"pixel_values": images})[0]))
    return torch.cat(found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="state dict of timm's network, safetensors")
    parser.add_argument("--data", type=Path, help="parquet file with `image` and `label`")
    parser.add_argument("--output", type=Path, default=Path("runs/kdfs_timm"), help="default: runs/kdfs_timm")
    parser.add_argument("--reduction", type=float, default=0.3, help="share of the multiply-adds (default: 0.3)")
    parser.add_argument("--round-to", type=int, default=8, help="kept counts are multiples (default: 8)")
    parser.add_argument("--steps", type=int, default=120, help="optimiser steps in all (default: 120)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=200, help="images to compare on (default: 200)")
    parser.add_argument("--threads", type=int, default=1, help="of torch and onnxruntime (default: 1)")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--smoke", action="store_true", help="random weights, 64 pixels, two steps")
    options = parser.parse_args()
    if not options.smoke and (options.weights is None or options.data is None):
        parser.error("--weights and --data are needed (or --smoke)")
    return options


def main() -> None:
    faulthandler.enable()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside (SIGTERM); started again, it goes on"))
    options = parse()
    torch.set_num_threads(options.threads)
    if options.smoke:
        options.output = Path(tempfile.mkdtemp(prefix="kdfs_timm_"))
        options.steps, options.batch_size = 2, 4
    meta = run_meta()
    logging.set_verbosity_warning()
    set_seed(0)
    train, held_out = load_pictures(options.data, options.held_out, options.smoke)
    teacher = load_teacher(options.weights, options.smoke)
    config = KDFSConfig(
        target_flops_reduction=options.reduction,
        round_to=options.round_to,
        kd_weight=1.0,
        initial_keep_margin=3.0,
        reconstruction_weight=100.0,
        flops_weight=1000.0,
    )
    args = TrainingArguments(
        output_dir=str(options.output / "training"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=20,
        save_total_limit=1,
        logging_steps=10,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    pruner = KDFSPruner.from_pretrained(teacher)
    folder = pruner.prune(options.output / "model", config, train, args=args)
    print(format_widths(pruner.report), flush=True)
    plot_widths(pruner.report, options.output / "widths.png")

    masked, sliced = answers(pruner.masked_model, held_out), answers(pruner.pruned_model, held_out)
    loaded = answers(AutoModelForImageClassification.from_pretrained(folder), held_out)
    onnx = run_onnx(pruner.export_onnx(options.output), held_out)
    teacher_logits = answers(teacher, held_out)
    labels = held_out.labels
    shape = tuple(held_out[0]["pixel_values"].shape)
    latency = measure_latency({"before": teacher, "after": pruner.pruned_model}, shape)
    results = {
        "relative_difference_masked_sliced": ((masked - sliced).abs().max() / masked.abs().max()).item(),
        "largest_difference_loaded": (loaded - sliced).abs().max().item(),
        "largest_difference_onnxruntime": (onnx - sliced).abs().max().item(),
        "same_top1_onnxruntime": (onnx.argmax(dim=1) == sliced.argmax(dim=1)).float().mean().item(),
        "same_top1_as_teacher": (sliced.argmax(dim=1) == teacher_logits.argmax(dim=1)).float().mean().item(),
        "accuracy": {
            "teacher": (teacher_logits.argmax(dim=1) == labels).float().mean().item(),
            "sliced": (sliced.argmax(dim=1) == labels).float().mean().item(),
        },
        "images": len(labels),
        "latency_seconds_batch_1": latency,
        "flops": pruner.report["flops"],
        "parameters": pruner.report["parameters"],
        "layers": pruner.report["layers"],
        "history": pruner.history,
        "meta": meta,
    }
    write_whole(options.output / "results.json", json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        if name not in ("layers", "history", "meta"):
            print(f"{name}: {value}")
    if results["relative_difference_masked_sliced"] > 1e-5 or results["largest_difference_onnxruntime"] > 1e-4:
        raise SystemExit("the sliced network is not the masked one")


if __name__ == "__main__":
    main()
