"""Rows of images for `pix2pix_train.py` and `pix2pix_cartoon.py`.

A part of these scripts, kept in a file of its own because both need it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from hf_efficient.pix2pix.pairs_pix2pix import SideBySideFolder


BUNDLED = ("astronaut", "chelsea", "coffee", "rocket")  # photographs inside the scikit-image wheel


def load_rows(dataset: str, split: str) -> Sequence[dict[str, Any]]:
    """Open one split of a data set.

    Args:
        dataset (`str`): `skimage` (four photographs), a folder with `<split>.parquet` files, a folder with a subfolder
            `<split>` of A|B pictures, such a subfolder itself, or the name of a data set of the Hub.
        split (`str`): Name of the split.

    Returns:
        Rows with image columns; A|B pictures have the columns `source` (left) and `target` (right).
    """
    if dataset == "skimage":
        from skimage import data

        photos = [Image.fromarray(getattr(data, name)()).convert("RGB").resize((256, 256)) for name in BUNDLED]
        return [{"image": photo} for photo in (photos[:3] if split == "train" else photos[3:])]
    folder = Path(dataset)
    if (folder / f"{split}.parquet").is_file():
        return datasets.Dataset.from_parquet(str(folder / f"{split}.parquet"))
    if (folder / split).is_dir():
        return SideBySideFolder(folder / split)
    if folder.is_dir():
        return SideBySideFolder(folder)
    return datasets.load_dataset(dataset, split=split)
