"""Rows of images for `pix2pix_train.py` and `pix2pix_cartoon.py`.

A part of these scripts, kept in a file of its own because both need it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from torch.utils.data import Subset

from hf_efficient.pix2pix.pairs_pix2pix import PictureFolder, SideBySideFolder


BUNDLED = ("astronaut", "chelsea", "coffee", "rocket")  # photographs inside the scikit-image wheel
HELD_OUT = 10  # every tenth picture of a folder without splits is for the test


def load_rows(dataset: str, split: str, pictures: str | None = None) -> Sequence[dict[str, Any]]:
    """Open one split of a data set.

    Args:
        dataset (`str`): `skimage` (four photographs), a folder with `<split>.parquet` files, a folder with a subfolder
            `<split>` of pictures, a folder of pictures without splits (every tenth, the first included, is the test),
            or the name of a data set of the Hub.
        split (`str`): Name of the split.
        pictures (`str`, *optional*): What a folder of pictures holds: `"photographs"`, `"pairs"` (A|B of any shape),
            or `None`: A|B pictures, each about twice as wide as high.

    Returns:
        Rows with image columns: `image` of photographs, `source` (left) and `target` (right) of A|B pictures.

    Raises:
        ValueError: If there is no such data, or a picture of the folder has not the shape of a pair.
        FileNotFoundError: If the folder holds neither the split nor pictures.
    """
    if dataset == "skimage":
        from skimage import data

        photos = [Image.fromarray(getattr(data, name)()).convert("RGB").resize((256, 256)) for name in BUNDLED]
        return [{"image": photo} for photo in (photos[:3] if split == "train" else photos[3:])]
    folder = Path(dataset)
    if folder.is_file():
        raise ValueError(
            f"--dataset {dataset} is a file; name the folder that holds it, with a {split}.parquet in it."
        )
    if (folder / f"{split}.parquet").is_file():
        return datasets.Dataset.from_parquet(str(folder / f"{split}.parquet"))
    if folder.is_dir():
        return _read_folder(folder, split, pictures)
    try:
        return datasets.load_dataset(dataset, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--dataset {dataset} is no folder here and no data set of the Hub that loads with a split {split} "
            f"({reason})."
        ) from error


def split_rows(dataset: str, held_out: int) -> tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]:
    """Open the training split as photographs to train on and the last ones, held out for choices of recipe.

    Args:
        dataset (`str`): As in `load_rows`.
        held_out (`int`): Photographs to hold out.

    Returns:
        `tuple`: Rows to train on and rows to measure on, read when asked for.

    Raises:
        ValueError: If nothing is left to train on, or there is no such data.
    """
    rows = load_rows(dataset, "train", "photographs")
    if not held_out:
        return rows, []
    kept = len(rows) - held_out
    if kept < 1:
        raise ValueError(f"--held-out must leave photographs to train on; it takes {held_out} of {len(rows)}.")
    return Subset(rows, range(kept)), Subset(rows, range(kept, len(rows)))


def _read_folder(folder: Path, split: str, pictures: str | None) -> PictureFolder:
    has_splits = (folder / split).is_dir()
    try:
        place = folder / split if has_splits else folder
        rows = PictureFolder(place) if pictures == "photographs" else SideBySideFolder(place, any_shape=bool(pictures))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--dataset {folder} holds neither {split}.parquet, nor a folder {split} of pictures, nor pictures."
        ) from error
    if has_splits:
        return rows
    rows.files = [path for row, path in enumerate(rows.files) if (row % HELD_OUT == 0) == (split != "train")]
    if not rows.files:
        raise ValueError(f"--dataset {folder} holds one picture, which is the test; training needs at least one more.")
    return rows
