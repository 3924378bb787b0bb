"""Pairs from two columns, from one column and a cartoonizer, and from a folder of A|B pictures."""

import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_efficient import cartoonize
from hf_efficient.pix2pix.figures_pix2pix import sample_sheet, save_picture
from hf_efficient.pix2pix.pairs_pix2pix import ImagePairs, PictureFolder, SideBySideFolder


def pixels(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def test_two_columns_of_a_data_set(picture):
    table = datasets.Dataset.from_dict({"labels": [picture(16, 16)], "photo": [picture(17, 17).resize((16, 16))]})
    pair = ImagePairs(table, "photo", "labels", size=16)[0]
    torch.testing.assert_close(pair["pixel_values"], pixels(table[0]["labels"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(pair["labels"], pixels(table[0]["photo"]), atol=1e-6, rtol=0)


def test_one_column_and_a_cartoonizer(picture):
    pairs = ImagePairs([{"photo": picture(32, 32)}], "photo", size=32, method="palette", strength=5)
    pair = pairs[0]
    torch.testing.assert_close(pair["labels"], pixels(picture(32, 32)), atol=1e-6, rtol=0)
    cartoon = cartoonize(picture(32, 32), method="palette", strength=5)
    torch.testing.assert_close(pair["pixel_values"], pixels(cartoon), atol=1e-6, rtol=0)


@pytest.mark.parametrize("source", ["left", "right"])
def test_a_folder_of_pictures_side_by_side(tmp_path, picture, source):
    for number in range(2):
        both = Image.new("RGB", (32, 16))
        both.paste(picture(16, 16), (0, 0))
        both.paste(picture(17, 17).resize((16, 16)), (16, 0))
        both.save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    rows = SideBySideFolder(tmp_path, source)
    assert len(rows) == 2
    pair = ImagePairs(rows, "target", "source", size=16)[1]
    left, right = pixels(picture(16, 16)), pixels(picture(17, 17).resize((16, 16)))
    expected = (left, right) if source == "left" else (right, left)
    torch.testing.assert_close((pair["pixel_values"], pair["labels"]), expected, atol=1e-6, rtol=0)


def test_both_images_are_augmented_alike_and_again_alike(picture):
    rows = [{"photo": picture(40, 40), "same": picture(40, 40)}]
    pairs = ImagePairs(rows, "photo", "same", size=32, jitter=8, flip=True, seed=1)
    views = []
    for epoch in range(12):
        pairs.set_epoch(epoch)
        pair = pairs[0]
        assert pair["labels"].shape == (3, 32, 32)
        assert torch.equal(pair["pixel_values"], pair["labels"])
        assert torch.equal(pairs[0]["labels"], pair["labels"])
        views.append(pair["labels"])
    assert len({view.numpy().tobytes() for view in views}) > 8
    other = ImagePairs(rows, "photo", "same", size=32, jitter=8, flip=True, seed=2)
    assert any(not torch.equal(other[0]["labels"], view) for view in views[:1])


def test_workers_that_outlive_an_epoch_learn_of_the_next(picture):
    pairs = ImagePairs([{"photo": picture(40, 40)}], "photo", "photo", size=32, jitter=8, flip=True)
    loader = DataLoader(pairs, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in range(3):
        pairs.set_epoch(epoch)
        (pair,) = list(loader)
        assert torch.equal(pair["labels"], pairs[0]["labels"]), epoch


def test_grey_sources(picture):
    pair = ImagePairs([{"photo": picture(8, 8)}], "photo", size=8, strength=0, num_channels=1)[0]
    assert (pair["pixel_values"].shape, pair["labels"].shape) == ((1, 8, 8), (3, 8, 8))


def turned(image: Image.Image, path) -> Image.Image:
    """The picture as a turned camera stores it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(path, exif=exif)
    return Image.open(path)


def test_turned_pictures_stand_upright_before_they_are_compared_and_halved(tmp_path, picture):
    upright, other = picture(20, 16), picture(20, 17).resize((16, 20))
    rows = [{"a": turned(upright, tmp_path / "a.png"), "b": other}]
    source, target = ImagePairs(rows, "b", "a").images(0)
    assert np.array_equal(source, upright)
    assert np.array_equal(target, other)
    both = Image.new("RGB", (32, 20))
    both.paste(upright, (0, 0))
    both.paste(other, (16, 0))
    folder = tmp_path / "pairs"
    folder.mkdir()
    turned(both, folder / "0.png")
    pair = SideBySideFolder(folder, any_shape=True)[0]
    assert np.array_equal(pair["source"], upright)
    assert np.array_equal(pair["target"], other)


def test_arrays_are_images_too(picture):
    pairs = ImagePairs([{"a": np.asarray(picture(8, 8)) / 255, "b": np.asarray(picture(8, 8))}], "b", "a", size=8)
    torch.testing.assert_close(pairs[0]["pixel_values"], pairs[0]["labels"], atol=1e-6, rtol=0)


def test_photographs_are_not_cut_in_halves(tmp_path, picture):
    picture(16, 32).save(tmp_path / "0.png")
    turned(picture(16, 32), tmp_path / "1.png")
    assert len(SideBySideFolder(tmp_path)) == 2
    turned(picture(32, 16), tmp_path / "2.png")  # stored as 32x16
    with pytest.raises(
        ValueError, match=r"2\.png is 16x32 pixels, .* twice as wide as high.*\(`method`\).*PictureFolder"
    ):
        SideBySideFolder(tmp_path)
    picture(18, 32).save(tmp_path / "2.png")  # 16:9
    with pytest.raises(ValueError, match=r"2\.png is 32x18 pixels"):
        SideBySideFolder(tmp_path)
    assert SideBySideFolder(tmp_path, any_shape=True)[2]["target"].size == (16, 18)


def test_the_shape_is_read_from_the_header_alone(tmp_path, picture):
    picture(200, 400).save(tmp_path / "0.png")
    data = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(data[: len(data) // 2])
    rows = SideBySideFolder(tmp_path)
    with pytest.raises(ValueError, match=r"0\.png is no readable picture"):
        rows[0]


def test_a_folder_of_photographs_and_a_cartoonizer(tmp_path, picture):
    picture(16, 24).save(tmp_path / "b.png")
    picture(24, 16).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no picture")
    pairs = ImagePairs(PictureFolder(tmp_path), "image", size=16, method="palette", strength=2)
    assert len(pairs) == 2
    source, target = pairs.images(1)
    assert np.array_equal(target, picture(16, 24))
    assert np.array_equal(source, cartoonize(picture(16, 24), method="palette", strength=2))
    assert pairs[0]["pixel_values"].shape == (3, 16, 16)


@pytest.mark.parametrize("folder", [PictureFolder, SideBySideFolder])
def test_files_without_a_readable_header_are_left_out_in_one_warning(tmp_path, picture, caplog, folder):
    for name in ("b", "d"):
        picture(16, 32).save(tmp_path / f"{name}.png")
    for number in range(4):
        (tmp_path / f"c{number}.jpg").write_text("no picture")
    (tmp_path / "a.png").touch()
    (tmp_path / "._b.png").write_text("what another system keeps about b.png")
    (tmp_path / "more.png").mkdir()
    rows = folder(tmp_path)
    assert [path.name for path in rows.files] == ["b.png", "d.png"]
    (line,) = caplog.messages
    assert line == f"Left out 5 of 7 pictures of {tmp_path}, which cannot be read: a.png, c0.jpg, c1.jpg, 2 more"
    folder(tmp_path)  # such as for the other split
    assert len(caplog.messages) == 1


def test_a_source_column_and_a_cartoonizer_exclude_each_other(picture):
    rows = [{"a": picture(16, 16), "b": picture(16, 16)}]
    with pytest.raises(ValueError, match=r"must not both be given, got 'a' and 'bilateral'.*leave one of them out"):
        ImagePairs(rows, "b", "a", method="bilateral")
    assert ImagePairs(rows, "b", "a").method is None
    assert ImagePairs(rows, "b").method == "bilateral"


def test_wrong_pairs_are_named(tmp_path, picture):
    rows = [{"a": picture(16, 16), "b": picture(16, 20)}]
    with pytest.raises(
        ValueError, match=r"Row 0: .*one size, got 16x16 and 20x16 pixels in 'a' and 'b'; .* resize one"
    ):
        ImagePairs(rows, "b", "a")[0]
    with pytest.raises(ValueError, match="`target_column` must be one of the columns a, b, got 'photo'"):
        ImagePairs(rows, "photo")
    with pytest.raises(ValueError, match="`source_column` must be one of the columns a, b, got 'c'"):
        ImagePairs(rows, "b", "c")
    with pytest.raises(ValueError, match="Row 0: the column 'a' must hold images, got str"):
        ImagePairs([{"a": "file.png"}], "a")[0]
    table = datasets.Dataset.from_dict({"a": [{"bytes": b"no picture", "path": None}]})
    with pytest.raises(ValueError, match=r"^Row 0 holds no picture; replace it or take it out of the data, then sta"):
        ImagePairs(table.cast_column("a", datasets.Image()), "a")[0]
    with pytest.raises(ValueError, match="at least one pair"):
        ImagePairs([], "a")
    with pytest.raises(ValueError, match="a data set that knows its length, got IterableDataset: load it without"):
        ImagePairs(table.to_iterable_dataset(), "a")
    with pytest.raises(ValueError, match=r"`method` .*, got 'sketch'\."):
        ImagePairs(rows, "a", method="sketch")
    with pytest.raises(ValueError, match="`size` must be a whole number, at least 1, got 0"):
        ImagePairs(rows, "a", size=0)
    with pytest.raises(FileNotFoundError, match="holds no picture"):
        SideBySideFolder(tmp_path)
    picture(16, 31).save(tmp_path / "odd.png")
    with pytest.raises(ValueError, match=r"odd\.png is 31x16 pixels, but .* make a picture of even width: for photog"):
        SideBySideFolder(tmp_path, any_shape=True)
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "odd.png").unlink()
    for folder in (PictureFolder, SideBySideFolder):
        with pytest.raises(ValueError, match=r"None of 1 pictures of .* can be read: a\.png"):
            folder(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"nope does not exist; name a folder"):
            folder("nope")
        with pytest.raises(NotADirectoryError, match=r"a\.png is a file, not a folder; name the folder"):
            folder(tmp_path / "a.png")
    with pytest.raises(ValueError, match='"left" or "right", got \'top\''):
        SideBySideFolder(tmp_path, "top")


def test_a_picture_that_is_damaged_behind_its_header_is_named(tmp_path, picture):
    for name in ("a", "b"):
        picture(200, 200).save(tmp_path / f"{name}.png")
    data = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data[: len(data) // 2])
    records = [{"bytes": path.read_bytes(), "path": None} for path in sorted(tmp_path.iterdir())]
    table = datasets.Dataset.from_dict({"image": records}).cast_column("image", datasets.Image())
    opened = [{"image": Image.open(tmp_path / name)} for name in ("a.png", "b.png")]
    remedy = "; replace it or take it out of the data, then start again: a training goes on at its last checkpoint."
    for rows, where in (
        (opened, "Row 1: the column 'image' holds no readable picture: image file is truncated"),
        (table, "Row 1 holds no readable picture: image file is truncated"),
        (PictureFolder(tmp_path), f"Row 1: {tmp_path / 'b.png'} is no readable picture: image file is truncated"),
    ):
        pairs = ImagePairs(rows, "image", size=16, strength=0)
        assert pairs[0]["labels"].shape == (3, 16, 16)
        with pytest.raises(ValueError, match=f"^{re.escape(where)}.*{re.escape(remedy)}$"):
            pairs[1]
    rows = [{"image": np.full((8, 8, 3), -1)}]
    with pytest.raises(ValueError, match=r"^Row 0: the column 'image': An integer .*, got \[-1, -1\]; replace it"):
        ImagePairs(rows, "image", size=8)[0]


def test_sheets(tmp_path, picture):
    sheet = sample_sheet([[picture(), picture(8, 8)]] * 2, ["source", "a very long title"], row_titles=["one", "two"])
    assert np.array_equal(np.asarray(sheet)[22:38, 4:20], picture())
    path = save_picture(sheet, tmp_path / "new" / "sheet.png")
    assert np.array_equal(Image.open(path), sheet)
    with pytest.raises(ValueError, match="one picture for each of 2 titles, got 1"):
        sample_sheet([[picture()]], ["a", "b"])
    with pytest.raises(ValueError, match="unknown file extension"):
        save_picture(sheet, path.with_suffix(".abc"))
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]


def test_a_folder_can_be_sliced_and_rows_are_counted_from_the_end(picture_folder, picture):
    folder = PictureFolder(picture_folder)
    part = folder[1:]
    assert isinstance(part, PictureFolder)
    assert part.files == folder.files[1:]
    assert len(folder) == 3
    assert part[0]["image"].size == folder[1]["image"].size
    pairs = ImagePairs(folder, "image", size=8, method="palette", jitter=2)
    assert torch.equal(pairs[-1]["labels"], pairs[2]["labels"])
    with pytest.raises(IndexError):
        pairs[3]
    with pytest.raises(ValueError, match="`seed` must be a whole number, at least 0, got -1"):
        ImagePairs(folder, "image", size=8, seed=-1)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("size", 32.0, 1),
        ("size", True, 1),
        ("size", "32", 1),
        ("size", (32, 32), 1),
        ("size", -32, 1),
        ("jitter", 2.0, 0),
        ("jitter", False, 0),
        ("jitter", -1, 0),
        ("seed", 0.5, 0),
        ("seed", -1, 0),
        ("strength", True, 0),
        ("strength", 3.0, 0),
        ("strength", 6, 0),
        ("num_channels", 2, 1),
        ("num_output_channels", True, 1),
    ],
)
def test_a_number_that_is_none_of_its_kind_is_refused_at_once(picture, name, value, least):
    rule = {
        "strength": "a whole number from 0 to 5",
        "num_channels": r"1 \(grey\) or 3 \(RGB\)",
        "num_output_channels": r"1 \(grey\) or 3 \(RGB\)",
    }.get(name, f"a whole number, at least {least}")
    with pytest.raises(ValueError, match=rf"^`{name}` must be {rule}, got {re.escape(repr(value))}"):
        ImagePairs([{"photo": picture(32, 32)}], "photo", **{name: value})


def test_whole_numbers_may_be_of_numpy(picture):
    numbers = {"size": np.int64(32), "jitter": np.int32(2), "seed": np.uint8(1), "strength": np.int64(2)}
    pair = ImagePairs([{"photo": picture(40, 40)}], "photo", **numbers)[0]
    assert pair["labels"].shape == (3, 32, 32)
