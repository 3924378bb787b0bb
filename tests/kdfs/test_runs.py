"""The long comparison on CIFAR-10 survives lost machines: what is kept, skipped, resumed and refused."""

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def runs(monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository / "examples"))
    return importlib.import_module("kdfs_prune_cifar_runs")


ARMS = {
    "kdfs": SimpleNamespace(kind="kdfs", depth=20),
    "kdfs_55": SimpleNamespace(kind="kdfs", depth=20),
    "dense": SimpleNamespace(kind="dense", depth=20),
}


def result(arm="kdfs", seed=0, **changes):
    return {"arm": arm, "seed": seed, "accuracy": 0.5, "core_hours": 2.0, "recipe": {"epochs": 20.0}, **changes}


def checkpoint(folder, step, total):
    (folder / f"checkpoint-{step}").mkdir(parents=True)
    state = {"global_step": step, "max_steps": total}
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))


def test_a_finished_run_is_kept_with_its_weights(runs, tmp_path):
    network = tmp_path / "model"
    network.mkdir()
    for name in (*runs.WEIGHTS, "modeling.py", "optimizer.pt"):
        (network / name).write_text(name)
    results = runs.Results(tmp_path / "results")
    assert results.load("kdfs", 0) is None
    results.save(result(), network)
    results.save(result(seed=1))
    assert results.load("kdfs", 0)["accuracy"] == 0.5
    assert {run["seed"] for run in results.all()} == {0, 1}
    kept = {
        str(path.relative_to(tmp_path / "results")) for path in (tmp_path / "results").rglob("*") if path.is_file()
    }
    assert kept == {"kdfs-0.json", "kdfs-1.json", *(f"kdfs-0/{name}" for name in runs.WEIGHTS)}


def test_another_recipe_is_refused(runs, tmp_path):
    runs.check_recipe(result(), {"epochs": 20.0}, tmp_path)
    with pytest.raises(SystemExit, match=r"kdfs seed 0 with epochs 20\.0 instead of 5\.0"):
        runs.check_recipe(result(), {"epochs": 5.0}, tmp_path)


def test_a_recipe_holds_the_options_that_the_arm_uses(runs, tmp_path):
    options = SimpleNamespace(**dict.fromkeys(runs.RECIPE, 1.0), weights=tmp_path)
    dense = SimpleNamespace(kind="dense", depth=20, distil=False)
    assert set(runs.recipe(options, dense)) == {*runs.TRAINING, "start"}
    distilled = {*runs.TRAINING, *runs.DISTILLATION, "start"}
    assert set(runs.recipe(options, SimpleNamespace(kind="torch_pruning", depth=20, distil=True))) == distilled
    scratch = SimpleNamespace(kind="scratch", depth=20, distil=False)
    assert set(runs.recipe(options, scratch)) == {*runs.RECIPE, "start"}
    options.epochs = None
    given = runs.recipe(options, dense)
    assert given["epochs"] == 20.0
    (tmp_path / runs.START).write_text(json.dumps({"epochs": 60.0, "accuracy": 0.86}))
    with pytest.raises(SystemExit, match=r"with start 0\.86 instead of None"):
        runs.check_recipe(result(recipe=runs.recipe(options, dense)), given, tmp_path)


def test_trials_for_the_recipe_become_a_table(runs, tmp_path):
    card = importlib.import_module("kdfs_prune_cifar_card")
    assert card.choices_table(tmp_path) == []
    common = {
        "arm": "torch_pruning_kd",
        "title": "Torch-Pruning",
        "images": 5000,
        "epochs": 6.0,
        "teacher_accuracy": 0.9,
    }
    for name, kd, accuracy in (("a", 1.0, 0.8), ("b", 4.0, 0.85)):
        (tmp_path / name).mkdir()
        settings = dict.fromkeys(runs.RECIPE, 6.0) | {"kd_weight": kd, "flops_weight": 100 * accuracy}  # not used
        run = common | {"recipe": settings, "accuracy": accuracy}
        (tmp_path / name / "torch_pruning_kd-0.json").write_text(json.dumps(run))
    (table,) = card.choices_table(tmp_path)
    assert table["columns"] == ["network", "kd weight", "accuracy, %"]
    assert table["rows"] == [["Torch-Pruning", "4", "85.00"], ["Torch-Pruning", "1", "80.00"]]
    assert "has seen them (90.00 %)" in table["note"]
    for file in tmp_path.glob("*/*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"start": {"epochs": 60.0}}))
    (table,) = card.choices_table(tmp_path)
    assert "trained for 60 epochs on the other rows alone (90.00 % on these)" in table["note"]


def test_a_network_to_start_from_is_read_as_it_was_written(runs, tmp_path):
    from hf_efficient import CifarResNetConfig, CifarResNetForImageClassification

    start = importlib.import_module("kdfs_prune_cifar_start")
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, num_labels=3))
    start.write_original(model, tmp_path / "resnet20_jpeg.safetensors")
    again = CifarResNetForImageClassification.from_original(tmp_path / "resnet20_jpeg.safetensors")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["resnet20_jpeg.safetensors"]


def test_a_half_done_run_goes_on_with_its_recipe_only(runs, tmp_path):
    runs.begin_run(tmp_path / "kdfs-0", "kdfs", 0, {"epochs": 20.0})
    runs.begin_run(tmp_path / "kdfs-0", "kdfs", 0, {"epochs": 20.0})
    with pytest.raises(SystemExit, match=r"epochs 20\.0 instead of 5\.0"):
        runs.begin_run(tmp_path / "kdfs-0", "kdfs", 0, {"epochs": 5.0})


HOLD = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_claim_ends_with_its_process(runs, tmp_path):
    with runs.claim(tmp_path / "run") as mine:
        assert mine
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run" / "claim")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline().strip() == "held"
        with runs.claim(tmp_path / "run") as mine:
            assert not mine
    finally:
        other.kill()
        other.communicate()
    with runs.claim(tmp_path / "run") as mine:
        assert mine


def test_status_lists_done_half_done_and_missing(runs, tmp_path, capsys):
    output = tmp_path / "final"
    results = runs.Results(tmp_path / "results")
    results.save(result())
    training = output / "kdfs-1" / "training"
    checkpoint(training / "sampling", 50, 100)
    (training / "kdfs_run.json").write_text(json.dumps({"steps": [100, 100]}))
    (output / "kdfs-1" / "cpu_seconds.json").write_text(json.dumps({"seconds": 1800.0}))
    checkpoint(output / "dense-0" / "training", 30, 40)
    (output / "dense-0" / "training" / "checkpoint-40").mkdir()  # cut off while it was written
    (tmp_path / "estimate.json").write_text(json.dumps({"dense": 4.0}))
    plan = [("kdfs", 0), ("kdfs", 1), ("dense", 0), ("kdfs_55", 0)]
    found = runs.show_status(plan, ARMS, results, output)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == "kdfs seed 0 done 0.5000 2.00"
    assert lines[2] == "kdfs seed 1 25% done 0.50, about 1.50 left"
    assert lines[3] == "dense seed 0 75% done 0.00, about 1.00 left"
    assert lines[4] == "kdfs_55 seed 0 missing 0.00, about 2.00 left"
    assert found == {"done": 1, "missing": 3, "core_hours": 2.5, "core_hours_left": 4.5}


def test_sampling_that_is_done_counts_whole(runs, tmp_path):
    training = tmp_path / "training"
    checkpoint(training / "fine_tuning", 50, 100)
    (training / "kdfs_run.json").write_text(json.dumps({"steps": [100, 100]}))
    (training / "sampled.safetensors").write_text("")
    assert runs.progress(tmp_path) == 0.75
    (tmp_path / "trained.json").write_text("{}")
    assert runs.progress(tmp_path) == 1.0


def test_core_seconds_add_up_over_sittings(runs, tmp_path, monkeypatch):
    now = [10.0]
    monkeypatch.setattr(runs.time, "process_time", lambda: now[0])
    for expected in (5.0, 10.0):
        clock = runs.CpuClock(tmp_path / "seconds.json")
        now[0] += 5.0
        assert clock.seconds() == expected
        clock.on_save(None, None, None)


def test_every_kind_of_run_can_be_estimated(runs, tmp_path, monkeypatch):
    script = importlib.import_module("kdfs_prune_cifar")
    monkeypatch.setattr(script.faulthandler, "enable", lambda: None)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    monkeypatch.setattr(script.tempfile, "tempdir", str(tmp_path))
    arms = ["dense", "kdfs", "random"]
    monkeypatch.setattr(sys, "argv", ["kdfs_prune_cifar.py", "--smoke", "--estimate", "--quiet", "--arm", *arms])
    script.main()
    (file,) = tmp_path.glob("kdfs_cifar_*/estimate.json")
    hours = json.loads(file.read_text())
    assert list(hours) == arms
    assert all(value > 0 for value in hours.values())


@pytest.mark.slow
def test_the_comparison_goes_on_where_it_was(repository, tmp_path):
    """Two arms, started anew: nothing is trained twice, and a run that only lacks its result is measured alone."""
    script = repository / "examples" / "kdfs_prune_cifar.py"
    code = (
        "import sys, tempfile; out, make = sys.argv.pop(), tempfile.mkdtemp\n"
        "tempfile.mkdtemp = lambda **kw: out if kw['prefix'] == 'kdfs_cifar_' else make(**kw)\n"
        f"sys.path.insert(0, {str(script.parent)!r}); import runpy\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    arguments = ["--smoke", "--quiet", "--arm", "kdfs", "dense", "scratch", "--results", str(tmp_path / "kept")]

    def start():
        command = [sys.executable, "-c", code, *arguments, str(tmp_path / "out")]
        (tmp_path / "out").mkdir(exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = start()
    kept = tmp_path / "kept" / "final"
    documents = {path.name: path.read_text() for path in kept.glob("*-0.json")}
    assert set(documents) == {"kdfs-0.json", "dense-0.json", "scratch-0.json"}
    assert all(len(text) < 12_000 for text in documents.values())
    assert first.count("trained; measuring") == 3
    (kept / "kdfs-0.json").unlink()
    second = start()
    assert second.count("trained; measuring") == 1
    assert "train_runtime" not in second
    again = json.loads((kept / "kdfs-0.json").read_text())
    before = json.loads(documents["kdfs-0.json"])
    assert again["accuracy"] == before["accuracy"]
    assert again["macs"] == before["macs"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--card mine", "--card: mine holds other files, which would be deleted: name a new folder."),
        ("--card new --arm dense", "--card needs the arm kdfs with seed 0: add them to --arm and --seed."),
        ("--card new", "--card: w holds no LICENSE, which goes with the networks: put it there."),
        ("--card new --seed 1", "--card needs the arm kdfs with seed 0: add them to --arm and --seed."),
    ],
)
def test_a_card_that_cannot_be_written_stops_at_once(runs, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    script = importlib.import_module("kdfs_prune_cifar")
    monkeypatch.setattr(script, "run_meta", lambda: pytest.fail("work began"))
    monkeypatch.setattr(script.faulthandler, "enable", lambda: None)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    given = ["--data", "d", "--weights", "w", *options.split()]
    monkeypatch.setattr(sys, "argv", ["kdfs_prune_cifar.py", *given])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert message in f"{stopped.value}{capsys.readouterr().err}"
    assert (tmp_path / "mine" / "letter.txt").read_text() == "mine"


def test_a_process_that_finds_nothing_to_do_ends_without_results(runs, tmp_path):
    """All runs are in other hands, and none is done: the folder of the results is not there yet."""
    script = importlib.import_module("kdfs_prune_cifar")
    assert script.collect(runs.Results(tmp_path / "results" / "final"), {}, final=True)["runs"] == []
    assert json.loads((tmp_path / "results" / "final" / "results.json").read_text())["runs"] == []
