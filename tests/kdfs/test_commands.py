"""`hf-efficient prune` on a folder of images: checkpoint, table, picture; one sentence on wrong input."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hf_efficient import CifarResNetConfig, CifarResNetForImageClassification
from hf_efficient.cli import main
from hf_efficient.kdfs.commands_kdfs import ImageCollator


@pytest.fixture
def material(tmp_path):
    """A saved network with its processor, and a folder with one folder of images per class."""
    model = tmp_path / "model"
    CifarResNetForImageClassification(
        CifarResNetConfig(depth=8, hidden_sizes=[8, 8, 16], num_labels=3)
    ).save_pretrained(model)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(model)
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for label in ("a", "b", "c"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return model, tmp_path / "images"


def run(material, tmp_path, *more):
    model, images = material
    arguments = ["--model", str(model), "--dataset", str(images), "--output", str(tmp_path / "out")]
    return main(["prune", *arguments, "--max-steps", "2", "--batch-size", "8", *more])


def test_prune(material, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report_file = tmp_path / "report.json"
    more = ["--target-flops-reduction", "0.4", "--json", str(report_file)]
    assert run(material, tmp_path, *more) == 0
    report = json.loads(report_file.read_text())
    assert abs(report["flops"]["reduction"] - 0.4) < 0.01
    assert report["accuracy"]["images"] == 6
    text = capsys.readouterr().out
    for layer in report["layers"]:
        line = next(line for line in text.splitlines() if line.startswith(layer["name"] + " "))
        assert line.split()[1:3] == [str(layer["before"]), str(layer["after"])]
    out = tmp_path / "out"
    assert Image.open(out / "widths.png").size[0] > 100
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "kdfs_config.json"} <= {
        path.name for path in out.iterdir()
    }
    AutoModelForImageClassification.from_pretrained(out)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target-flops-reduction", "0.99"], "must be at most 0."),
        (["--target-flops-reduction", "1.5"], "must be a number in (0, 1), but is 1.5"),
        (["--label-column", "kind"], "--label-column"),
        (["--train-split", "learn"], "--train-split learn is not in the dataset; it has"),
    ],
)
def test_wrong_input_is_one_sentence(material, tmp_path, capsys, more, message):
    assert run(material, tmp_path, *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-efficient prune: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_augmentation_moves_pixels_and_keeps_labels():
    import torch

    rows = [{"pixel_values": torch.arange(3 * 16 * 16.0).view(3, 16, 16), "labels": index} for index in range(8)]
    plain, moved = ImageCollator(augment=False)(rows), ImageCollator()(rows)
    assert torch.equal(plain["pixel_values"][3], rows[3]["pixel_values"])
    assert not torch.equal(moved["pixel_values"], plain["pixel_values"])
    assert torch.equal(moved["labels"], torch.arange(8))
    assert set(moved["pixel_values"].unique().tolist()) <= set(range(3 * 16 * 16))
