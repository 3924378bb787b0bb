"""The part of ToE in `hf-efficient quickstart`: a ViT learns handwritten digits with and without `ToECallback`."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed
from transformers.utils import logging

from .callback_toe import ToECallback
from .configuration_toe import ToEConfig
from .cost_toe import speedup_bound
from .expansion_toe import TokenExpansion
from .figures_toe import plot_expansion


EPOCHS, BATCH, LEARNING_RATE = 2, 16, 2e-3
PATCHES = 64  # a digit has 8 x 8 pixels, and each is a token
PICTURE = "toe_kept_patches.png"


def run(checkpoints: Path, output: Path) -> dict[str, Any]:
    """Train the same small ViT twice for two epochs, on all tokens and with ToE.

    Args:
        checkpoints (`Path`): Unused, the model is trained here.
        output (`Path`): Folder for the pictures.

    Returns:
        `dict`: Table, summary, pictures and notes, as `hf_efficient.quickstart` describes.

    Raises:
        ImportError: If scikit-learn or matplotlib is not installed.
    """
    train, test = _load_digits()
    arms = {"all tokens": [], "ToE": [ToECallback()]}
    results = {}
    for name, callbacks in logging.tqdm(arms.items(), desc="training on digits"):
        results[name] = _train(train, test, callbacks)
    plain, toe = results["all tokens"], results["ToE"]
    expansion = TokenExpansion()
    kept = [expansion.num_kept(PATCHES, stage) for stage in range(1, expansion.config.num_stages + 1)]
    bound = speedup_bound(toe["model"], PATCHES)[0]
    figure = plot_expansion(toe["model"], test[0][:4])
    figure.savefig(output / PICTURE, dpi=100)
    rows = [
        ["all tokens", str(PATCHES), round(plain["seconds"], 1), round(100 * plain["accuracy"], 1)],
        ["ToE", " -> ".join(map(str, kept)), round(toe["seconds"], 1), round(100 * toe["accuracy"], 1)],
    ]
    return {
        "table": {
            "title": f"a ViT on scikit-learn's digits, {EPOCHS} epochs",
            "columns": ["training", "patch tokens", "CPU seconds", "test accuracy, %"],
            "rows": rows,
        },
        "summary": [
            ["CPU seconds of training", rows[0][2], rows[1][2]],
            ["accuracy on 360 digits, %", rows[0][3], rows[1][3]],
        ],
        "pictures": [
            {
                "file": PICTURE,
                "caption": "tokens that each stage of ToE keeps of four digits; blue ones are merged into them",
            }
        ],
        "notes": [
            f"The multiply-adds of this schedule allow {bound:.2f} times the speed on this small model.",
            "Two epochs show the callback at work, not the accuracy of a finished training.",
            "The trained model is a plain ViT: it evaluates on all tokens.",
        ],
        "details": {"speedup_bound": bound, "kept_tokens": kept, "config": ToEConfig().to_dict()},
    }


def _load_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images `(rows, 1, 8, 8)` of about unit variance and labels; every fifth row is for the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('scikit-learn is not installed; run pip install -e ".[quickstart]".') from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 4 - 1.25
    labels, is_test = torch.tensor(labels), torch.arange(len(labels)) % 5 == 0
    return (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])


class _CPUClock(Trainer):
    """A Trainer that adds up the process CPU time of its training steps."""

    cpu_seconds = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Time one step."""
        start = time.process_time()
        loss = super().training_step(*args, **kwargs)
        self.cpu_seconds += time.process_time() - start
        return loss


def _train(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], callbacks: list) -> dict[str, Any]:
    set_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=192,
            image_size=8,
            patch_size=1,
            num_channels=1,
            num_labels=10,
            initializer_range=0.1,  # one pixel a patch: small weights would not see it in two epochs
        )
    )
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(*train)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            warmup_steps=0.1,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = _CPUClock(model, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    with torch.inference_mode():
        right = (model(test[0]).logits.argmax(-1) == test[1]).float().mean().item()
    return {"model": model, "seconds": trainer.cpu_seconds, "accuracy": right}
