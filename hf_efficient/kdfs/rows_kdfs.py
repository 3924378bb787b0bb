"""What rows and batches must be that a classifier is to be trained on, each fault in one sentence."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset


def first_image(dataset: Any) -> Tensor:
    """The first image of a dataset, which must be labelled.

    Args:
        dataset (`Any`): Yields mappings with `pixel_values` and `labels`.

    Returns:
        `torch.FloatTensor` of shape `(channels, height, width)`.

    Raises:
        ValueError: If there is no dataset, its rows lack `pixel_values` or `labels`, or the image is none.
    """
    if dataset is None:
        raise ValueError("`train_dataset` must yield `pixel_values` and `labels`, but is None; hand in a dataset.")
    if isinstance(dataset, Iterator) and not isinstance(dataset, Dataset):  # those of torch may start anew
        raise ValueError(
            f"`train_dataset` must be read more than once, but a {type(dataset).__name__} is empty after that; make a "
            "list of it, or an IterableDataset."
        )
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError("`train_dataset` must have rows, but is empty; hand in a dataset with images.")
    if not isinstance(row, Mapping):
        raise ValueError(
            f"`train_dataset` must yield mappings with `pixel_values` and `labels`, but yields a "
            f"{type(row).__name__}; wrap it in a dataset that names them."
        )
    for name in ("pixel_values", "labels"):
        if name not in row and not (name == "labels" and "label" in row):  # the default collator renames it
            raise ValueError(
                f"`train_dataset` must yield `pixel_values` and `labels`, but its rows hold {sorted(row)}; "
                f"rename or add the column `{name}`."
            )
    image = row["pixel_values"]
    try:
        image = torch.as_tensor(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`pixel_values` must be a tensor, but are a {type(image).__name__}; an image processor makes one of a "
            "picture."
        ) from error
    if image.dim() != 3:
        raise ValueError(
            f"`pixel_values` of a row must have the axes (channels, height, width), but have the shape "
            f"{tuple(image.shape)}; take the first of what an image processor returns."
        )
    return image


def makes_images(dataset: Any) -> bool:
    """Whether a dataset makes its images of other columns when it is read.

    Args:
        dataset (`Any`): One of `datasets` with a transform, or any other.

    Returns:
        `bool`: Then a Trainer must leave its columns alone.
    """
    is_table = isinstance(dataset, datasets.Dataset)
    return is_table and dataset.format["type"] == "custom" and "pixel_values" not in dataset.column_names


def check_columns(dataset: Any, name: str, remove_unused_columns: bool) -> None:
    """Refuse a dataset whose images are made of columns that a Trainer takes away before it reads them.

    Args:
        dataset (`Any`): One of `datasets` with a transform, or any other.
        name (`str`): The argument that it is.
        remove_unused_columns (`bool`): Of the training arguments.

    Raises:
        ValueError: If the columns would be taken away.
    """
    if remove_unused_columns and makes_images(dataset):
        raise ValueError(
            f"`args` must have `remove_unused_columns=False`, since `{name}` makes `pixel_values` of the columns "
            f"{', '.join(dataset.column_names)} when it is read, which a Trainer takes away before; set it."
        )


@contextmanager
def batch_is_sound() -> Iterator[None]:
    """Say what is wrong with a batch that no classifier can be trained on; a GPU reports labels later and otherwise.

    Raises:
        ValueError: If there are no labels, the cross entropy inside finds one that is none, or a normalisation has
            one value alone.
    """
    try:
        yield
    except (LookupError, RuntimeError, ValueError) as error:
        reason = str(error)
        if isinstance(error, KeyError) and error.args == ("labels",):
            raise ValueError(
                "`labels` must be whole numbers, one class per image, but a batch has none; where they are words, a "
                "collator leaves them out: replace them by the numbers of `config.label2id`."
            ) from error
        if isinstance(error, IndexError) and "Target" in reason:
            raise ValueError(
                f"`labels` must be numbers of the model's classes, but one row is none of them ({reason}); leave it "
                "out, or take a model that was trained on these classes."
            ) from error
        if any(words in reason for words in ("target dtype", "scalar type Long", "multi-target")):
            raise ValueError(
                f"`labels` must be whole numbers of the type int64, one class per image, but are not ({reason}); make "
                "each an int."
            ) from error
        if "more than 1 value per channel" in reason:
            raise ValueError(
                "Every batch must have two images or more, since the network normalises maps of one pixel, but one "
                "has a single image; set `dataloader_drop_last=True`, or another `batch_size`."
            ) from error
        raise
