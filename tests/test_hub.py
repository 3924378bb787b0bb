"""Model cards and pushing, without network: what a card says, what leaves the machine and what must not."""

import copy
import json
import os
import pickle
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_efficient import hub
from hf_efficient.results import check_results, read_results, run_meta, whole_file, write_whole


RESULTS = {
    "name": "toy",
    "title": "A toy",
    "summary": "Answers `<image>` questions.",
    "method": "Keeps 20 % of the image tokens.",
    "paper": {"title": "A paper", "url": "https://arxiv.org/abs/2412.00876", "bibtex": "@article{a}"},
    "license": "apache-2.0",
    "datasets": [{"id": "easy-vqa", "name": "easy-VQA", "url": "https://example.org/easy-vqa", "license": "MIT"}],
    "pipeline_tag": "image-text-to-text",
    "tags": ["sparse"],
    "usage": "print('used')",
    "tables": [
        {
            "title": "Test",
            "columns": ["arm", "accuracy", "n"],
            "rows": [["dense", 95.3125, 9673], ["sparse", 95.0, 12345]],
        }
    ],
    "pictures": [{"file": "kept.png", "caption": "Kept patches"}],
    "metrics": [{"dataset": "easy-vqa", "split": "test", "type": "accuracy", "name": "Sparse", "value": 95.0}],
    "runs": [{"seed": 0, "accuracy": 95.0, "curve": [1, 2]}, {"seed": 1, "accuracy": 94.5, "note": "stopped early"}],
    "seeds": [0, 1],
    "limits": ["One image."],
    "meta": {
        "command": "python examples/toy.py",
        "commit": "0123456789ab",
        "date": "2026-01-02",
        "cpu": "A CPU, 2 cores",
        "threads": 1,
        "versions": {"torch": "2.14.1"},
    },
}


@pytest.fixture
def results() -> dict:
    return copy.deepcopy(RESULTS)


@pytest.fixture
def model() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config)


@pytest.fixture
def folder(tmp_path, model, results) -> Path:
    """A checkpoint folder after a training, with everything that must stay at home lying in it."""
    folder = tmp_path / "toy"
    model.save_pretrained(folder)
    Image.new("RGB", (4, 4)).save(folder / "kept.png")
    hub.write_results(folder, results)
    (folder / "modeling_toy.py").write_text("x = 1\n")
    torch.save({"lr": 1}, folder / "training_args.bin")
    torch.save({"w": torch.ones(1)}, folder / "pytorch_model.bin")
    (folder / "evil.pkl").write_bytes(pickle.dumps([1]))
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "trainer_state.json").write_text("{}")
    (folder / ".env").write_text("HF_TOKEN=secret")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.py").write_text("")
    return folder


@pytest.fixture
def remote(monkeypatch) -> SimpleNamespace:
    """Stand in for the Hub's client and keep what reaches it."""
    seen = SimpleNamespace(files={}, calls=[])

    class Api:
        def __init__(self, token=None):
            seen.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            seen.calls.append(("create_repo", repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

        def create_branch(self, repo_id, *, branch, exist_ok):
            seen.calls.append(("create_branch", repo_id, branch, exist_ok))

        def create_commit(self, repo_id, operations, *, commit_message, revision):
            seen.calls.append(("create_commit", repo_id, commit_message, revision))
            for operation in operations:
                with operation.as_file() as file:
                    seen.files[operation.path_in_repo] = file.read()
            return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/abc")

    monkeypatch.setattr(hub, "HfApi", Api)
    return seen


def front_matter(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.S)[1])


def test_card_carries_the_metadata_the_hub_reads(results):
    data = front_matter(hub.render_card(results))
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["easy-vqa"]
    assert data["tags"] == ["hf_efficient", "sparse"]
    assert "base_model" not in data
    (entry,) = data["model-index"][0]["results"]
    assert entry["dataset"] == {"name": "easy-VQA", "type": "easy-vqa", "split": "test"}
    assert entry["metrics"] == [{"type": "accuracy", "value": 95.0, "name": "Sparse"}]
    assert front_matter(hub.render_card({**results, "base_model": "a/b"}))["base_model"] == "a/b"


def test_card_has_the_same_headings_whatever_was_measured(results):
    bare = {**results, "tables": [], "metrics": [], "runs": [], "seeds": [], "limits": [], "datasets": []}
    bare = {key: value for key, value in bare.items() if key not in ("paper", "pictures", "tags")}
    for given in (results, bare):
        headings = re.findall(r"^## (.+)$", hub.render_card(given), re.M)
        assert headings == list(hub.HEADINGS)
    assert "model-index" not in front_matter(hub.render_card(bare))
    assert "Nothing was measured." in hub.render_card(bare)


def test_card_says_how_and_shows_every_run(results):
    card = hub.render_card(results)
    for words in (
        "`python examples/toy.py`",
        "0123456789ab",
        "A CPU, 2 cores",
        "Threads: 1",
        "2026-01-02",
        "torch 2.14.1",
        "Seeds: 0, 1",
    ):
        assert words in card
    assert "| dense | 95.31 | 9673 |\n| sparse | 95 | 12,345 |" in card
    assert "| seed | accuracy | note |" in card
    assert "| 0 | 95 |  |\n| 1 | 94.5 | stopped early |" in card
    assert "curve" not in card
    assert "![Kept patches](kept.png)" in card


def test_a_file_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "a.json"
    write_whole(file, "old")

    def break_off():
        with whole_file(file) as unfinished:
            unfinished.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert file.read_text() == "old"
    write_whole(file, "new")
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_card_is_a_function_of_the_file_alone(folder, results):
    card = (folder / "README.md").read_text()
    assert card == hub.render_card(json.loads((folder / "results.json").read_text())) == hub.render_card(results)
    (folder / "README.md").write_text("typed by hand")
    assert hub.write_card(folder).read_text() == card


def test_card_escapes_what_comes_from_outside(results):
    results["title"] = "cat <script>alert(1)</script> [x](http://evil)"
    results["tables"][0]["rows"][0][0] = "a|b\n# c <img src=x onerror=y> `d`"
    results["runs"][0]["picture"] = "<b>|.png"
    results["summary"] = "Words <iframe> and `<image>`."
    results["meta"]["command"] = "python x.py 'a`b`<i>'"
    card = hub.render_card(results)
    assert not re.search(r"<(script|img|iframe|b>)", card)
    assert r"\[x\](http://evil)" in card
    assert r"| a\|b # c &lt;img src=x onerror=y&gt; \`d\` | 95.31 | 9673 |" in card
    assert "`<image>`" in card
    assert "`python x.py 'a'b'<i>'`" in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("seeds"), "needs the field 'seeds'"),
        (lambda r: r.update(title=" "), "'title' must be a non-empty str, got ' '"),
        (lambda r: r.update(tables={}), "'tables' must be a list, got {}"),
        (lambda r: r.update(acuracy=1), "no field 'acuracy'; put what the schema lacks under 'details'"),
        (lambda r: r["meta"].pop("threads"), "entry of 'meta' lacks 'threads'"),
        (lambda r: r["pictures"][0].update(alt="x"), "entry of 'pictures' has no key 'alt'"),
        (lambda r: r["pictures"][0].update(file="../kept.png"), "got '../kept.png'"),
        (lambda r: r.update(name="a/b"), "got 'a/b'"),
        (lambda r: r["tables"][0]["rows"].append(["short"]), r"3 columns, but the row \['short'\] has 1 cells"),
        (lambda r: r["tables"][0].update(columns="arm"), "'Test' must hold lists under 'columns' and 'rows'"),
        (lambda r: r["tables"][0]["rows"].append(95.0), "'Test' must hold lists under 'columns' and 'rows'"),
        (lambda r: r["metrics"][0].update(value=float("nan")), "must be a finite number, got nan"),
        (lambda r: r["metrics"][0].update(value="95"), "must be a finite number, got '95'"),
        (lambda r: r["metrics"][0].update(dataset="cifar10"), "'cifar10', which is not an id of 'datasets'"),
        (lambda r: r["paper"].update(url="javascript:alert(1)"), r"got 'javascript:alert\(1\)'"),
        (lambda r: r.update(runs=[1]), "one dict per run, got 1"),
    ],
)
def test_results_that_break_the_schema_are_refused_in_one_sentence(results, change, message):
    check_results(results)
    change(results)
    with pytest.raises(ValueError, match=message):
        hub.render_card(results)


def test_results_file_errors(tmp_path, results):
    with pytest.raises(FileNotFoundError, match=r"results\.json does not exist"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"picture 'kept\.png'"):
        hub.write_results(tmp_path, results)
    assert (tmp_path / "results.json").read_text() == "{"
    results["pictures"] = []
    results["details"] = {"loss": float("inf")}
    with pytest.raises(ValueError, match="not JSON compliant"):
        hub.write_results(tmp_path, results)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json"]


def test_run_meta_names_command_commit_and_machine(monkeypatch, repository):
    monkeypatch.setattr(
        "sys.argv", [str(repository / "examples" / "x.py"), "--out=/home/me/a b.json", "/data/me/in.png", "1/2"]
    )
    meta = run_meta()
    assert meta["command"] == "python examples/x.py '--out=a b.json' in.png 1/2"
    monkeypatch.setattr("sys.argv", ["x.exe", r"--out=C:\Users\me\a.json", "D:/data/me/in.png", "a=b"])
    assert run_meta()["command"] == "x.exe --out=a.json in.png a=b"
    assert meta["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", meta["date"])
    assert (
        meta["versions"]["torch"] == torch.__version__.split("+")[0] or meta["versions"]["torch"] == torch.__version__
    )
    assert re.search(r", \d+ cores?$", meta["cpu"])
    assert run_meta("make it")["command"] == "make it"
    if (repository / ".git").exists():
        head = subprocess.run(["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        assert head.startswith(meta["commit"].removesuffix("+changes"))
    else:
        assert meta["commit"] is None


def test_push_takes_the_checkpoint_and_nothing_else(folder, remote, results):
    url = hub.push_checkpoint(folder, "me/toy", private=True, token="t", commit_message="First")
    assert url == "https://huggingface.co/me/toy/commit/abc"
    assert sorted(remote.files) == [
        "README.md",
        "config.json",
        "kept.png",
        "model.safetensors",
        "modeling_toy.py",
        "results.json",
    ]
    assert remote.token == "t"
    assert remote.calls == [("create_repo", "me/toy", True, True), ("create_commit", "me/toy", "First", None)]
    assert remote.files["README.md"].decode() == hub.render_card(results)
    assert remote.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_push_renders_the_card_again(folder, remote, results):
    (folder / "README.md").write_text("typed by hand, 99.9 %")
    hub.push_checkpoint(folder, "me/toy")
    assert remote.files["README.md"].decode() == hub.render_card(results)


def test_push_to_a_branch_creates_it_first(folder, remote):
    hub.push_checkpoint(folder, "toy", revision="v2")
    assert remote.calls[1:] == [
        ("create_branch", "me/toy", "v2", True),
        ("create_commit", "me/toy", "Upload toy with hf_efficient", "v2"),
    ]


def test_push_a_model_with_its_processor(model, remote, tmp_path):
    hub.push_checkpoint(model, "me/my-vit", processor=ViTImageProcessorPil())
    assert sorted(remote.files) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    for name, content in remote.files.items():
        (tmp_path / name).write_bytes(content)
    pushed = ViTForImageClassification.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(pushed.state_dict()[name], tensor, rtol=0, atol=0)
    card = remote.files["README.md"].decode()
    assert "Nothing was measured" in card
    assert "from_pretrained('me/my-vit')" in card


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_push_refuses_a_link_out_of_the_folder(folder, remote, tmp_path, kind):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text('{"password": 1}')
    target = tmp_path / "outside" / ("secret.json" if kind == "file" else "")
    (folder / "notes.json").symlink_to(target, target_is_directory=kind == "folder")
    with pytest.raises(ValueError, match=r"notes\.json is a link out of"):
        hub.push_checkpoint(folder, "me/toy")
    assert remote.calls == []


def test_push_follows_a_link_inside_the_folder(folder, remote):
    (folder / "preview.png").symlink_to(folder / "kept.png")
    hub.push_checkpoint(folder, "me/toy")
    assert remote.files["preview.png"] == (folder / "kept.png").read_bytes()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"holds no config\.json"),
        (lambda f: (f / "model.safetensors").unlink(), "pickled weights are not pushed"),
        (lambda f: torch.save({"w": torch.ones(9)}, f / "model.safetensors"), "not a safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(pickle.dumps([0] * 99)), "not a safetensors file"),
        (lambda f: os.truncate(f / "model.safetensors", 100), "not a safetensors file"),
        (lambda f: (f / "other.json").write_bytes(pickle.dumps([1])), "is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "config.json must hold one JSON object, got list"),
        (lambda f: (f / "kept.png").unlink(), r"picture 'kept\.png'"),
        (lambda f: (f / "results.json").write_text('{"name": "toy"}'), "needs the field 'title'"),
    ],
)
def test_push_refuses_broken_folders_before_any_request(folder, remote, spoil, message):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        hub.push_checkpoint(folder, "me/toy")
    assert remote.calls == []


def test_push_refuses_other_things(tmp_path, folder, remote):
    with pytest.raises(FileNotFoundError, match="missing is not a folder"):
        hub.push_checkpoint(tmp_path / "missing", "me/toy")
    with pytest.raises(ValueError, match="got int"):
        hub.push_checkpoint(3, "me/toy")
    with pytest.raises(ValueError, match="processor goes with a model"):
        hub.push_checkpoint(folder, "me/toy", processor=object())
    assert remote.calls == []


def test_damaged_header_is_seen_whatever_its_length(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert list(hub.checkpoint_files(tmp_path)) == ["config.json", "model.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="not a safetensors file"):
        hub.checkpoint_files(tmp_path)
