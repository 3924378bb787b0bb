"""Small Pix2Pix models and pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_efficient import Pix2PixConfig, Pix2PixModel


@pytest.fixture
def tiny_config() -> Pix2PixConfig:
    return Pix2PixConfig(num_levels=3, base_channels=4, image_size=16)


@pytest.fixture
def tiny_model(tiny_config: Pix2PixConfig) -> Pix2PixModel:
    """A U-Net whose answers depend visibly on its input (the paper's initialisation gives nearly grey images)."""
    model = Pix2PixModel(tiny_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model


@pytest.fixture
def picture():
    """`picture(height, width)` draws an RGB image of smooth noise, the same for the same size."""

    def draw(height: int = 16, width: int = 16) -> Image.Image:
        values = np.random.default_rng(height * 1000 + width).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)

    return draw


@pytest.fixture
def picture_folder(tmp_path: Path, picture) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, size in enumerate([(16, 16), (21, 13), (9, 30)]):
        picture(*size).save(folder / f"{index}.png")
    return folder
