"""What a trainer takes beside a generator and one data set of known length: several data sets, streams, tuples."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset
from transformers import ViTConfig, ViTModel

from hf_efficient import Pix2PixDiscriminator, Pix2PixModel, Pix2PixTrainer, Pix2PixTrainingArguments
from hf_efficient.pix2pix.figures_pix2pix import to_picture
from hf_efficient.pix2pix.pairs_pix2pix import ImagePairs


def pairs(count: int) -> list[dict[str, torch.Tensor]]:
    noise = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(count)) * 2 - 1
    return [{"pixel_values": image, "labels": -image} for image in noise]


class Rows(Dataset):
    def __init__(self, count: int) -> None:
        self.rows = pairs(count)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.rows[row]


class Stream(IterableDataset):
    def __init__(self, count: int) -> None:
        self.rows = pairs(count)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from self.rows


@pytest.fixture
def make(tmp_path: Path, tiny_model: Pix2PixModel):
    """`make(train, evaluation, **settings)` builds a trainer of two steps."""

    def build(train, evaluation=None, **settings) -> Pix2PixTrainer:
        args = Pix2PixTrainingArguments(
            output_dir=str(tmp_path), max_steps=2, save_strategy="no", report_to=[], use_cpu=True, **settings
        )
        discriminator = Pix2PixDiscriminator(16, base_channels=4)
        return Pix2PixTrainer(tiny_model, args, discriminator, train_dataset=train, eval_dataset=evaluation)

    return build


@pytest.mark.parametrize("kind", ["one", "several", "stream", "training stream"])
def test_a_preview_shows_the_first_pairs_of_any_data(make, tmp_path, kind):
    data = {"one": Rows(3), "several": {"a": Rows(3), "b": Rows(1)}, "stream": Stream(3), "training stream": None}
    train = Stream(3) if kind == "training stream" else Rows(5)
    make(train, data[kind], preview_steps=2, preview_count=4).train()
    (file,) = (tmp_path / "previews").iterdir()
    sheet = np.asarray(Image.open(file))
    assert sheet.shape == (18 + 4 + 3 * (16 + 4), 4 + 3 * (16 + 4), 3)  # a row for each of three pairs
    for row, pair in enumerate(pairs(3)):
        top = 18 + 4 + row * (16 + 4)
        assert np.array_equal(sheet[top : top + 16, 4:20], to_picture(pair["pixel_values"].numpy()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_generator_that_returns_tuples_is_trained_and_measured(make, tiny_model, accumulate):
    tiny_model.config.return_dict = False  # as for an export to ONNX
    run = make(Rows(4), Rows(2), preview_steps=1, gradient_accumulation_steps=accumulate)
    before = tiny_model.network.up[0].weight.clone()
    run.train()
    assert not torch.equal(tiny_model.network.up[0].weight, before)
    assert {"eval_loss", "eval_psnr"} <= run.evaluate().keys()


def test_another_model_is_named(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    args = Pix2PixTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for model, name in ((ViTModel(ViTConfig(**sizes)), "ViTModel"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"`model` must be a Pix2PixModel, got {name}"):
            Pix2PixTrainer(model, args)


def augmented(picture) -> ImagePairs:
    rows = [{"image": picture(20, side)} for side in (20, 24, 28, 32)]
    return ImagePairs(rows, "image", size=16, jitter=4, flip=True, method="palette")


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, [0, 1]), lambda data: data + data])
def test_every_epoch_sees_other_crops_of_wrapped_data_too(make, picture, wrap):
    pairs = augmented(picture)
    epochs = []
    pairs.set_epoch = lambda epoch: epochs.append(epoch) or pairs.epoch.fill_(epoch)
    run = make(wrap(pairs), per_device_train_batch_size=1)
    run.args.max_steps, run.args.num_train_epochs = -1, 3
    run.train()
    assert {0, 1, 2} <= set(epochs)


def test_an_evaluation_on_the_training_data_leaves_its_epoch(make, picture):
    pairs = augmented(picture)
    run = make(ConcatDataset([pairs]), pairs)
    pairs.set_epoch(5)
    run.evaluate()
    assert int(pairs.epoch) == 5


def test_an_evaluation_that_broke_off_is_not_in_the_next_figure(make):
    class Breaks(Rows):
        def __getitem__(self, row):
            if row == 3:
                raise ValueError("damaged")
            return super().__getitem__(row)

    run = make(Rows(2), Rows(2), per_device_eval_batch_size=1)
    expected = run.evaluate()["eval_psnr"]
    with pytest.raises(ValueError, match="damaged"):
        run.evaluate(Breaks(4))
    assert run.evaluate()["eval_psnr"] == expected


@pytest.mark.parametrize(("scale", "found"), [(255.0, "torch.float32 from"), (None, "torch.uint8 from 0 to")])
def test_rows_of_another_range_are_refused(make, scale, found):
    rows = [
        {name: (image.abs() * 255).byte() if scale is None else image * scale for name, image in row.items()}
        for row in pairs(2)
    ]
    with pytest.raises(ValueError, match=rf"`train_dataset` must be floating point in \[-1, 1\], got {found}"):
        make(rows)
