"""`hf-efficient prune` on a folder of images: checkpoint, table, picture; one sentence on wrong input."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hf_efficient import CifarResNetConfig, CifarResNetForImageClassification, KDFSConfig
from hf_efficient.cli import main
from hf_efficient.kdfs.images_kdfs import ImageCollator


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
    report_file = tmp_path / "report.json"
    more = ["--target-flops-reduction", "0.4", "--json", str(report_file)]
    assert run(material, tmp_path, *more) == 0
    report = json.loads(report_file.read_text())
    assert abs(report["flops"]["reduction"] - 0.4) < 0.01
    assert report["accuracy"]["images"] == 6
    written = json.loads((tmp_path / "out" / "kdfs_report.json").read_text())
    assert written == {name: report[name] for name in written}
    assert written["accuracy"] == report["accuracy"]
    captured = capsys.readouterr()
    assert "{'loss'" not in captured.out + captured.err, "the Trainer's own lines are no result"
    text = captured.out
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
        (
            ["--min-filters", "999"],
            "With --min-filters 999 and --round-to 1 no filter can be removed: the widest layer",
        ),
        (["--min-filters", "16"], "layer that may be pruned has 16; lower --min-filters or --round-to."),
        (["--target-flops-reduction", "1.5"], "must be a number in (0, 1), but is 1.5"),
        (["--label-column", "kind"], "--label-column"),
        (["--train-split", "learn"], "--train-split learn is not in the dataset; it has"),
        (["--epochs", "0"], "--epochs must be above 0, but is 0"),
        (["--max-steps", "0"], "--max-steps must be at least 1, but is 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, but is 0"),
        (["--include-layers", "conv("], "must be regular expressions, but 'conv(' is none (missing ), unterminated"),
        (["--seed", "-1"], "--seed must be at least 0, but is -1"),
        (["--learning-rate", "0"], "--learning-rate must be above 0, but is 0"),
        (["--config", "nowhere"], "--config nowhere is no file or folder here and no Hub id that could be read ("),
        (["--config", __file__], "test_commands.py holds no settings of KDFS that could be read ("),
        (["--model", "nowhere"], "--model nowhere is no folder here and no Hub id that could be loaded"),
        (["--teacher", "nowhere"], "--teacher nowhere is no folder here and no Hub id that could be loaded"),
        (["--dataset", "nowhere"], "--dataset nowhere is no file or folder here and no Hub id that could be read"),
    ],
)
def test_wrong_input_is_one_sentence(material, tmp_path, capsys, more, message):
    assert run(material, tmp_path, *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-efficient prune: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["", "kdfs_config.json"])
def test_settings_come_from_a_file(material, tmp_path, file):
    settings = KDFSConfig(target_flops_reduction=0.3, kd_weight=4.0, round_to=4, importance_images=16)
    settings.save_pretrained(tmp_path / "settings")
    source = str(tmp_path / "settings" / file)
    assert run(material, tmp_path, "--config", source, "--target-flops-reduction", "0.4") == 0
    used = KDFSConfig.from_pretrained(tmp_path / "out")
    assert (used.target_flops_reduction, used.kd_weight, used.round_to, used.importance_images) == (0.4, 4.0, 4, 16)


def test_a_wrong_setting_of_a_file_is_named_and_an_option_is_not_blamed_on_it(material, tmp_path, capsys):
    settings = tmp_path / "kdfs_config.json"
    no_object = f"--config {settings} must hold a JSON object, but holds "
    remedy = "; name a kdfs_config.json, its folder, or a Hub id."
    for text, message in (
        ('{"kd_wait": 4.0}', f"--config {settings}: kd_wait is not a setting of KDFSConfig; the settings are"),
        ('{"learning_rate": 1}', f"--config {settings}: learning_rate is not a setting of KDFSConfig; the"),
        (
            '{"kd_weight": -1}',
            f"--config {settings}: kd_weight must be a number of at least 0, but is -1; give another value.",
        ),
        ('{"id2label": 3}', f"--config {settings} holds a value of the wrong kind ("),
        ("[1]", f"{no_object}[1]{remedy}"),
        ("null", f"{no_object}null{remedy}"),
        ('"x. y"', f'{no_object}"x. y"{remedy}'),
        ("{", f"--config {settings} holds no settings of KDFS that could be read (Expecting property name"),
    ):
        settings.write_text(text)
        assert run(material, tmp_path, "--config", str(settings)) == 2
        assert f"error: {message}" in capsys.readouterr().err
    settings.write_text('{"kd_weight": 1.0}')
    assert run(material, tmp_path, "--config", str(settings), "--round-to", "0") == 2
    assert "error: --round-to must be an integer of at least 1, but is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"target_flops_reduction": 0.99}, [], "--config FILE: target_flops_reduction must be at most 0."),
        ({"target_flops_reduction": 0.3}, ["--target-flops-reduction", "0.99"], "--target-flops-reduction must be at"),
        (
            {"min_filters": 999},
            [],
            "--config FILE: With min_filters 999 and --round-to 1 no filter can be removed: the widest layer that may "
            "be pruned has 16; lower min_filters or --round-to.",
        ),
    ],
)
def test_what_only_the_network_refuses_is_blamed_on_the_file_too(material, tmp_path, capsys, settings, more, message):
    """Nobody typed the options of these names, so nobody would find them."""
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings))
    assert run(material, tmp_path, "--config", str(file), *more) == 2
    assert f"error: {message.replace('FILE', str(file))}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kdfs_config.json", ""])
def test_settings_with_a_byte_order_mark(material, tmp_path, capsys, name):
    """As some editors write it; that the file was read shows in the value that is refused."""
    folder = tmp_path / "settings"
    folder.mkdir()
    (folder / "kdfs_config.json").write_text('{"round_to": -8}', encoding="utf-8-sig")
    assert run(material, tmp_path, "--config", str(folder / name)) == 2
    assert f"--config {folder / name}: round_to must be an integer of at least 1, but is -8" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".", "v1. final"])
def test_a_dot_in_a_name_does_not_end_the_reason(material, tmp_path, capsys, monkeypatch, name):
    (tmp_path / name).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    remedy = "name one that holds it, or a file."
    for option, message in (
        ("--config", f"--config {name} is a folder without kdfs_config.json; {remedy}"),
        (
            "--model",
            f"--model {name} holds no configuration that could be loaded (Unrecognized model in {name}); name",
        ),
    ):
        assert run(material, tmp_path, option, name) == 2
        assert f"error: {message}" in capsys.readouterr().err
    if name != ".":
        assert run(material, tmp_path, "--dataset", name) == 2
        assert f"{name} doesn't contain any data files); name a folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--model", "--dataset", "--output", "--config", "--teacher"])
def test_an_empty_name_is_refused(material, tmp_path, capsys, option):
    assert run(material, tmp_path, option, "") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"error: {option} must be a f" in error
    assert error.endswith(", but is empty; name one.")


def test_an_empty_folder_of_images(material, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(material, tmp_path, "--dataset", str(tmp_path / "empty")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"error: --dataset {tmp_path / 'empty'} could not be read (" in error
    assert error.endswith("; name a folder with a folder of images per class, or parquet files.")


def test_files_of_the_wrong_kind(material, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 0)  # do not ask on the terminal
    file, other = tmp_path / "notes.txt", tmp_path / "llava"
    file.write_text("words")
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "a.A"}}')
    cases = [
        (["--output", str(file)], f"--output must be a folder, but {file} is a file; name a folder."),
        (["--output", str(file / "sub")], f"--output {file / 'sub'} cannot be made: {file} is a file"),
        (["--dataset", str(file)], f"--dataset {file} could not be read"),
        (["--model", str(other)], f"--model {other} is no image classifier, but of type 'llava'"),
        (["--model", str(tmp_path / "images")], "holds no configuration that could be loaded"),
        (["--model", str(tmp_path / "own")], "; add --trust-remote-code if you trust it."),
    ]
    for more, message in cases:
        assert run(material, tmp_path, *more) == 2, more
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("hf-efficient prune: error: ")
        assert message in error


def test_a_folder_that_cannot_be_written_is_refused_first(material, tmp_path, capsys):
    """The administrator may write everywhere, and still nothing can be made in /proc."""
    if not Path("/proc/self").is_dir():
        pytest.skip("this system has no /proc")
    assert run(material, tmp_path, "--output", "/proc/nope", "--model", "nowhere") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith("error: --output /proc/nope cannot be made: /proc cannot be written; name another folder.")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b", "c", "a"], "classes as words in `label`"),
        ([0, -1, 2, 1], "label -1"),
        ([0, 1, 3, 1], "label 3, but the model has 3 labels"),
        ([0, None, 2, 1], "a row without a label"),
    ],
)
def test_labels_the_model_does_not_have(material, tmp_path, capsys, labels, message):
    """A parquet file of another tool: image bytes without the metadata of `datasets`."""
    file = write_parquet(tmp_path / "rows.parquet", labels)
    assert run((material[0], file), tmp_path) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-efficient prune: error: ")
    assert message in error


@pytest.mark.parametrize(("named", "labels"), [(False, [0, -1, -1]), (True, [0, -1, -1]), (False, [0, 3, 1])])
def test_wrong_labels_of_the_test_rows_show_before_the_training(
    material, tmp_path, capsys, monkeypatch, named, labels
):
    """Datasets mark rows without a label by -1; of these the accuracy would be 0, or an error after hours."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as Picture

    if named:
        CifarResNetForImageClassification(
            CifarResNetConfig(depth=8, hidden_sizes=[8, 8, 16], id2label={0: "a", 1: "b", 2: "c"})
        ).save_pretrained(material[0])
    folder = tmp_path / "rows"
    folder.mkdir()
    for split, values in (("train", [0, 1, 2]), ("test", labels)):
        columns = {"image": [Image.new("RGB", (16, 16))] * 3, "label": values}
        features = Features({"image": Picture(), "label": ClassLabel(names=["a", "b", "c"])}) if named else None
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    monkeypatch.setattr("hf_efficient.kdfs.pruner_kdfs.KDFSPruner.prune", lambda *a, **k: pytest.fail("training"))
    assert run((material[0], folder), tmp_path) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"split test, has label {labels[1]}, but the model has 3 labels" in error
    assert ("--eval-split" in error) == (labels[1] < 0)


def test_classes_are_matched_by_their_words(material, tmp_path):
    """The model's second label is the dataset's third folder."""
    from types import SimpleNamespace

    from hf_efficient.kdfs.images_kdfs import load_images

    model, images = material
    config = CifarResNetConfig(depth=8, id2label={0: "a", 1: "c", 2: "b"})
    settings = dict.fromkeys(("eval_split", "image_column", "label_column"))
    arguments = SimpleNamespace(dataset=str(images), train_split="train", **settings)
    train, _ = load_images(arguments, ViTImageProcessor.from_pretrained(model), config)
    assert train.features["label"].names == ["a", "b", "c"]
    assert [train[index]["labels"] for index in (0, 6, 12)] == [0, 2, 1]


def test_classes_of_which_the_model_knows_some_are_refused(material, tmp_path, capsys):
    """By number, the folder `b` would train the label `a`."""
    model, images = material
    (images / "train" / "a").rename(images / "train" / "zebra")
    (images / "test" / "a").rename(images / "test" / "zebra")
    CifarResNetForImageClassification(
        CifarResNetConfig(depth=8, hidden_sizes=[8, 8, 16], id2label={0: "a", 1: "b", 2: "c"})
    ).save_pretrained(model)
    assert run(material, tmp_path) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has 'b', a label of the model, and 'zebra', which is none" in error


@pytest.mark.parametrize(("labels", "code"), [(4, 2), (3, 0)])
def test_classes_of_which_the_model_knows_none(labels, code, material, tmp_path, capfd, caplog):
    """Of another number they are refused; of the same, they may be the same in other words, which is said."""
    model = material[0]
    names = dict(enumerate(["x", "y", "z", "w"][:labels]))
    CifarResNetForImageClassification(
        CifarResNetConfig(depth=8, hidden_sizes=[8, 8, 16], id2label=names)
    ).save_pretrained(model)
    assert run(material, tmp_path, "--target-flops-reduction", "0.4", "--max-steps", "1") == code
    said = capfd.readouterr().err + caplog.text
    if code:
        assert "has 3 classes, 'a' the first, none of which is one of the model's 4, 'x' the first" in said
    else:
        assert "they are taken in order: 'a' as 'x'" in said


def test_a_missing_exporter_is_noticed_before_training(material, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "onnx" else find(name, *more))
    assert run(material, tmp_path, "--target-flops-reduction", "0.4", "--onnx") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--onnx needs onnx and onnxscript, but onnx is missing; install `hf-efficient[onnx]`." in error
    assert not (tmp_path / "out").exists()


def test_a_column_of_pictures_is_no_column_of_classes(material, tmp_path, capsys):
    import datasets

    _, images = material
    picture = Image.open(next(images.rglob("*.png"))).copy()
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [picture] * 4, "labels": [picture] * 4}, features=features)
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    assert run((material[0], tmp_path / "data"), tmp_path) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has no classes in `labels`, but PngImageFile; name the column of classes with --label-column" in error


def test_an_earlier_result_is_replaced_with_a_word(material, tmp_path, caplog):
    for times in range(2):
        caplog.clear()
        assert run(material, tmp_path, "--seed", str(times)) == 0
        assert ("holds the result of an earlier pruning" in caplog.text) == bool(times)


def test_quiet_is_quiet(material, tmp_path, capfd):
    """Progress bars of `datasets` as well; the first lines are of a cache that is still empty."""
    assert run(material, tmp_path, "--target-flops-reduction", "0.4", "--quiet") == 0
    written = capfd.readouterr()
    assert (written.out, written.err.replace("\r", "").strip()) == ("", "")


def test_a_picture_that_cannot_be_read_is_named(material, tmp_path, capsys):
    broken = material[1] / "train" / "a" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert run(material, tmp_path) == 2
    written = capsys.readouterr().err.replace("\r", "\n").splitlines()
    error = next(line for line in written if "hf-efficient prune: error: --dataset " in line)
    assert "3.png" in error
    assert "repair it or leave it out" in error


def test_the_model_is_not_overwritten(material, tmp_path, capsys):
    model = material[0]
    for more in (["--output", str(model)], ["--output", f"{model}/../{model.name}"]):
        assert run(material, tmp_path, *more) == 2
        assert "would overwrite the network" in capsys.readouterr().err.strip().splitlines()[-1]
    assert run(material, tmp_path, "--output", f"{material[1]}/") == 2
    assert "is the folder of --dataset; name another" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(material[1].glob("*.safetensors"))
    assert CifarResNetForImageClassification.from_pretrained(model)


def test_optimum_is_interrupted_like_the_own_command(monkeypatch, capsys):
    """Ctrl-C is no error: one line, exit code 130."""
    import argparse
    import importlib.util

    import hf_efficient.kdfs.commands_kdfs as commands

    if importlib.util.find_spec("optimum.commands") is None:
        pytest.skip("optimum-cli is not installed")
    file = Path(commands.__file__).parent.parent / "optimum_cli" / "register_hf_efficient.py"
    spec = importlib.util.spec_from_file_location("register_hf_efficient", file)
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)

    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_prune", interrupt)
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "prune", "kdfs"])
    parser = argparse.ArgumentParser()
    plugin.KDFSCommand.parse_args(parser)
    words = ["--model", "m", "--dataset", "d", "--output", "o"]
    command = plugin.KDFSCommand.__new__(plugin.KDFSCommand)  # its parent wants Optimum's whole parser
    command.args = parser.parse_args(words)
    with pytest.raises(SystemExit) as ended:
        command.run()
    assert ended.value.code == 130
    said = capsys.readouterr().err.strip()
    assert "optimum-cli prune kdfs: interrupted; there was no checkpoint yet" in said
    assert "DATASET is a Hub id" in parser.format_help()
    assert "options beside it override it" in " ".join(parser.format_help().split())


def test_help_in_optimum_loads_no_torch():
    """Neither by its plug-in nor by the package, which registers when something is run."""
    import importlib.util
    import subprocess

    if importlib.util.find_spec("optimum.commands") is None:
        pytest.skip("optimum-cli is not installed")
    file = Path(__file__).parents[2] / "hf_efficient" / "optimum_cli" / "register_hf_efficient.py"
    code = f"""
import argparse, runpy, sys
sys.argv = ["/usr/bin/optimum-cli", "prune", "kdfs", "--help"]
parser = argparse.ArgumentParser()
runpy.run_path({str(file)!r})["KDFSCommand"].parse_args(parser)
heavy = {{"torch", "datasets", "transformers.modeling_utils"}} & set(sys.modules)
sys.exit(str(heavy) if heavy or "--json FILE" not in parser.format_help() else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("phase", "step", "kept"),
    [
        ("sampling", 1, ""),
        ("sampling", 2, "step 1 of choosing filters; start"),
        ("fine_tuning", 1, "the chosen filters; start"),
        ("fine_tuning", 2, "the chosen filters and step 1 of training the smaller network; start"),
    ],
)
def test_an_interruption_says_what_is_kept_and_how_to_go_on(
    material, tmp_path, capsys, monkeypatch, phase, step, kept
):
    from transformers import Trainer

    train = Trainer.training_step

    def interrupt(trainer, *args, **kwargs):
        if phase in trainer.args.output_dir and trainer.state.global_step == step - 1:
            raise KeyboardInterrupt
        return train(trainer, *args, **kwargs)

    words = ["--target-flops-reduction", "0.4", "--max-steps", "4", "--batch-size", "18"]  # one step is an epoch
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupt)
        assert run(material, tmp_path, *words) == 130
    folder = tmp_path / "out-training"
    said = capsys.readouterr().err.strip().splitlines()[-1]
    if kept:
        assert f"interrupted; kept in {folder}: {kept} the same command with the same options again to go on" in said
    else:
        assert "interrupted; there was no checkpoint yet (one is written after every epoch), so the same" in said
    if phase == "fine_tuning" and kept.startswith("the chosen filters;"):
        assert run(material, tmp_path, *words) == 0
        assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_interruption_after_the_training_names_the_network(material, tmp_path, capsys, monkeypatch):
    import hf_efficient.kdfs.commands_kdfs as commands

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_accuracy", interrupt)
    assert run(material, tmp_path, "--target-flops-reduction", "0.4") == 130
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"interrupted; the pruned network is in {tmp_path / 'out'}, but its accuracy, picture or ONNX" in said


def test_a_vision_transformer_is_told_of_token_expansion(material, tmp_path, capsys):
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    config = ViTConfig(**size, image_size=16, patch_size=4, num_labels=3)
    ViTForImageClassification(config).save_pretrained(material[0])
    assert run(material, tmp_path, "--target-flops-reduction", "0.05") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: --model must have filters to prune, but ViTForImageClassification is a vision transformer" in error
    assert "Token Expansion (`ToECallback`)" in error


@pytest.mark.parametrize(
    ("moves", "why"),
    [
        ({"train/{}/{}.png": "{0}{1}.png"}, "a0.png is in no folder of a class"),
        ({"train/{}/{}.png": "train/{0}{1}.png"}, "train/a0.png is in no folder of a class"),
        ({"train/{}/{}.png": "train/one/{0}{1}.png"}, "all are in one folder, one"),
    ],
)
def test_pictures_without_a_folder_per_class(material, tmp_path, capsys, moves, why):
    folder = tmp_path / "photos"
    ((pattern, target),) = moves.items()
    for label in "abc":
        for index in range(3):
            file = folder / target.format(label, index)
            file.parent.mkdir(parents=True, exist_ok=True)
            (material[1] / pattern.format(label, index)).rename(file)
    assert run((material[0], folder), tmp_path) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"error: --dataset {folder} is a folder of pictures without classes: " in error
    assert why in error
    assert error.endswith(f"as {folder}/train/<class>/*.jpg and {folder}/test/<class>/*.jpg.")


def test_the_card_of_a_pruned_checkpoint(material, tmp_path, monkeypatch):
    """Its base is the Hub id that was pruned; a local folder is none, but its own card may name one."""
    from huggingface_hub import ModelCard

    from hf_efficient import hub

    load, model = AutoModelForImageClassification.from_pretrained, material[0]

    def card(name=None):
        def from_hub(*args, **kwargs):
            loaded, info = load(*args, **kwargs)
            loaded.name_or_path = name or loaded.name_or_path
            return loaded, info

        with monkeypatch.context() as patch:
            patch.setattr(AutoModelForImageClassification, "from_pretrained", from_hub)
            assert run((model, material[1]), tmp_path, "--target-flops-reduction", "0.4", "--max-steps", "1") == 0
        return ModelCard(hub.render_card(hub._unmeasured(tmp_path / "out", "me/pruned"))).data

    data = card("timm/resnet18.a1_in1k")
    assert data.base_model == "timm/resnet18.a1_in1k"
    assert (data.pipeline_tag, data.library_name, data.tags) == (
        "image-classification",
        "transformers",
        ["hf_efficient"],
    )
    assert card().base_model is None
    (model / "README.md").write_text("---\nbase_model:\n- me/dense\n---\n# Fine-tuned\n")
    assert card().base_model == "me/dense"
    (tmp_path / "out").rename(tmp_path / "once")
    model = tmp_path / "once"
    assert card().base_model == "me/dense"


def test_long_common_parts_of_names_stay_out_of_the_picture():
    from hf_efficient.kdfs.figures_kdfs import shorten_names

    names = ["net.stages.0.conv1.convolution", "net.stages.0.conv2.convolution", "net.stages.10.conv1.convolution"]
    assert shorten_names(names) == ["0.conv1", "0.conv2", "10.conv1"]
    assert shorten_names(["net.conv1", "net.conv1.conv"]) == ["conv1", "conv1.conv"]
    assert shorten_names(["net.conv1"]) == ["net.conv1"]
    assert shorten_names(["conv1", "conv2"]) == ["conv1", "conv2"]


def test_parquet_of_another_tool(material, tmp_path):
    file = write_parquet(tmp_path / "rows.parquet", [0, 1, 2, 0])
    assert run((material[0], file), tmp_path, "--target-flops-reduction", "0.4") == 0


def write_parquet(file, labels):
    import io

    import pyarrow
    import pyarrow.parquet

    rows = []
    for shade, label in enumerate(labels):
        picture = io.BytesIO()
        Image.new("RGB", (16, 16), (60 * shade, 10, 10)).save(picture, "PNG")
        rows.append({"image": {"bytes": picture.getvalue(), "path": None}, "label": label})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


@pytest.mark.slow
def test_the_same_command_of_optimum(material, tmp_path):
    """Through Optimum's plug-in mechanism: the installed file, the same arguments, one sentence on a mistake."""
    command = Path(sys.executable).with_name("optimum-cli")
    if not command.is_file() or importlib.util.find_spec("optimum.commands.register") is None:
        pytest.skip("this environment was made before the plug-in was: install the package again")
    model, images = material
    arguments = ["--model", str(model), "--dataset", str(images), "--output", str(tmp_path / "out")]

    def run_optimum(*more):
        words = [str(command), "prune", "kdfs", *arguments, "--max-steps", "2", "--batch-size", "8", *more]
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=500)

    wrong = run_optimum("--target-flops-reduction", "0.99")
    assert wrong.returncode == 2
    assert "must be at most 0." in wrong.stderr.splitlines()[-1]
    done = run_optimum("--target-flops-reduction", "0.4", "--onnx", "--json", "report.json")
    assert done.returncode == 0, done.stderr
    assert "filters before" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["flops"]["reduction"] == pytest.approx(0.4, abs=0.01)
    report = json.loads((tmp_path / "out" / "kdfs_report.json").read_text())
    assert abs(report["flops"]["reduction"] - 0.4) < 0.01
    assert {"model.onnx", "widths.png", "model.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_augmentation_moves_pixels_and_keeps_labels():
    import torch

    rows = [{"pixel_values": torch.arange(3 * 16 * 16.0).view(3, 16, 16), "labels": index} for index in range(8)]
    plain, moved = ImageCollator(augment=False)(rows), ImageCollator()(rows)
    assert torch.equal(plain["pixel_values"][3], rows[3]["pixel_values"])
    assert not torch.equal(moved["pixel_values"], plain["pixel_values"])
    assert torch.equal(moved["labels"], torch.arange(8))
    assert set(moved["pixel_values"].unique().tolist()) <= set(range(3 * 16 * 16))
