"""The part of `hf-efficient quickstart`: runs on a checkpoint, writes its picture, says what is missing."""

import pytest
from PIL import Image

from hf_efficient import Pix2PixConfig, Pix2PixModel
from hf_efficient.pix2pix import quickstart_pix2pix


def test_the_part_translates_the_embedded_photographs(tmp_path):
    model = Pix2PixModel(Pix2PixConfig(num_levels=3, base_channels=4, image_size=32))
    model.save_pretrained(tmp_path / quickstart_pix2pix.CHECKPOINT)
    part = quickstart_pix2pix.run(tmp_path, tmp_path)
    assert [row[0] for row in part["table"]["rows"]] == list(quickstart_pix2pix.PHOTOS)
    assert all(len(row) == len(part["table"]["columns"]) for row in part["table"]["rows"])
    _, cartoon, translated = part["summary"][0]
    assert cartoon > translated  # an untrained network is worse than the cartoon itself
    picture = Image.open(tmp_path / part["pictures"][0]["file"])
    assert picture.width > 3 * 32


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="pix2pix-cartoon2photo is missing"):
        quickstart_pix2pix.run(tmp_path, tmp_path)
