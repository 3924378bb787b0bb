"""`hf-efficient cartoonize`, `translate`, `robustness` and `convert-pix2pix`: results and errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from hf_efficient import cartoonize
from hf_efficient.cli import main


PROC = Path("/proc/self").is_dir()  # the one folder that refuses the administrator


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def test_cartoonize_keeps_names_and_folders(tmp_path, picture_folder, picture):
    (picture_folder / "more").mkdir()
    picture(12, 12).save(picture_folder / "more" / "photo.jpg")
    out = tmp_path / "out"
    assert (
        main(["cartoonize", str(picture_folder), str(out), "--method", "palette", "--strength", "5", "--quiet"]) == 0
    )
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    assert names == ["0.png", "1.png", "2.png", "more/photo.png"]
    expected = cartoonize(Image.open(picture_folder / "1.png"), method="palette", strength=5)
    assert np.array_equal(Image.open(out / "1.png"), expected)


def test_translate_uses_the_pipeline(tmp_path, picture_folder, checkpoint, capsys):
    out = tmp_path / "out"
    assert (
        main(["translate", checkpoint, str(picture_folder), str(out), "--batch-size", "2", "--json", "-", "--quiet"])
        == 0
    )
    assert len(json.loads(capsys.readouterr().out)["files"]) == 3
    expected = pipeline("image-to-image", model=checkpoint)(str(picture_folder / "2.png"))
    assert Image.open(out / "2.png").size == (30, 9)
    assert np.abs(np.asarray(Image.open(out / "2.png"), int) - np.asarray(expected, int)).max() <= 1
    assert main(["translate", checkpoint, str(picture_folder / "0.png"), str(tmp_path / "one"), "--quiet"]) == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["0.png"]


def test_results_of_an_earlier_run_are_no_sources(tmp_path, picture_folder):
    out = picture_folder / "cartoons"
    for _ in range(2):
        assert main(["cartoonize", str(picture_folder), str(out), "--quiet"]) == 0
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == ["0.png", "1.png", "2.png"]


def test_a_path_with_an_equals_sign_is_a_path(tmp_path, picture_folder, tiny_model):
    folder = tmp_path / "lr=0.1"
    tiny_model.save_pretrained(folder)
    picture = picture_folder / "0.png"
    settings = ["--methods", "palette", "--severities", "3", "--output", str(tmp_path / "out"), "--quiet"]
    assert main(["robustness", str(folder), str(picture), *settings]) == 0
    assert json.loads((tmp_path / "out" / "robustness.json").read_text())["rows"][1]["model"] == "lr=0.1"


@pytest.mark.parametrize("command", ["cartoonize", "translate"])
def test_a_broken_picture_is_named_and_stops_nothing(tmp_path, picture_folder, checkpoint, capsys, command):
    (picture_folder / "0a.png").write_text("no picture")
    out = tmp_path / "out"
    arguments = [checkpoint] if command == "translate" else []
    file = tmp_path / "result.json"
    assert main([command, *arguments, str(picture_folder), str(out), "--quiet", "--json", str(file)]) == 3
    error = capsys.readouterr().err
    assert error.startswith(f"hf-efficient {command}: incomplete: 3 of 4 pictures were written to {out}; left out: ")
    assert error.count("\n") == 1
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "1.png", "2.png"]
    result = json.loads(file.read_text())
    assert result["files"] == [str(out / f"{number}.png") for number in range(3)]
    assert [entry["file"] for entry in result["failed"]] == [str(picture_folder / "0a.png")]
    assert result["failed"][0]["reason"] == "no picture"


@pytest.mark.parametrize("command", ["cartoonize", "translate"])
def test_where_nothing_can_be_read_the_input_is_wrong(tmp_path, checkpoint, capsys, command):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("no picture")
    arguments = [checkpoint] if command == "translate" else []
    assert main([command, *arguments, str(tmp_path / "in"), str(tmp_path / "out"), "--quiet"]) == 2
    assert "None of 1 pictures could be read: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["cartoonize", "translate"])
def test_a_clash_of_names_is_listed_and_stops_nothing(tmp_path, picture_folder, checkpoint, picture, capsys, command):
    picture(16, 16).save(picture_folder / "1.jpg")
    out, file = tmp_path / "out", tmp_path / "result.json"
    arguments = [command, checkpoint] if command == "translate" else [command]
    arguments += [str(picture_folder), str(out), "--quiet", "--json", str(file)]
    assert main(arguments) == 3
    assert "2 of 4 pictures were written" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "2.png"]
    size = Image.open(out / "2.png").size
    assert size == (30, 9)  # results still belong to their own pictures
    failed = json.loads(file.read_text())["failed"]
    assert [entry["file"] for entry in failed] == [str(picture_folder / name) for name in ("1.jpg", "1.png")]
    for entry in failed:
        assert entry["reason"] == "1.jpg and 1.png would both be written to 1.png; rename one of them"
    for name in ("0.png", "2.png"):
        (picture_folder / name).unlink()
    assert main(arguments) == 2
    assert "None of 2 pictures could be written: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["cartoonize", "translate"])
def test_only_the_first_frame_of_a_moving_picture_is_taken_and_that_is_said(
    tmp_path, checkpoint, picture, caplog, command
):
    frames = [picture(16, 16), picture(16, 17).resize((16, 16))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    frames[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=frames[1:])
    arguments = [command, checkpoint] if command == "translate" else [command]
    for name in ("still.gif", "phone.jpg", "moving.gif"):
        assert main([*arguments, str(tmp_path / name), str(tmp_path / "out.png")]) == 0
    (line,) = caplog.messages
    assert line == f"Only the first frame was taken of {tmp_path / 'moving.gif'}"


def test_other_files_of_a_folder_are_passed_over_in_one_line(tmp_path, picture_folder, picture, capsys, caplog):
    for name in ("a.txt", "b.csv", "c.md"):
        (picture_folder / name).write_text("words")
    (picture_folder / ".hidden").write_text("words")
    (picture_folder / "more").mkdir()
    picture(12, 12).save(picture_folder / "more" / "d.gif")
    arguments = ["cartoonize", str(picture_folder), str(tmp_path / "out"), "--json", "-"]
    assert main(arguments) == 0
    assert len(json.loads(capsys.readouterr().out)["skipped"]) == 4
    (line,) = caplog.messages
    assert line.startswith(f"Passed over 4 files of {picture_folder}, not of the kinds .png, .jpg")
    assert line.endswith(": a.txt, b.csv, c.md, 1 more")
    caplog.clear()
    assert main([*arguments, "--quiet"]) == 0
    assert not caplog.messages
    command = [sys.executable, "-m", "hf_efficient.cli", *arguments]  # where nothing listens it goes to the terminal
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr.count(line + "\n") == 1


@pytest.mark.parametrize("command", ["cartoonize", "translate"])
def test_one_picture_goes_into_the_file_that_is_named(tmp_path, picture_folder, checkpoint, capsys, command):
    arguments = [command, checkpoint] if command == "translate" else [command]
    source = str(picture_folder / "1.png")
    for name, kind in (("out.png", "PNG"), ("new/out.JPG", "JPEG"), ("out.png", "PNG")):
        assert main([*arguments, source, str(tmp_path / name), "--quiet"]) == 0
        with Image.open(tmp_path / name) as written:
            assert (written.format, written.size) == (kind, (13, 21))
    (tmp_path / "folder.png").mkdir()
    assert main([*arguments, source, str(tmp_path / "folder.png"), "--quiet"]) == 0
    assert (tmp_path / "folder.png" / "1.png").is_file()
    before = Path(source).read_bytes()
    for wrong, dest, message in (
        (str(picture_folder), tmp_path / "all.png", "ends like a picture, but SOURCE"),
        (source, tmp_path / "out.gif", "must end in one of .png, .jpg"),
        (source, tmp_path / "out.xyz", "must end in one of .png, .jpg"),
        (source, tmp_path / "out.xyz", "or name a folder: one that is there, has no ending, or is written with a /"),
        (source, Path(source), "would be replaced by its own result"),
    ):
        assert main([*arguments, wrong, str(dest), "--quiet"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "all.png").exists()
    assert main([*arguments, source, f"{tmp_path / 'v1.5'}/", "--quiet"]) == 0
    assert (tmp_path / "v1.5" / "1.png").is_file()
    assert Path(source).read_bytes() == before


@pytest.mark.parametrize("command", ["cartoonize", "translate"])
def test_transparency_stays_where_the_format_has_it(tmp_path, picture, checkpoint, caplog, command):
    alpha = Image.linear_gradient("L").resize((14, 20))
    photo = picture(20, 14).convert("RGBA")
    photo.putalpha(alpha)
    photo.save(tmp_path / "photo.png")
    arguments = [command, checkpoint] if command == "translate" else [command]
    for name in ("out.png", "out.webp"):
        assert main([*arguments, str(tmp_path / "photo.png"), str(tmp_path / name), "--quiet"]) == 0
        with Image.open(tmp_path / name) as written:
            assert np.array_equal(written.convert("RGBA").getchannel("A"), alpha)
    assert main([*arguments, str(tmp_path / "photo.png"), str(tmp_path / "out.jpg")]) == 0
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path / 'out.jpg'} cannot hold the transparency of")
    caplog.clear()
    opaque = picture(20, 14).convert("RGBA")
    opaque.save(tmp_path / "opaque.png")
    assert main([*arguments, str(tmp_path / "opaque.png"), str(tmp_path / "out.jpg")]) == 0
    assert not caplog.messages


def test_robustness_passes_over_a_broken_and_a_tiny_photograph(tmp_path, picture_folder, checkpoint, capsys):
    (picture_folder / "0a.png").write_text("no picture")
    settings = ["--methods", "palette", "--severities", "0", "--output", str(tmp_path / "out"), "--quiet"]
    assert main(["robustness", checkpoint, str(picture_folder), *settings, "--json", str(tmp_path / "r.json")]) == 3
    error = capsys.readouterr().err
    assert "incomplete: 2 photographs were measured; left out: " in error
    assert f"{picture_folder / '0a.png'}: no picture" in error
    assert f"{picture_folder / '2.png'}: 30x9 pixels, at least 11 are needed" in error
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["images"], len(result["failed"])) == (2, 2)
    assert (tmp_path / "out" / "index.html").is_file()


def test_robustness_passes_over_damaged_rows_of_a_table(tmp_path, checkpoint, picture, capsys):
    import datasets

    picture(40, 40).save(tmp_path / "whole.png")
    picture(40, 9).save(tmp_path / "tiny.png")
    whole, tiny = ((tmp_path / name).read_bytes() for name in ("whole.png", "tiny.png"))
    cells = [whole[: len(whole) // 2], whole, b"no picture", tiny, None, whole]
    records = [None if cell is None else {"bytes": cell, "path": None} for cell in cells]
    table = datasets.Dataset.from_dict({"image": records}).cast_column("image", datasets.Image())
    data = str(tmp_path / "photos.parquet")
    table.to_parquet(data)
    settings = ["--methods", "palette", "--severities", "0", "--output", str(tmp_path / "out"), "--quiet"]
    assert main(["robustness", checkpoint, data, *settings, "--json", str(tmp_path / "r.json")]) == 3
    error = capsys.readouterr().err
    assert "incomplete: 2 photographs were measured; left out: " in error
    assert f"{data}, row 0: no readable picture: image file is truncated" in error
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["images"] == 2
    assert [entry["file"] for entry in result["failed"]] == [f"{data}, row {row}" for row in (0, 2, 3, 4)]
    reasons = ["no picture", "9x40 pixels, at least 11 are needed", "no picture"]
    assert [entry["reason"] for entry in result["failed"]][1:] == reasons
    table.select([0, 2]).to_parquet(data)
    assert main(["robustness", checkpoint, data, *settings]) == 2
    assert f"DATA {data} holds no picture that can be measured: {data}, row 0: no read" in capsys.readouterr().err


def test_robustness_writes_a_report(tmp_path, picture_folder, checkpoint, picture):
    import datasets

    out, settings = tmp_path / "out", ["--methods", "palette", "--severities", "0", "5", "--quiet"]
    settings += ["--trained-on", "palette"]
    (picture_folder / "2.png").unlink()  # 9 pixels high: too small for SSIM
    assert main(["robustness", checkpoint, str(picture_folder), "--output", str(out), *settings]) == 0
    data = json.loads((out / "robustness.json").read_text())
    assert (data["images"], len(data["rows"])) == (2, 4)
    assert data["rows"][2]["model"] == "checkpoint"  # the name of its folder
    assert data["trained_on"] == {"checkpoint": "palette"}
    assert (out / "samples_palette__checkpoint.png").is_file()
    assert (out / "index.html").exists()
    table = datasets.Dataset.from_dict({"photo": [picture(16, 16)] * 2}).cast_column("photo", datasets.Image())
    table.to_parquet(str(tmp_path / "photos.parquet"))
    arguments = [f"a={checkpoint}", f"b={checkpoint}", "--data", str(tmp_path / "photos.parquet"), "--column", "photo"]
    arguments += ["--limit", "1", "--output", str(out)]
    assert main(["robustness", *arguments, *settings[:-1], "a=palette"]) == 0
    data = json.loads((out / "robustness.json").read_text())
    assert (data["images"], data["trained_on"], len(data["rows"])) == (1, {"a": "palette"}, 6)


def test_convert_says_what_it_found(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from test_convert import UNet

    torch.save(UNet(7, 2, "batch").state_dict(), tmp_path / "latest_net_G.pth")
    assert main(["convert-pix2pix", str(tmp_path / "latest_net_G.pth"), str(tmp_path / "out")]) == 0
    assert "unet with 7 levels, 2 channels, batch norm" in capsys.readouterr().out
    assert main(["convert-pix2pix", str(tmp_path / "latest_net_G.pth"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "DEST must be absent or an empty folder" in error
    assert "pass --overwrite." in error


def test_wrong_input_gets_one_sentence_and_exit_code_2(tmp_path, picture_folder, checkpoint, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("words")
    (tmp_path / "rows.parquet").write_text("words")
    file, photos, out = str(tmp_path / "file.txt"), str(picture_folder), str(tmp_path / "out")
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    cases = [
        (["cartoonize", photos, file], f"DEST {file} is a file"),
        (["cartoonize", photos, file + "/sub"], f"DEST {file}/sub cannot be made"),
        *([(["cartoonize", photos, "/proc/out"], "DEST /proc/out cannot be made: /proc cannot be written")] * PROC),
        (["cartoonize", file, out], f"{file}: no picture"),
        (["translate", checkpoint, photos, file], f"DEST {file} is a file"),
        (["translate", checkpoint, photos, out, "--device", "tpu9"], "--device must be one that torch can use here"),
        (["translate", checkpoint, photos, out, "--device", "meta"], "--device must be one that torch can use here"),
        (["translate", str(damaged), photos, out], f"MODEL {damaged} holds no image-to-image model that loads ("),
        (["translate", "no/where", photos, out], "MODEL no/where is no folder here and no Hub id"),
        (["robustness", checkpoint, photos, "--device", "tpu9"], "--device must be one that torch can use here"),
        (["robustness", "no/where", photos], "MODEL no/where is no folder here and no Hub id"),
        (["robustness", checkpoint, "nowhere"], "DATA nowhere does not exist"),
        (["robustness", checkpoint, file], f"DATA {file} holds no picture that can be measured: {file}: no picture"),
        (["robustness", "no/where", "nowhere", "--severities", "9"], "--severities must be whole numbers from 0 to 5"),
        (["robustness", checkpoint, photos, "--features", "no.pt"], "--features must be a file with the weights"),
        (["robustness", checkpoint, str(tmp_path / "rows.parquet")], "is no parquet file that can be read"),
        (["robustness", checkpoint, photos, "--limit", "0"], "--limit must be at least 1, got 0"),
        (["robustness", checkpoint, photos, "--batch-size", "-1"], "--batch-size must be at least 1, got -1"),
        (["robustness", checkpoint, photos, "--trained-on", "ink"], "--trained-on must name a cartoonizer"),
        (["robustness", checkpoint, photos, "--output", file], f"--output {file} is a file"),
        (["convert-pix2pix", file, out], "SOURCE must hold plain weights"),
        (["convert-pix2pix", str(tmp_path), out], "which is a folder"),
        (["cartoonize", str(tmp_path / "empty"), "out"], "holds no picture"),
        (["cartoonize", "nowhere", "out"], "SOURCE nowhere does not exist"),
        (["translate", checkpoint, "nowhere", "out"], "SOURCE nowhere does not exist"),
        (["robustness", checkpoint, checkpoint, "--data", photos], "Several models need names of their own"),
        (["robustness", f"a={checkpoint}", "b=x", "--data", photos, "--trained-on", "palette"], "NAME=CARTOONIZER"),
        (["cartoonize", str(picture_folder), str(picture_folder)], "would be replaced by its own result"),
        (["cartoonize", photos, out, "--method", "sketch"], "--method must be one of bilateral"),
        (["cartoonize", photos, out, "--strength", "9"], "--strength must be a whole number from 0 to 5, got 9"),
        (
            ["translate", checkpoint, str(picture_folder), str(tmp_path / "out"), "--batch-size", "0"],
            "at least 1, got 0",
        ),
        (["translate", str(tmp_path / "empty"), str(picture_folder), str(tmp_path / "out")], "empty"),
        (["robustness", checkpoint], "DATA is missing"),
        (["robustness", checkpoint, "--data", str(picture_folder), "--trained-on", "x=palette"], "'x'"),
        (["robustness", checkpoint, str(picture_folder), "--column", "photo"], "--column photo is for a parquet file"),
        (["robustness", checkpoint, str(picture_folder), "--methods", "sketch"], "got ['sketch']"),
        (["convert-pix2pix", "nowhere.pth", str(tmp_path / "out")], "nowhere.pth"),
    ]
    for arguments, message in cases:
        assert main([*arguments, "--quiet"]) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, arguments
        assert "Traceback" not in error
        assert error.strip().count("\n") == 0, error
