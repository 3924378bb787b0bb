"""Pictures with classes from the Hub or the disk, as rows and batches for `hf-efficient prune`."""

import argparse
import os
import re
from pathlib import Path
from typing import Any


SPLIT_FOLDERS = ("train", "training", "test", "testing", "eval", "evaluation", "valid", "validation", "val", "dev")


def load_images(arguments: argparse.Namespace, processor: Any, config: Any) -> tuple[Any, Any]:
    """Training and evaluation rows that turn into `pixel_values` and `labels` when they are read.

    Args:
        arguments (`argparse.Namespace`): Of `hf-efficient prune`.
        processor (`Any`): Image processor of the model.
        config (`PreTrainedConfig`): Of the model; names its labels.

    Returns:
        `tuple`: Two datasets, the second `None` where there is no split to evaluate on.

    Raises:
        ValueError: If there is no such dataset, or its pictures or labels are none of the model.
    """
    from datasets import Image, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    path = Path(arguments.dataset)
    quiet = getattr(arguments, "quiet", False) and not are_progress_bars_disabled()
    try:
        if quiet:
            disable_progress_bars()
        data = _read(path, arguments)
    except Exception as error:  # datasets and pyarrow have many
        where = "could not be read" if path.exists() else "is no file or folder here and no Hub id that could be read"
        reason = first_sentence(error, arguments.dataset)
        raise ValueError(
            f"--dataset {arguments.dataset} {where} ({reason}); name a folder with a folder of images per class, or "
            "parquet files."
        ) from error
    finally:
        if quiet:
            enable_progress_bars()
    if arguments.train_split not in data:
        raise ValueError(f"--train-split {arguments.train_split} is not in the dataset; it has {', '.join(data)}.")
    features = data[arguments.train_split].features
    image = arguments.image_column or next((name for name, kind in features.items() if isinstance(kind, Image)), None)
    if image is None:  # bytes of pictures, written by another tool than datasets
        image = next((name for name in ("image", "img", "picture") if _holds_bytes(features.get(name))), None)
    label = arguments.label_column or next(
        (name for name in ("labels", "label", "fine_label", "class") if name in features), None
    )
    if label is None and list(features) == ["image"] and path.is_dir():
        raise ValueError(_no_classes(arguments.dataset))
    for option, name in (("--image-column", image), ("--label-column", label)):
        if name not in features:
            raise ValueError(
                f"--dataset {arguments.dataset} must have a column of images and one of labels, but has "
                f"{', '.join(features)}; name it with {option}."
            )
    if not isinstance(features[image], Image) and not _holds_bytes(features[image]):
        kind = getattr(features[image], "dtype", None) or type(features[image]).__name__.lower()
        raise ValueError(
            f"--image-column {image} must hold pictures or the bytes of their files, but holds values of the type "
            f"{kind}; name another column, or save the dataset with its pictures."
        )
    data = data.cast_column(image, Image(decode=False))  # decoded below, where a broken one can be named
    held_out = arguments.eval_split or next((name for name in ("test", "validation", "val") if name in data), None)
    if held_out is not None and held_out not in data:
        raise ValueError(f"--eval-split {held_out} is not in the dataset; it has {', '.join(data)}.")
    number = _label_numbers(arguments, data[arguments.train_split], label, config)
    if held_out is not None:  # what is wrong there would else show after the training
        _label_numbers(arguments, data[held_out], label, config)

    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"

    def prepare(rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [_decode(arguments, picture).convert(mode) for picture in rows[image]]
        labels = [number(value) for value in rows[label]]
        return {"pixel_values": _process(processor, images), "labels": labels}

    test = data[held_out].with_transform(prepare) if held_out else None
    if test:
        test[0]  # likewise
    return data[arguments.train_split].with_transform(prepare), test


def _read(path: Path, arguments: argparse.Namespace) -> Any:
    """The dataset by splits."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    if (path / "dataset_dict.json").is_file():
        return load_from_disk(str(path))
    if (path / "state.json").is_file():
        return DatasetDict({arguments.train_split: load_from_disk(str(path))})
    if path.is_file():
        return load_dataset("parquet", data_files={arguments.train_split: str(path)})
    if _holds_shards(path):
        return load_dataset("parquet", data_dir=str(path))
    if path.is_dir() and not _is_image_folder(path):
        return load_dataset("parquet", data_files={file.stem: str(file) for file in sorted(path.glob("*.parquet"))})
    if path.is_dir():
        return load_dataset("imagefolder", data_dir=str(path))
    return load_dataset(arguments.dataset)


def _holds_shards(path: Path) -> bool:
    """Whether parquet files lie there as the Hub holds them, mostly in a folder such as data."""
    return path.is_dir() and any((*path.glob("*-of-*.parquet"), *path.glob("*/*-of-*.parquet")))


def _is_image_folder(path: Path) -> bool:
    files = (*path.glob("*.parquet"), *path.glob("*.arrow"), *path.glob("dataset_dict.json"))
    return path.is_dir() and not files and not _holds_shards(path)


def _no_classes(dataset: str) -> str:
    """What is wrong with a folder of pictures in which `datasets` found no classes."""
    from PIL import Image

    endings, classes, stray = Image.registered_extensions(), set(), None
    for file in sorted(file for file in Path(dataset).rglob("*") if file.suffix.lower() in endings):
        folders = file.relative_to(dataset).parts[:-1]
        folders = folders[1:] if folders and folders[0] in SPLIT_FOLDERS else folders
        classes.update(folders[-1:])
        stray = stray or (None if folders else file)
    why = f"{stray} is in no folder of a class" if stray else "their folders lie in folders"
    why = f"all are in one folder, {min(classes)}" if len(classes) == 1 and not stray else why
    name = Path(dataset).as_posix()
    return (
        f"--dataset {dataset} is a folder of pictures without classes: {why}; put every picture into the folder of "
        f"its class, of two classes or more, as {name}/train/<class>/*.jpg and {name}/test/<class>/*.jpg."
    )


def _decode(arguments: argparse.Namespace, picture: Any) -> Any:
    """The picture of a row, or one sentence that names it."""
    from datasets import Image

    name = "unnamed"
    if isinstance(picture, dict):
        name = picture.get("path") or name
        try:
            picture = Image().decode_example(picture)
        except (OSError, ValueError, SyntaxError) as error:
            reason = "it breaks off or is no picture" if picture.get("bytes") is None else str(error).split(" <")[0]
            raise ValueError(
                f"--dataset {arguments.dataset} has a picture that cannot be read, {name} ({reason}); repair it or "
                "leave it out."
            ) from error
    if picture.mode[0] in "IF":  # Pillow cuts such values off at 255
        raise ValueError(
            f"--dataset {arguments.dataset} has a picture with more than 8 bits a channel, {name} (mode "
            f"{picture.mode}), of which only the darkest 256 levels would stay; save the pictures with 8 bits."
        )
    return picture


def _process(processor: Any, images: list[Any]) -> Any:
    """What the processor makes of pictures, or one sentence where it fails on one or makes different sizes."""
    try:
        return processor(images, return_tensors="pt")["pixel_values"]
    except (ValueError, RuntimeError):  # together; now which
        try:
            pixels = [processor(picture, return_tensors="pt")["pixel_values"][0] for picture in images]
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"The image processor beside --model fails on a picture of mode {images[0].mode} "
                f"({first_sentence(error, '')}), which the model takes; save one that fits it, with one `image_mean` "
                "and `image_std` per channel."
            ) from error
        return stack_images(pixels)


def _holds_bytes(kind: Any) -> bool:
    inner = kind.get("bytes") if isinstance(kind, dict) else kind
    return getattr(inner, "dtype", None) in ("binary", "large_binary")


def _label_numbers(arguments: argparse.Namespace, rows: Any, column: str, config: Any) -> Any:
    """How a label of the dataset becomes a label of the model: by its word where both have words, else as it is."""
    try:
        values = set(rows[column])
    except TypeError as error:  # pictures, lists
        raise ValueError(
            f"--dataset {arguments.dataset} has no classes in `{column}`, but {type(rows[0][column]).__name__}; name "
            "the column of classes with --label-column."
        ) from error
    if values == {None} and _is_image_folder(Path(arguments.dataset)):
        raise ValueError(_no_classes(arguments.dataset))
    if None in values:
        raise ValueError(
            f"--dataset {arguments.dataset}, split {rows.split}, has a row without a label in `{column}`; leave it "
            "out."
        )
    names = dict(enumerate(getattr(rows.features[column], "names", None) or ()))
    words = {word: number for number, word in config.id2label.items()}
    if names and set(names.values()) <= set(words):
        _check_range(arguments, rows, values, len(names))
        return lambda value: words[names[value]]
    known = sorted(set(names.values()) & set(words))
    if known:  # by their numbers they would be other classes of the model
        other = sorted(set(names.values()) - set(words))[0]
        raise ValueError(
            f"--dataset {arguments.dataset} has {known[0]!r}, a label of the model, and {other!r}, which is none; "
            "leave that out, or prune a model that was trained on these classes."
        )
    if any(isinstance(value, str) for value in values):
        if not values <= set(words):
            missing = sorted(values - set(words))[0]
            raise ValueError(
                f"--dataset {arguments.dataset} has classes as words in `{column}`, but the model has no label "
                f"{missing!r}; prune a model that was trained on these classes."
            )
        return lambda value: words[value]
    odd = next((value for value in values if not isinstance(value, (int, float)) or value % 1 != 0), None)
    if odd is not None:  # `int` would make some class of it
        raise ValueError(
            f"--dataset {arguments.dataset}, split {rows.split}, has {odd!r} in `{column}`, which is no number of a "
            "class; name the column of classes with --label-column."
        )
    _check_range(arguments, rows, values, config.num_labels)
    named = config.id2label.get(0) != "LABEL_0" and not any(name.isdigit() for name in names.values())
    if names and named and len(names) != config.num_labels:
        raise ValueError(
            f"--dataset {arguments.dataset} has {len(names)} classes, {names[0]!r} the first, none of which is one of "
            f"the model's {config.num_labels}, {config.id2label[0]!r} the first; name them alike, or prune a model "
            "that was trained on these classes."
        )
    if names and named:
        from transformers.utils import logging

        logging.get_logger(__name__).warning_once(
            f"No class of {arguments.dataset} is named as in the model, so they are taken in order: {names[0]!r} as "
            f"{config.id2label[0]!r}."
        )
    return int


def _check_range(arguments: argparse.Namespace, rows: Any, values: set[int], count: int) -> None:
    """Refuse labels below 0, with which datasets mark rows without one, and those that the model does not have."""
    for extreme in (max(values, default=0), min(values, default=0)):
        if not 0 <= extreme < count:
            remedy = "prune a model that was trained on these classes"
            if extreme < 0:
                remedy = "name a split in which every row has its class, by --train-split or --eval-split"
            raise ValueError(
                f"--dataset {arguments.dataset}, split {rows.split}, has label {extreme}, but the model has {count} "
                f"labels; {remedy}."
            )


class ImageCollator:
    """Stack rows into a batch; flip and shift the images of training batches.

    Args:
        augment (`bool`, *optional*, defaults to `True`): Flip every second image and shift all by up to an eighth.
    """

    def __init__(self, augment: bool = True) -> None:
        self.augment = augment

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            rows (`list[dict]`): With `pixel_values` and `labels`.

        Returns:
            `dict`: `pixel_values` of shape `(batch, channels, height, width)` and `labels` of shape `(batch,)`.
        """
        import torch

        images = stack_images([torch.as_tensor(row["pixel_values"]) for row in rows])
        labels = torch.tensor([int(row["labels"]) for row in rows])
        return {"pixel_values": shift_and_flip(images) if self.augment else images, "labels": labels}


def stack_images(images: list[Any]) -> Any:
    """Make a batch of images.

    Args:
        images (`list[torch.FloatTensor]`): Each of shape `(channels, height, width)`.

    Returns:
        `torch.FloatTensor` of shape `(batch, channels, height, width)`.

    Raises:
        ValueError: If they differ in shape.
    """
    import torch

    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise ValueError(
            f"All images must have one shape, but the processor of the model makes {shapes[0]} of one picture and "
            f"{shapes[-1]} of another; set a `size` with height and width, or `do_center_crop`, in its "
            "preprocessor_config.json."
        )
    return torch.stack(images)


def shift_and_flip(images: Any) -> Any:
    """Flip half of the images and shift each by up to an eighth of its size, reflecting at the border.

    Args:
        images (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Images.

    Returns:
        `torch.FloatTensor` of the same shape.
    """
    import torch

    batch, _, height, width = images.shape
    down, right = height // 8, width // 8
    padded = torch.nn.functional.pad(images, (right, right, down, down), mode="reflect")
    top = torch.randint(0, 2 * down + 1, (batch, 1))
    left = torch.randint(0, 2 * right + 1, (batch, 1))
    columns = torch.arange(width)[None, :]
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns, width - 1 - columns) + left  # (batch, width)
    rows = torch.arange(height)[None, :] + top  # (batch, height)
    index = torch.arange(batch)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def first_sentence(error: Exception, name: str) -> str:
    """The first sentence of what a library says; a dot within the name of what it read does not end it.

    Args:
        error (`Exception`): What it raised.
        name (`str`): What it read.

    Returns:
        `str`: Without its dot.
    """
    line = (str(error).strip() or type(error).__name__).split("\n")[0]
    forms = "|".join(re.escape(form) for form in (os.path.abspath(name), name))
    spans = [match.span() for match in re.finditer(rf"(?<![\w./-])(?:{forms})(?![\w/-])", line)]
    for end in (match.start() for match in re.finditer(r"\.(?= |$)", line)):
        if not any(start <= end < stop for start, stop in spans):
            return line[:end]
    return line
