"""CIFAR-10 in memory for `kdfs_prune_cifar.py`: batches are cut, flipped, shifted and normalised at once."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from hf_efficient.metrics import load_metric


LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_OUT = 5_000  # last training rows, for choosing recipes


class Images(Dataset):
    """Images as bytes; a batch is fetched in one call and comes out as `pixel_values` and `labels`.

    Args:
        images (`torch.ByteTensor` of shape `(count, 3, height, width)`): RGB.
        labels (`torch.LongTensor` of shape `(count,)`): Classes.
        augment (`bool`, *optional*, defaults to `False`): Flip at random, shift by up to four pixels.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, augment: bool = False) -> None:
        self.images, self.labels, self.augment = images, labels, augment
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = self.__getitems__([index])
        return {name: value[0] for name, value in batch.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        images = (self.images[indices].float() / 255 - self.mean) / self.std
        if self.augment:
            images = flip_and_shift(images)
        return {"pixel_values": images, "labels": self.labels[indices]}


def flip_and_shift(images: torch.Tensor, pad: int = 4) -> torch.Tensor:
    """The usual CIFAR augmentation for a whole batch."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, count, 1))
    columns = torch.arange(width)[None]
    columns = torch.where(torch.rand(count, 1) < 0.5, columns, width - 1 - columns) + left
    rows = torch.arange(height)[None] + top
    index = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def collate(batch: dict[str, torch.Tensor] | list) -> dict[str, torch.Tensor]:
    """`Images` fetches whole batches, so there is nothing left to stack."""
    if isinstance(batch, dict):
        return batch
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


def read_parquet(file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels of one split; columns `image` (bytes) and `label`."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(file)
    pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"].to_pylist()]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()  # (count, 3, height, width)
    return images, torch.tensor(table["label"].to_pylist())


def toy_split(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with one bright quarter, for smoke runs."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (count, 3, 32, 32), generator=generator)
    labels = torch.arange(count) % 4
    for image, label in zip(images, labels.tolist()):
        image[:, label // 2 * 16 : label // 2 * 16 + 16, label % 2 * 16 : label % 2 * 16 + 16] += 100
    return images.to(torch.uint8), labels


def load_data(folder: Path | None, final: bool, smoke: bool) -> tuple[Images, Images]:
    """Training and evaluation images.

    Recipes are chosen without the test set: train on all but the last 5,000 training rows, evaluate on those. A final
    run trains on all rows and is evaluated on the test set.
    """
    if smoke:
        return Images(*toy_split(96, 0), augment=True), Images(*toy_split(64, 1))
    images, labels = read_parquet(folder / "train.parquet")
    if final:
        return Images(images, labels, augment=True), Images(*read_parquet(folder / "test.parquet"))
    return (
        Images(images[:-HELD_OUT], labels[:-HELD_OUT], augment=True),
        Images(images[-HELD_OUT:], labels[-HELD_OUT:]),
    )


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Images, batch_size: int = 500) -> float:
    """Share of right answers, in evaluation mode."""
    model.eval()
    metric = load_metric("accuracy")
    for start in range(0, len(data), batch_size):
        batch = data.__getitems__(list(range(start, min(start + batch_size, len(data)))))
        answers = model(batch["pixel_values"]).logits.argmax(dim=1)
        metric.add_batch(predictions=answers, references=batch["labels"])
    return metric.compute()["accuracy"]
