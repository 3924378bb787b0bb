"""Images for `toe_train_vit.py`: decoded once to bytes on disk, flipped and shifted as whole batches.

A part of that script, kept in a file of its own for its length.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image, load_dataset
from torch import Tensor


MEAN, STD = 0.5, 0.5  # maps bytes to [-1, 1], the image processor of a plain ViT


def load_split(name: str, split: str) -> Dataset:
    """A split of a dataset by name on the Hub, of a folder of images, or of a folder with `<split>.parquet`."""
    if name == "digits":
        return load_digits_split(split)
    if Path(name).is_dir() and (files := sorted(Path(name).glob(f"{split}*.parquet"))):
        return load_dataset("parquet", data_files={split: [str(file) for file in files]}, split=split)
    try:
        return load_dataset(name, split=split)
    except (OSError, ValueError) as error:  # no such data set, no network, no such split
        raise SystemExit(f"--dataset {name}: its split {split} could not be loaded ({error}).") from error


def load_digits_split(split: str) -> Dataset:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; every fifth one is test data."""
    from PIL import Image as Picture

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit('The digits need scikit-learn; run pip install -e ".[test]".') from error
    images, labels = load_digits(return_X_y=True)
    rows = [i for i in range(len(labels)) if (i % 5 == 0) == (split == "test")]
    pictures = [Picture.fromarray((images[i].reshape(8, 8) * 15.9).astype(np.uint8)).convert("RGB") for i in rows]
    data = Dataset.from_dict({"image": pictures, "label": [int(labels[i]) for i in rows]})
    return data.cast_column("label", ClassLabel(num_classes=10))


def decode(name: str, split: str, size: int, folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images `(rows, 3, size, size)` as bytes, labels `(rows,)` and class names; decoded at the first call.

    The split is read by this function alone, so that a test split stays closed until someone asks for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = str(Path(name).resolve()) if Path(name).is_dir() else name
    key = f"{hashlib.sha256(place.encode()).hexdigest()[:8]}_{split}_{size}"
    files = [folder / f"{key}_{part}" for part in ("images.npy", "labels.npy", "names.json")]
    if not all(file.exists() for file in files):
        data = load_split(name, split)
        columns = {type(feature): column for column, feature in data.features.items()}
        labels = [column for column, feature in data.features.items() if isinstance(feature, ClassLabel)]
        if len(labels) > 1:
            raise SystemExit(f"--dataset needs one class label column, {name} has {', '.join(labels)}: remove others.")
        if not {Image, ClassLabel} <= columns.keys():
            raise SystemExit(f"--dataset needs an image and a class label column, {name} has {data.features}.")
        images = np.empty((len(data), 3, size, size), np.uint8)
        for row, picture in enumerate(data[columns[Image]]):
            picture = picture.convert("RGB")
            picture = picture if picture.size == (size, size) else picture.resize((size, size))
            images[row] = np.asarray(picture).transpose(2, 0, 1)
        parts = (images, np.asarray(data[columns[ClassLabel]]), data.features[columns[ClassLabel]].names)
        for file, part in zip(files, parts):  # whole or not at all
            temporary = file.with_name(f".{os.getpid()}.{file.name}")
            if file.suffix == ".json":
                temporary.write_text(json.dumps(part))
            else:
                np.save(temporary, part)
            os.replace(temporary, file)
    return np.load(files[0], mmap_mode="r"), np.load(files[1]), json.loads(files[2].read_text())


class Rows(torch.utils.data.Dataset):
    """Row numbers; the images stay where they are until a whole batch is fetched."""

    def __init__(self, start: int, stop: int, augment: bool):
        self.start, self.stop, self.augment = start, stop, augment

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> tuple[int, bool]:
        return self.start + i, self.augment


class Batches:
    """Collator: rows of one batch -> normalised pixels and labels; training rows are shifted and flipped.

    Args:
        images (`np.ndarray` of shape `(rows, 3, size, size)`): Bytes.
        labels (`np.ndarray` of shape `(rows,)`): Classes.
        flip (`bool`): Whether a mirrored image keeps its meaning (it does not for digits).
        shift (`int`): Pixels of padding that a training image moves within.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, flip: bool = True, shift: int = 4):
        self.images, self.flip, self.shift = torch.from_numpy(np.array(images)), flip, shift
        self.labels = torch.from_numpy(labels).long()

    def __call__(self, rows: list[tuple[int, bool]]) -> dict[str, Tensor]:
        """Fetch the rows `(number, whether to augment)` of one batch."""
        chosen = torch.tensor([row for row, _ in rows])
        images = self.images[chosen]
        if rows[0][1]:
            images = self.move(images)
        pixels = images.float().div_(255 * STD).sub_(MEAN / STD)
        return {"pixel_values": pixels, "labels": self.labels[chosen]}

    def move(self, images: Tensor) -> Tensor:
        """Shift every image by its own offset of at most `shift` pixels and mirror half of them."""
        batch, _, size, _ = images.shape
        padded = torch.nn.functional.pad(images, [self.shift] * 4)
        offsets = torch.randint(0, 2 * self.shift + 1, (2, batch, 1))
        lines = offsets[0] + torch.arange(size)  # (batch, size)
        columns = offsets[1] + torch.arange(size)
        if self.flip:
            columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
        every = torch.arange(batch)[:, None, None]
        return padded[every, :, lines[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # (batch, 3, size, size)
