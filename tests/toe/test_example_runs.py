"""Book-keeping of `examples/toe_train_vit.py`: a comparison that takes several starts."""

import argparse
import importlib
import importlib.util
import json
import sys

import pytest
from transformers import ViTConfig, ViTForImageClassification

from hf_efficient import ToEConfig
from hf_efficient.toe import speedup_bound


@pytest.fixture(scope="module")
def runs(repository):
    spec = importlib.util.spec_from_file_location("runs", repository / "examples" / "toe_train_vit_runs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def args(runs, tmp_path):
    values = dict.fromkeys(runs.RECIPE, 1) | {"epochs": 15, "learning_rate": 1e-3}
    values |= {
        "dataset": "some/cifar10",
        "preset": "deit",
        "fast_preset": "fast",
        "seeds": [0, 1],
        "compare": True,
        "arms": None,
    }
    values |= {"output": tmp_path / "output", "results": tmp_path / "results", "processes": 2, "final": False}
    (tmp_path / "results").mkdir()
    return argparse.Namespace(**values)


def finish(runs, args, arm, seed, hours):
    run = {"arm": arm, "seed": seed, "cpu_seconds": 3600 * hours, "recipe": runs.make_recipe(args, arm)}
    runs.run_file(args, arm, seed).write_text(json.dumps(run))


def stop_at(args, name, step, epoch, hours, whole=True):
    folder = args.output / name / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    log = [{"epoch": epoch, "cpu_seconds": 3600 * hours}, {"epoch": epoch, "eval_accuracy": 0.5}]
    text = json.dumps({"epoch": epoch, "log_history": log})
    (folder / "trainer_state.json").write_text(text if whole else text[:20])
    return folder


def test_jobs_of_a_comparison(runs, args):
    arms = [(arm, seed) for seed in (0, 1) for arm in ("full", "toe", "random", "short")]
    assert runs.list_jobs(args) == [*arms, ("fast", 0)]
    args.compare = False
    assert runs.list_jobs(args) == [("toe", 0), ("toe", 1)]
    args.arms = ["full", "fast"]
    assert runs.list_jobs(args) == [("full", 0), ("full", 1), ("fast", 0)]


def test_status_lists_what_is_done_under_way_and_missing(runs, args, capsys):
    finish(runs, args, "full", 0, 2.0)
    stop_at(args, "full-1", 5, 5.0, 0.75)
    stop_at(args, "toe-0", 3, 3.0, 0.25)
    runs.show_status(args, runs.list_jobs(args))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert "full-0 | done | 15 of 15 | 2.00 | 0.00" in lines
    assert "full-1 | under way | 5 of 15 | 0.75 | 1.25" in lines  # by the finished run of its arm
    assert "toe-0 | under way | 3 of 15 | 0.25 | ?" in lines
    assert "random-1 | missing | 0 of 15 | 0.00 | ?" in lines
    assert lines[-1] == "in all | | | 3.00 | 1.25 and more; --time measures it"
    hours = {"toe": 1.5, "random": 1.25, "fast": 1.0, "short": 2.0}
    (args.results / "timing.json").write_text(json.dumps({"core_hours": hours}))
    runs.show_status(args, runs.list_jobs(args))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert "toe-0 | under way | 3 of 15 | 0.25 | 1.25" in lines
    assert lines[-1] == "in all | | | 3.00 | 11.50"  # 1.25 + 1.25 + 1.5 + 2 * 1.25 + 1.0 + 2 * 2.0


def test_a_checkpoint_that_was_cut_short_is_passed_over(runs, args):
    whole = stop_at(args, "toe-0", 352, 1.0, 0.1)
    stop_at(args, "toe-0", 1056, 3.0, 0.3, whole=False)
    (args.output / "toe-0" / "checkpoint-704").mkdir()  # without the file that is written last
    assert runs.last_checkpoint(args.output / "toe-0")[0] == whole
    assert runs.last_checkpoint(args.output / "toe-1") is None


@pytest.mark.parametrize("name", ["learning_rate", "epochs", "preset", "dataset"])
def test_runs_of_another_recipe_are_no_part_of_the_comparison(name, runs, args):
    finish(runs, args, "toe", 0, 1.0)
    before = {"learning_rate": 1e-3, "epochs": 15, "preset": "'deit'", "dataset": "'cifar10'"}[name]
    setattr(args, name, "other")
    with pytest.raises(SystemExit, match=f"run-toe-0.json is of a run with {name} {before}, not 'other'; give the sa"):
        runs.train_all(args, runs.list_jobs(args))


def test_only_missing_runs_are_started(runs, args, capsys, monkeypatch):
    for arm, seed in runs.list_jobs(args):
        if (arm, seed) not in {("toe", 1), ("fast", 0)}:
            finish(runs, args, arm, seed, 1.0)
    # a stand-in for the script: it notes its run, and the one of the fast preset fails
    script = args.output.parent / "script.py"
    script.write_text("import sys\nopen(sys.argv[2] + sys.argv[3], 'w')\nsys.exit(sys.argv[2] == 'fast')\n")
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.chdir(args.output.parent)
    runs.train_all(args, runs.list_jobs(args))
    assert sorted(path.name for path in args.output.parent.glob("*[0-9]")) == ["fast0", "toe1"]
    assert sorted(capsys.readouterr().out.splitlines()) == ["fast-0: failed, start again to go on", "toe-1: done"]


OPTIONS = {
    "depth": 8,
    "image_size": 32,
    "patch_size": 4,
    "width": 128,
    "logging_steps": 50,
    "time": None,
    "gpu": False,
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0."),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0."),
        ({"processes": 0}, "--processes must be at least 1, got 0."),
        ({"time": 0}, "--time must be at least 1, got 0."),
        ({"depth": 1}, "--depth must be at least 2, got 1."),
        ({"patch_size": 64}, "--patch-size must not be above --image-size, got 64 > 32."),
        (
            {"fast_preset": "faster"},
            "--fast-preset: `name` must be one of 'deit', 'lv-vit', 'efficient-train', 'fast'",
        ),
    ],
)
def test_options_that_no_run_can_be_made_of_start_none(changed, message, runs, args, capsys):
    vars(args).update(OPTIONS)
    assert runs.check_arguments(argparse.ArgumentParser(), args) is args
    vars(args).update(changed)
    with pytest.raises(SystemExit) as error:
        runs.check_arguments(argparse.ArgumentParser(), args)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_fine_tuning_reads_no_arm_of_other_options_back(repository, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(repository / "examples")
    script = importlib.import_module("toe_finetune_vit")
    options = {"model": None, "epochs": 3, "learning_rate": 3e-4, "lora_learning_rate": 3e-3, "preset": "deit"}
    result = {"arm": "full", "seed": 0, "recipe": options}
    (tmp_path / "full-0.json").write_text(json.dumps(result))
    args = argparse.Namespace(output=tmp_path, scratch=tmp_path, **options)
    assert script.run(args, "full", 0) == result
    args.epochs = 10
    with pytest.raises(SystemExit, match=r"full-0.json is of a run with epochs 3, not 10"):
        script.run(args, "full", 0)


def test_the_short_arm_costs_what_toe_costs(runs, args):
    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(**size, image_size=32, patch_size=4))
    args.image_size = 32
    assert [runs.epochs_of(args, arm, model) for arm in ("full", "toe", "random", "fast")] == [15] * 4
    bound, stages = speedup_bound(model, 64, ToEConfig())
    assert runs.epochs_of(args, "short", model) == pytest.approx(15 * sum(stages) / 3)
    assert 1.1 < bound < 1.4


def test_trials_become_a_table(runs, args, repository, monkeypatch):
    monkeypatch.syspath_prepend(repository / "examples")
    report = importlib.import_module("toe_train_vit_card")
    assert report.choices_table(args.results, []) == []
    args.shift, args.batch_size = 4, 128
    finish(runs, args, "full", 0, 1.0)  # of the comparison itself: no trial
    run = {"arm": "toe", "seed": 9, "validation_accuracy": 0.5, "recipe": runs.make_recipe(args, "toe")}
    chosen = run | {"seed": 0, "validation_accuracy": 0.6, "test_accuracy": 0.4}
    folder = args.results / "choices" / "crop-4"
    folder.mkdir(parents=True)
    (folder / "run-toe-9.json").write_text(json.dumps(run))
    (table,) = report.choices_table(args.results, [chosen, chosen | {"seed": 1}, chosen | {"arm": "random"}])
    assert table["rows"] == [
        [4, 128, "0.001", 15, "ToE", 9, "50.00", ""],
        [4, 128, "0.001", 15, "ToE", 0, "60.00", "40.00"],
    ]
    assert "the last 1 rows" in table["note"]
    assert len(table["columns"]) == len(table["rows"][0])


def test_two_datasets_share_no_decoded_images(repository, tmp_path, monkeypatch):
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Picture

    monkeypatch.syspath_prepend(str(repository / "examples"))
    data = importlib.import_module("toe_train_vit_data")
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    for name, grey in (("first", 10), ("second", 200)):
        (tmp_path / name / "images").mkdir(parents=True)
        picture = Picture.new("RGB", (4, 4), (grey, grey, grey))
        rows = Dataset.from_dict({"image": [picture], "label": [0]}, features=features)
        rows.to_parquet(tmp_path / name / "images" / "train.parquet")
    found = [
        data.decode(str(tmp_path / name / "images"), "train", 4, tmp_path / "decoded")[0]
        for name in ("first", "second")
    ]
    assert [int(images[0, 0, 0, 0]) for images in found] == [10, 200]
