"""The part of Pix2Pix in `hf-efficient quickstart`: cartoons of embedded photographs become photographs again."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import pipeline
from transformers.utils import logging

from .cartoonize_pix2pix import cartoonize
from .figures_pix2pix import sample_sheet, save_picture


CHECKPOINT = "pix2pix-cartoon2photo"
PHOTOS = ("astronaut", "chelsea", "coffee")  # inside the scikit-image wheel
PICTURE = "pix2pix_cartoon_to_photo.png"


def run(checkpoints: Path, output: Path) -> dict[str, Any]:
    """Cartoonize photographs, translate them back and compare both with the photographs.

    Args:
        checkpoints (`Path`): Folder of checkpoints.
        output (`Path`): Folder for the picture.

    Returns:
        `dict`: Table, summary, picture and notes, as `hf_efficient.quickstart` describes.

    Raises:
        FileNotFoundError: If the checkpoint is missing.
        ImportError: If scikit-image or OpenCV is not installed.
    """
    folder = checkpoints / CHECKPOINT
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is missing: take the folder from the repository.")
    translate = pipeline("image-to-image", model=str(folder), device="cpu")
    side = translate.model.config.image_size
    rows, sheet = [], []
    for name, photo in logging.tqdm(_load_photos(side).items(), desc="cartoons to photographs"):
        cartoon = cartoonize(photo)
        start = time.process_time()
        output_photo = translate(cartoon)
        seconds = time.process_time() - start
        rows.append([name, round(_psnr(cartoon, photo), 2), round(_psnr(output_photo, photo), 2), round(seconds, 3)])
        sheet.append([cartoon, output_photo, photo])
    save_picture(sample_sheet(sheet, ["cartoon", "translated", "photograph"]), output / PICTURE)
    means = [round(float(np.mean([row[column] for row in rows])), 2) for column in (1, 2)]
    return {
        "table": {
            "title": f"photographs of scikit-image at {side} pixels, from cartoon to photograph",
            "columns": ["photograph", "PSNR of the cartoon, dB", "PSNR translated, dB", "CPU seconds"],
            "rows": rows,
        },
        "summary": [["PSNR to the photograph, dB", *means]],
        "pictures": [{"file": PICTURE, "caption": "cartoon, what Pix2Pix makes of it, and the photograph"}],
        "notes": ["The model never saw these photographs; the card has the figures on 100 test photographs."],
        "details": {"generator": translate.model.config.to_dict()},
    }


def _load_photos(side: int) -> dict[str, Image.Image]:
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError('scikit-image is not installed; run pip install -e ".[quickstart]".') from error
    photos = {}
    for name in PHOTOS:
        photo = Image.fromarray(getattr(data, name)()).convert("RGB")
        edge = min(photo.size)
        left, top = (photo.width - edge) // 2, (photo.height - edge) // 2
        box = (left, top, left + edge, top + edge)
        photos[name] = photo.resize((side, side), Image.Resampling.LANCZOS, box=box)
    return photos


def _psnr(image: Image.Image, photo: Image.Image) -> float:
    """Peak signal-to-noise ratio, by scikit-image."""
    from skimage.metrics import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(np.asarray(photo), np.asarray(image), data_range=255))
