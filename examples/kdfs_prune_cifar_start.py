"""Train a CIFAR ResNet that has not seen the held-out rows, for trials of recipes with `kdfs_prune_cifar.py`.

    python examples/kdfs_prune_cifar_start.py --data cifar10 --output START
    python examples/kdfs_prune_cifar.py --data cifar10 --weights START --epochs 6 --arm kdfs --seed 0 --kd-weight 1
    python examples/kdfs_prune_cifar_start.py --smoke

The trained networks that the comparison starts from have seen all training rows: on the last 5,000 of them they are
six points better than on new images, and a recipe that stays near them looks better there than it is. This script
trains ResNet-20 from scratch on the first 45,000 rows and writes `resnet20_jpeg.safetensors` as the comparison reads
it, so that trials from it are judged on rows that are new to every network. An interrupted run goes on.
Measured: 86.9 % on the held-out rows after 60 epochs, 1.1 core-hours with `--bf16` on a core with AVX-512 (the given
network has 87.9 % on new images); 83.2 % after 20.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from kdfs_prune_cifar_data import LABELS, accuracy, collate, load_data
from kdfs_prune_cifar_runs import START
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments, set_seed

from hf_efficient import CifarResNetConfig, CifarResNetForImageClassification
from hf_efficient.kdfs.resuming_kdfs import last_whole_checkpoint
from hf_efficient.results import run_meta, write_whole


def write_original(model: CifarResNetForImageClassification, file: Path) -> None:
    """Write the weights in the layout of pytorch_resnet_cifar10, whole or not at all."""
    state = {
        key.removeprefix("cifar_resnet."): value.contiguous()
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    unfinished = file.with_name(f".{os.getpid()}.{file.name}")
    save_file(state, unfinished)
    os.replace(unfinished, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.parquet")
    parser.add_argument("--output", type=Path, default=Path("runs/kdfs_start"), help="default: runs/kdfs_start")
    parser.add_argument("--epochs", type=float, default=60.0)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=5e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast; slow on CPUs without avx512_bf16")
    parser.add_argument("--smoke", action="store_true", help="toy data, some seconds")
    options = parser.parse_args()
    if options.data is None and not options.smoke:
        parser.error("--data is needed (or --smoke)")
    if options.smoke:
        options.output, options.epochs = Path(tempfile.mkdtemp(prefix="kdfs_start_")), 1.0
    torch.set_num_threads(1)
    train, held_out = load_data(options.data, False, options.smoke)
    set_seed(options.seed)
    labels = LABELS[:4] if options.smoke else LABELS
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=20, id2label=dict(enumerate(labels))))
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(options.output / "training"),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32 if options.smoke else 128,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            save_strategy="epoch",
            save_total_limit=1,
            logging_strategy="epoch",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            report_to="none",
            seed=options.seed,
            bf16=options.bf16,
            use_cpu=True,
        ),
        train_dataset=train,
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(options.output / "training"))
    file = options.output / "resnet20_jpeg.safetensors"
    write_original(model, file)
    reached = accuracy(CifarResNetForImageClassification.from_original(file), held_out)  # in float32, as others see it
    note = {"epochs": options.epochs, "accuracy": reached, "meta": run_meta()}
    write_whole(options.output / START, json.dumps(note, indent=1) + "\n")
    print(f"{reached:.4f} on {len(held_out):,} held-out rows; wrote {options.output}")


if __name__ == "__main__":
    main()
