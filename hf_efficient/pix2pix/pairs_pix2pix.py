"""Pairs of images to train on: two columns, one column or folder and a cartoonizer, or a folder of A|B pictures."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset
from transformers.utils import logging

from .cartoonize_pix2pix import MAX_STRENGTH, METHODS, cartoonize
from .configuration_pix2pix import Pix2PixConfig
from .figures_pix2pix import UNREADABLE, read_picture, refuse_unreadable
from .image_processing_pix2pix import Pix2PixImageProcessor, to_rgb


_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
_SIDE_BY_SIDE = (1.8, 2.2)  # width over height; photographs are narrower (16:9 is 1.78) or panoramas
_THEN = ", then start again: a training goes on at its last checkpoint"
logger = logging.get_logger(__name__)


class ImagePairs(Dataset):
    """Source and target images as tensors in `[-1, 1]`, augmented alike.

    The augmentation of a row depends on `seed`, the epoch and the row alone, so a resumed training sees the same
    images. [`Pix2PixTrainer`] sets the epoch.

    Args:
        rows (`datasets.Dataset` or `Sequence[dict]`): Rows with image columns.
        target_column (`str`): Column of the wanted images.
        source_column (`str`, *optional*): Column of the source images; left out, the target is cartoonized.
        size (`int`, defaults to 256): Side in pixels that both images are resized to, a multiple of what the generator
            takes ([`Pix2PixTrainer`] checks it).
        jitter (`int`, defaults to 0): Pixels that both are first enlarged by, then cropped at random (the paper: 30).
        flip (`bool`, defaults to `False`): Mirror half of the pairs at random.
        method (`str`, *optional*): Cartoonizer, for pairs without a source column; `"bilateral"` where left out.
        strength (`int`, defaults to 3): Its strength, 0 to 5.
        num_channels (`int`, defaults to 3): Channels of the source.
        num_output_channels (`int`, defaults to 3): Channels of the target.
        seed (`int`, defaults to 0): Seed of the augmentation.

    Raises:
        ValueError: If `rows` is a stream or empty, a column is missing, a setting is outside its range or no whole
            number, `source_column` and `method` are both given, or, when a row is read, an image is missing or
            unreadable or its two images have unequal sizes.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        target_column: str,
        source_column: str | None = None,
        *,
        size: int = 256,
        jitter: int = 0,
        flip: bool = False,
        method: str | None = None,
        strength: int = 3,
        num_channels: int = 3,
        num_output_channels: int = 3,
        seed: int = 0,
    ) -> None:
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise ValueError(
                f"`rows` must be a data set that knows its length, got {type(rows).__name__}: load it without "
                "streaming, or hand in a list of its rows."
            )
        if len(rows) == 0:
            raise ValueError("`rows` must hold at least one pair, got none.")
        names = list(getattr(rows, "column_names", None) or rows[0])
        for argument, column in (("target_column", target_column), ("source_column", source_column)):
            if column is not None and column not in names:
                raise ValueError(f"`{argument}` must be one of the columns {', '.join(names)}, got {column!r}.")
        for argument, number, least in (("size", size, 1), ("jitter", jitter, 0), ("seed", seed, 0)):
            if not _is_whole(number) or number < least:
                raise ValueError(f"`{argument}` must be a whole number, at least {least}, got {number!r}.")
        for argument, count in (("num_channels", num_channels), ("num_output_channels", num_output_channels)):
            if not _is_whole(count) or count not in (1, 3):
                raise ValueError(f"`{argument}` must be 1 (grey) or 3 (RGB), got {count!r}.")
        if source_column is None:
            method = "bilateral" if method is None else method
        elif method is not None:
            raise ValueError(
                f"`source_column` and `method` must not both be given, got {source_column!r} and {method!r}: the "
                "source is either read or drawn by the cartoonizer; leave one of them out."
            )
        if method not in (*METHODS, None):
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
        if not _is_whole(strength) or not 0 <= strength <= MAX_STRENGTH:
            raise ValueError(f"`strength` must be a whole number from 0 to {MAX_STRENGTH}, got {strength!r}.")
        self.rows, self.target_column, self.source_column = rows, target_column, source_column
        self.size, self.jitter, self.flip, self.seed = size, jitter, flip, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by workers that outlive an epoch
        self.method, self.strength = method, strength
        settings = {"do_resize": True, "do_pad": False, "size": {"height": size + jitter, "width": size + jitter}}
        self.processors = [
            Pix2PixImageProcessor(
                num_channels=count, image_mean=[0.5] * count, image_std=[0.5] * count, size_divisor=1, **settings
            )
            for count in (num_channels, num_output_channels)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation the next rows get.

        Args:
            epoch (`int`): Number of the epoch, from 0.
        """
        self.epoch.fill_(epoch)

    def images(self, row: int) -> tuple[Image.Image, Image.Image]:
        """Return one pair as it stands in the data.

        Args:
            row (`int`): Number of the pair.

        Returns:
            `tuple[PIL.Image.Image, PIL.Image.Image]`: Source and target.

        Raises:
            ValueError: If a picture is missing or unreadable, or both have unequal sizes.
        """
        try:
            record = self.rows[row]
        except UNREADABLE as error:
            raise refuse_unreadable(f"Row {row}", error, _THEN) from error
        target = _as_image(record[self.target_column], row, self.target_column)
        if self.source_column is None:
            return cartoonize(target, method=self.method, strength=self.strength), target
        source = _as_image(record[self.source_column], row, self.source_column)
        if source.size != target.size:
            sizes = " and ".join(f"{image.width}x{image.height}" for image in (source, target))
            raise ValueError(
                f"Row {row}: both images of a pair must have one size, got {sizes} pixels in "
                f"{self.source_column!r} and {self.target_column!r}; where they show the same, resize one to the size "
                "of the other before (`size` scales both alike and aligns nothing)."
            )
        return source, target

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """Return `pixel_values` and `labels` of shape `(channels, size, size)`."""
        row = range(len(self))[int(row)]  # counted from the end where it is negative
        pair = [
            processor(image, return_tensors="pt")["pixel_values"][0]
            for processor, image in zip(self.processors, self.images(row))
        ]
        random = np.random.default_rng([self.seed, int(self.epoch), row])
        top, left = random.integers(0, self.jitter + 1, 2)
        mirrored = self.flip and random.random() < 0.5
        pair = [pixels[:, top : top + self.size, left : left + self.size] for pixels in pair]
        pair = [(pixels.flip(-1) if mirrored else pixels).contiguous() for pixels in pair]
        return {"pixel_values": pair[0], "labels": pair[1]}


def check_first_row(name: str, data: Any, config: Pix2PixConfig) -> tuple[int, ...]:
    """Refuse data that a generator cannot be trained on, as far as the first row tells.

    Args:
        name (`str`): What the data set is called in the error.
        data (`Dataset`): Its rows; streams, which cannot be asked for a row, are not looked at.
        config ([`Pix2PixConfig`]): The generator's configuration.

    Returns:
        `tuple[int, ...]`: Height and width of its images in pixels; empty where the row does not tell.

    Raises:
        ValueError: If the row lacks an image, or an image has not the channels and size that the generator takes.
    """
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or len(data) == 0:
        return ()
    row = data[0]
    found = list(row) if isinstance(row, Mapping) else [f"a {type(row).__name__}"]
    if not {"pixel_values", "labels"} <= set(found):
        raise ValueError(
            f"Rows of `{name}` must hold `pixel_values` and `labels`, got {', '.join(found)}; make them of columns of "
            "images by ImagePairs(rows, target_column=..., source_column=...)."
        )
    for key, channels in (("pixel_values", config.num_channels), ("labels", config.num_output_channels)):
        shape = tuple(getattr(row[key], "shape", ()))
        if not isinstance(row[key], (torch.Tensor, np.ndarray, list)):
            raise ValueError(
                f"`{key}` of `{name}` must be a tensor in [-1, 1], got {type(row[key]).__name__}; ImagePairs makes "
                "tensors of images."
            )
        if len(shape) == 3 and shape[0] != channels:
            raise ValueError(
                f"`{key}` of `{name}` must have the shape ({channels}, height, width), got {shape}; set "
                "`num_channels` and `num_output_channels` alike in ImagePairs and Pix2PixConfig."
            )
        values = torch.as_tensor(row[key]) if shape else None
        if values is not None and (not values.is_floating_point() or (values.numel() and values.abs().max() > 1.01)):
            found = f"{values.dtype} from {values.min().item():g} to {values.max().item():g}"
            raise ValueError(
                f"`{key}` of `{name}` must be floating point in [-1, 1], got {found}; ImagePairs makes such tensors "
                "of images."
            )
        if len(shape) == 3 and any(side % config.size_divisor for side in shape[1:]):
            raise ValueError(
                f"`{key}` of `{name}` must have a height and width divisible by {config.size_divisor} for this "
                f"generator, got {shape[1]}x{shape[2]}; set `size={config.image_size}` in ImagePairs."
            )
    return shape[1:] if len(shape) == 3 else ()


class PictureFolder(Sequence):
    """A folder of pictures as rows with the one column `image`, read when asked for: what a cartoonizer needs.

    Files whose header cannot be read as a picture are left out, in one warning that names the first of them. A picture
    that is damaged further on, such as one that was copied in part, shows only when its row is read. A slice is a
    folder of the chosen files.

    Args:
        folder (`str` or `os.PathLike`): Folder of pictures; its subfolders and hidden files are not read.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no picture.
        NotADirectoryError: If `folder` is a file.
        ValueError: If none of the pictures can be read, or, when a row is read, if its picture is damaged.
    """

    column_names: tuple[str, ...] = ("image",)

    def __init__(self, folder: str | os.PathLike) -> None:
        self._sizes = _read_sizes(Path(folder))
        self.files = list(self._sizes)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int | slice) -> "dict[str, Image.Image] | PictureFolder":
        if isinstance(row, slice):
            part = copy.copy(self)
            part.files = self.files[row]
            return part
        return {"image": read_picture(self.files[row])}


class SideBySideFolder(PictureFolder):
    """A folder of pictures that hold both images of a pair side by side (A|B), read when asked for.

    Files whose header cannot be read are left out, as in [`PictureFolder`].

    Args:
        folder (`str` or `os.PathLike`): Folder of pictures; its subfolders and hidden files are not read.
        source (`str`, defaults to `"left"`): Half that holds the source: `"left"` or `"right"`.
        any_shape (`bool`, defaults to `False`): Take pictures of any shape, for pairs that are no squares. Without it
            all must be about twice as wide as high, so that a folder of photographs is not cut in halves.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no picture.
        NotADirectoryError: If `folder` is a file.
        ValueError: If `source` is neither half, none of the pictures can be read, or one has not the shape of a pair.
            Shapes are read from the headers of the files alone. When a row is read, if its picture is damaged.
    """

    column_names = ("source", "target")

    def __init__(self, folder: str | os.PathLike, source: str = "left", *, any_shape: bool = False) -> None:
        if source not in ("left", "right"):
            raise ValueError(f'`source` must be "left" or "right", got {source!r}.')
        super().__init__(folder)
        self.source = source
        for path, (width, height) in self._sizes.items():
            _check_shape(path, width, height, any_shape)

    def __getitem__(self, row: int | slice) -> "dict[str, Image.Image] | PictureFolder":
        if isinstance(row, slice):
            return super().__getitem__(row)
        picture = read_picture(self.files[row])
        half = picture.width // 2
        left, right = picture.crop((0, 0, half, picture.height)), picture.crop((half, 0, 2 * half, picture.height))
        pair = (left, right) if self.source == "left" else (right, left)
        return {"source": pair[0], "target": pair[1]}


def _read_sizes(folder: Path) -> dict[Path, tuple[int, int]]:
    """The pictures of a folder by name, each with its width and height as it is seen, read from its header alone."""
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, not a folder; name the folder that holds it.")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; name a folder of pictures.")
    files = (path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS and not path.name.startswith("."))
    files = sorted(path for path in files if not path.is_dir())
    if not files:
        raise FileNotFoundError(f"{folder} holds no picture ({', '.join(sorted(_ENDINGS))}).")
    sizes, broken = {}, []
    for path in files:
        try:
            with Image.open(path) as picture:
                sizes[path] = picture.size
                header = picture.format != "PNG" or "exif" in picture.info  # else Pillow reads all of a PNG for it
                if header and picture.getexif().get(ExifTags.Base.Orientation, 1) > 4:
                    sizes[path] = picture.size[::-1]
        except UNREADABLE:
            sizes.pop(path, None)
            broken.append(path.name)
    names = ", ".join([*broken[:3], *([f"{len(broken) - 3} more"] if len(broken) > 3 else [])])
    if not sizes:
        raise ValueError(f"None of {len(files)} pictures of {folder} can be read: {names}.")
    if broken:  # once for the folder: each split of a data set may open it
        count = f"{len(broken)} of {len(files)}"
        logger.warning_once(f"Left out {count} pictures of {folder}, which cannot be read: {names}")
    return sizes


def _check_shape(path: Path, width: int, height: int, any_shape: bool) -> None:
    """Refuse a picture that cannot hold two images side by side."""
    low, high = (0, math.inf) if any_shape else _SIDE_BY_SIDE
    if width % 2 or not low <= width / height <= high:
        shape = "of even width" if any_shape else "about twice as wide as high, of even width"
        other = "" if any_shape else ", for pairs that are no squares set `any_shape=True`"
        raise ValueError(
            f"{path} is {width}x{height} pixels, but two images side by side make a picture {shape}: for photographs "
            f"alone name a cartoonizer (`method`) and read them with PictureFolder{other}."
        )


def _is_whole(number: Any) -> bool:
    """Whether a number is a whole one, also of NumPy; True and 2.0 are none."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def _as_image(value: Any, row: int, column: str) -> Image.Image:
    try:
        if isinstance(value, np.ndarray):
            return to_rgb(value)
        if isinstance(value, Image.Image):
            return ImageOps.exif_transpose(value)  # reads it, where it was only opened
    except UNREADABLE as error:
        raise refuse_unreadable(f"Row {row}: the column {column!r}", error, _THEN) from error
    raise ValueError(f"Row {row}: the column {column!r} must hold images, got {type(value).__name__}.")
