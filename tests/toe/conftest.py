"""Tiny vision transformers, images and trainers for the ToE tests."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification


SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 4,  # 64 patches
}


class Images(torch.utils.data.Dataset):
    """Random images whose class is the brighter half: something a small model learns in a few steps."""

    def __init__(self, count: int, size: int = 32):
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.arange(count) % 2
        self.images = torch.randn(count, 3, size, size, generator=generator) * 0.5
        for image, label in zip(self.images, self.labels):
            half = slice(0, size // 2) if label else slice(size // 2, size)
            image[:, half] += 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


@pytest.fixture
def images() -> Images:
    return Images(16)


@pytest.fixture
def make_vit() -> Callable[..., ViTForImageClassification]:
    """`make_vit(**config)`: a ViT with the same weights on every call."""

    def make(**config) -> ViTForImageClassification:
        torch.manual_seed(0)
        return ViTForImageClassification(ViTConfig(**(SHAPE | config)))

    return make


@pytest.fixture
def shape() -> dict:
    return dict(SHAPE)


@pytest.fixture
def make_trainer(tmp_path: Path, images: Images) -> Callable[..., Trainer]:
    """`make_trainer(model, callbacks, **arguments)`: 12 steps of 4 images, logged one by one."""

    def make(model, callbacks=(), trainer_class=Trainer, trainer_arguments=None, **arguments) -> Trainer:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 8,
            "max_steps": 12,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": 3,
        }
        extra = {"train_dataset": images, "eval_dataset": images} | (trainer_arguments or {})
        args = TrainingArguments(**(settings | arguments))
        return trainer_class(model, args, callbacks=list(callbacks), **extra)

    return make


@pytest.fixture
def count_hooks() -> Callable[[torch.nn.Module], int]:
    """Number of forward hooks of any kind in a model, or of what is still noted of one that is gone."""

    def count(model: torch.nn.Module) -> int:
        return sum(
            len({*m._forward_pre_hooks, *m._forward_pre_hooks_with_kwargs})
            + len({*m._forward_hooks, *m._forward_hooks_always_called})
            for m in model.modules()
        )

    return count


@pytest.fixture
def rows_seen() -> Callable[[torch.nn.Module], tuple[list[int], list]]:
    """`rows, handle = rows_seen(layer)`: number of rows a layer gets in each training forward."""

    def watch(layer):
        rows: list[int] = []

        def note(module, args, kwargs, output):
            if module.training:
                rows.append((args[0] if args else kwargs["hidden_states"]).shape[1])

        return rows, layer.register_forward_hook(note, with_kwargs=True)

    return watch


@pytest.fixture(scope="session")
def golden(repository: Path) -> dict:
    """Numbers produced by the authors' code."""
    folder = repository / "tests" / "fixtures"
    return load_file(folder / "toe.safetensors") | {"what": json.loads((folder / "toe.json").read_text())["what"]}
