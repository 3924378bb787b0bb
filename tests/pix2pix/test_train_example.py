"""`examples/pix2pix_train.py`: three kinds of data, what it records, and one sentence on wrong input."""

import json
import sys
from pathlib import Path

import datasets
import pytest

from hf_efficient import cartoonize


SMALL = ["--size", "16", "--channels", "1", "--epochs", "1", "--receptive-field", "16", "--preview-steps", "0"]


@pytest.fixture
def train(monkeypatch, tmp_path, repository):
    """`train(*arguments)` runs the script with tiny networks and returns its exit code."""
    monkeypatch.syspath_prepend(str(repository / "examples"))
    for name in ("pix2pix_train", "pix2pix_train_data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import pix2pix_train

    def run(*arguments: str) -> int:
        output = ["--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["pix2pix_train.py", *SMALL, *output, *arguments])
        return pix2pix_train.main()

    run.module = pix2pix_train
    return run


@pytest.fixture
def photographs(tmp_path, picture) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(4):
        picture(16, 20 + number).save(folder / f"{number}.png")
    return folder


def test_photographs_need_a_cartoonizer_and_get_one(train, photographs, tmp_path, capsys):
    assert train("--dataset", str(photographs)) == 2
    error = capsys.readouterr().err
    assert "0.png is 20x16 pixels" in error
    assert "name a cartoonizer (--cartoonizer)" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert train("--dataset", str(photographs), "--cartoonizer", "palette", "--strength", "2") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["steps"] == 3  # one of four photographs is kept for the test
    settings = results["settings"]
    assert (settings["cartoonizer"], settings["strength"], settings["source"]) == ("palette", 2, None)


def test_a_folder_without_splits_keeps_every_tenth_picture_for_the_test(train, photographs, picture):
    for number in range(4, 12):
        picture(16, 16).save(photographs / f"{number}.png")
    parts = [train.module.load_rows(str(photographs), split, "photographs").files for split in ("train", "test")]
    assert [len(part) for part in parts] == [10, 2]
    assert not set(parts[0]) & set(parts[1])


def test_a_damaged_picture_stops_a_training_in_one_sentence(train, photographs, tmp_path, capsys):
    arguments = ["--dataset", str(photographs), "--cartoonizer", "palette", "--epochs"]
    assert train(*arguments, "1") == 0
    whole = (photographs / "2.png").read_bytes()
    (photographs / "2.png").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert train(*arguments, "2") == 2
    error = capsys.readouterr().err.partition("error: ")[2]
    assert f"{photographs / '2.png'} is no readable picture: " in error
    assert error.endswith("start again: a training goes on at its last checkpoint.\n")
    assert error.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    (photographs / "2.png").write_bytes(whole)
    assert train(*arguments, "2") == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["steps"] == 6


def test_pairs_record_no_cartoonizer(train, tmp_path, picture):
    for split in ("train", "test"):
        (tmp_path / "pairs" / split).mkdir(parents=True)
        picture(16, 24).save(tmp_path / "pairs" / split / "0.png")
    assert train("--dataset", str(tmp_path / "pairs"), "--direction", "BtoA") == 0
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert not {"cartoonizer", "strength"} & settings.keys()
    assert (settings["source"], settings["target"]) == ("target", "source")


@pytest.fixture
def table(tmp_path, picture) -> Path:
    photo = picture(16, 16)
    rows = datasets.Dataset.from_dict({"photo": [photo], "drawing": [cartoonize(photo)]})
    for name in rows.column_names:
        rows = rows.cast_column(name, datasets.Image())
    (tmp_path / "table").mkdir()
    for split in ("train", "test"):
        rows.to_parquet(str(tmp_path / "table" / f"{split}.parquet"))
    return tmp_path / "table"


def test_two_columns_record_no_cartoonizer(train, table, tmp_path):
    assert train("--dataset", str(table), "--source", "drawing", "--target", "photo") == 0
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert "cartoonizer" not in settings
    assert (settings["source"], settings["target"]) == ("drawing", "photo")


def test_wrong_input_is_one_sentence_and_exit_code_2(train, table, photographs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    (photographs / "0.png").rename(tmp_path / "one" / "0.png")
    table, one = str(table), str(tmp_path / "one")
    for arguments, message in (
        (["--dataset", "no/where"], "--dataset no/where is no folder here and no data set of the Hub"),
        (
            ["--dataset", str(tmp_path / "empty")],
            "holds neither test.parquet, nor a folder test of pictures, nor pict",
        ),
        (["--dataset", f"{table}/train.parquet"], "is a file; name the folder that holds it"),
        (
            ["--dataset", table],
            "--target must be one of the columns photo, drawing, got 'image', its default: give --t",
        ),
        (["--dataset", table, "--target", "x"], "--target must be one of the columns photo, drawing, got 'x'."),
        (["--dataset", table, "--target", "photo", "--source", "x"], "--source must be one of the columns"),
        (["--dataset", table, "--target", "photo", "--direction", "AtoB"], "--direction is for a folder of A|B"),
        (["--dataset", one, "--cartoonizer", "palette"], "holds one picture, which is the test"),
        (["--cartoonizer", "sketch"], "--cartoonizer must be one of bilateral, palette, mean_shift"),
        (["--norm", "layer"], "--norm must be one of instance, batch, none, got 'layer'"),
        (["--receptive-field", "71"], "--receptive-field must be one of"),
        (["--receptive-field", "70"], "24 pixels high and wide for a discriminator of --receptive-field, got 16x16"),
        (["--lambda-l1", "-1"], "--lambda-l1 must be at least 0, got -1.0"),
    ):
        assert train(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, arguments
        assert "Traceback" not in error
        assert error.partition("error: ")[2].count("\n") == 1, error
    with pytest.raises(SystemExit) as end:
        train("--cartoonizer", "palette", "--source", "drawing")
    assert end.value.code == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_help_names_the_defaults_that_there_are(train, capsys):
    with pytest.raises(SystemExit):
        train("--help")
    text = capsys.readouterr().out
    assert "    python examples/pix2pix_train.py --dataset DIR/photos" in text  # lines stay as they are
    for default in ("200", "128", "100.0", "vanilla", "runs/pix2pix_train"):
        assert f"(default: {default})" in text
    words = " ".join(text.split())
    for option in (
        "--generator {unet,resnet_6blocks,resnet_9blocks}",
        "--norm {instance,batch,none}",
        "--gan-loss {vanilla,lsgan,hinge,none}",
        "--cartoonizer {bilateral,palette,mean_shift}",
    ):
        assert option in words
    for default in ("augmentation (default: 0)", "0 = off (default: 0.0)"):
        assert default in words
    assert "(default: None)" not in text
    assert "(default: False)" not in text


def test_an_interrupt_is_one_line(train, monkeypatch, capsys):
    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.module, "train", stop)
    assert train() == 130
    assert capsys.readouterr().err.count("\n") == 1
