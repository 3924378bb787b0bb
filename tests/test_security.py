"""What leaves the machine and what comes in: no pickles, no names that lead out of a folder, harmless shipped code."""

import ast
import json
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Trainer, TrainingArguments

from hf_efficient import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    DynamicLlavaConfig,
    DynamicLlavaForConditionalGeneration,
    DynamicLlavaTrainer,
    DynamicLlavaTrainingArguments,
    Pix2PixConfig,
    Pix2PixDiscriminator,
    Pix2PixModel,
    Pix2PixTrainer,
    Pix2PixTrainingArguments,
)
from hf_efficient.kdfs.trainer_kdfs import DistillationTrainer


REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "hf_efficient"
SHIPPED = sorted(path for path in REPOSITORY.glob("model_cards/*/*.py"))
# readers of pickles and of archives, and what runs text as code
CLOSED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile", "zipfile"}
# beside these, code that comes down with a checkpoint has no use for the system it runs on
SHIPPED_CLOSED = CLOSED | {"subprocess", "socket", "ctypes", "multiprocessing", "http", "urllib", "ftplib"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}


# ------------------------------------------------------------------------------------------------------ what is pushed


def dynamic_llava(folder, **hub):
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=64)
    small = {"predictor_hidden_size": 16, "predictor_num_heads": 2, "predictor_intermediate_size": 16}
    config = DynamicLlavaConfig(vision_config=vision, text_config=text, image_token_id=63, image_seq_length=4, **small)
    args = DynamicLlavaTrainingArguments(folder, **hub)
    row = {"input_ids": [1, 63, 63, 63, 63, 2, 3, 4], "labels": [-100] * 6 + [3, 4]}
    rows = [{**row, "pixel_values": torch.zeros(3, 16, 16)}] * 2
    return DynamicLlavaTrainer(DynamicLlavaForConditionalGeneration(config), args, train_dataset=rows)


def pix2pix(folder, **hub):
    rows = [{name: torch.zeros(3, 16, 16) for name in ("pixel_values", "labels")}] * 2
    model = Pix2PixModel(Pix2PixConfig(image_size=16, num_levels=3, base_channels=2))
    discriminator = Pix2PixDiscriminator(16, base_channels=2)
    return Pix2PixTrainer(model, Pix2PixTrainingArguments(folder, **hub), discriminator, train_dataset=rows)


def kdfs(folder, **hub):
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, hidden_sizes=[4, 4, 4], image_size=8))
    rows = [{"pixel_values": torch.zeros(3, 8, 8), "labels": 1}] * 2
    args = TrainingArguments(folder, **hub)
    return DistillationTrainer(model, args, train_dataset=rows)


@pytest.fixture
def uploads(monkeypatch) -> list[dict[str, bytes]]:
    """What each `upload_folder` would send: path in the repository -> contents."""
    seen = []

    def upload_folder(self, *, folder_path, allow_patterns=None, ignore_patterns=None, run_as_future=False, **kwargs):
        names = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        names = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        seen.append({name: (Path(folder_path) / name).read_bytes() for name in names})
        done = Future()
        done.set_result("commit")
        return done if run_as_future else "commit"

    def init_hf_repo(self, token=None, private=None):
        self.hub_model_id, self.push_in_progress = "me/toy", None

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(Trainer, "init_hf_repo", init_hf_repo)
    monkeypatch.setattr(Trainer, "create_model_card", lambda self, **kwargs: None)
    return seen


def is_pickle(content: bytes) -> bool:
    return content[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@pytest.mark.parametrize("make", [dynamic_llava, pix2pix, kdfs], ids=lambda make: make.__name__)
def test_no_pickle_is_pushed_from_a_training(make, uploads, tmp_path):
    """By `push_to_hub` at the end, and after each save with the strategy that uploads optimiser states elsewhere."""
    hub = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True, "save_steps": 1}
    common = {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    trainer = make(str(tmp_path / "run"), **hub, **common)
    trainer.save_model(str(tmp_path / "run"), _internal_call=True)
    assert (tmp_path / "run" / "training_args.bin").is_file(), "what must not be pushed lies there"
    trainer.train()
    while_training = len(uploads)
    assert while_training >= 1
    trainer.push_to_hub()
    assert len(uploads) == while_training + 1
    for files in uploads:
        assert {"config.json", "model.safetensors"} <= set(files)
        pickles = [name for name, content in files.items() if is_pickle(content)]
        assert not pickles
        assert not [name for name in files if "discriminator" in name or "trainer_state" in name]
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert (checkpoint / "optimizer.pt").is_file(), "a run still resumes from its own disk"
    assert uploads[-1]["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("make", [dynamic_llava, pix2pix, kdfs], ids=lambda make: make.__name__)
def test_training_arguments_stay_where_nothing_is_pushed(make, tmp_path):
    trainer = make(str(tmp_path / "run"), use_cpu=True, report_to="none")
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "training_args.bin").is_file()


# ------------------------------------------------------------------------------------------------------- what comes in


def faults(source: str, closed: set[str]) -> list[str]:
    """Imports and calls that can run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        found += [f"line {node.lineno}: import of {name}" for name in names if name.split(".")[0] in closed]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in RUNS_TEXT or called in ("os.system", "os.popen", "shutil.unpack_archive"):
            found.append(f"line {node.lineno}: {called}()")
        if called == "torch.load" and settings.get("weights_only") != "True":
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if settings.get("allow_pickle") == "True" or settings.get("shell") == "True":
            found.append(f"line {node.lineno}: {called}() with pickles or a shell")
        if settings.get("use_safetensors") == "False":
            found.append(f"line {node.lineno}: {called}() asks for pickled weights")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_package_reads_no_pickles_and_unpacks_no_archives(path):
    assert not faults(path.read_text(encoding="utf-8"), CLOSED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_code_in_a_checkpoint_keeps_to_itself(path):
    """What `trust_remote_code=True` runs: only packages that any checkpoint needs, no network, no processes."""
    source = path.read_text(encoding="utf-8")
    assert not faults(source, SHIPPED_CLOSED)
    allowed = {"torch", "numpy", "PIL", "transformers", "huggingface_hub", "safetensors", "torchvision"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert (path.parent / f"{node.module}.py").is_file(), f"{node.module} does not travel along"
            continue
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        for name in names:
            assert name.split(".")[0] in allowed | sys.stdlib_module_names, f"{path.name} imports {name}"


def test_checkpoints_are_scanned():
    assert {path.parent.name for path in SHIPPED} >= {"dynamic-llava-easy-vqa", "dynamic-llava-scenes"}


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import pickle", "import of pickle"),
        ("def f():\n    from zipfile import ZipFile", "import of zipfile"),
        ("torch.load(file)", "without weights_only=True"),
        ("torch.load(file, weights_only=False)", "without weights_only=True"),
        ("np.load(file, allow_pickle=True)", "with pickles"),
        ("subprocess.run(line, shell=True)", "a shell"),
        ("M.from_pretrained(x, use_safetensors=False)", "pickled weights"),
        ("exec(text)", "exec()"),
    ],
)
def test_the_scan_catches(source, fault):
    assert any(fault in found for found in faults(source, CLOSED))


def test_the_scan_lets_pass():
    source = "import torch\nmodel.eval()\nre.compile(x)\ntorch.load(f, weights_only=True)\ntorch.compile(model)\n"
    assert faults(source, CLOSED) == []


# ------------------------------------------------------------------------------------- names that lead out of a folder


@pytest.fixture
def llava(tmp_path) -> Path:
    """A stock LLaVA with a tokenizer in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=64)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=3, image_seq_length=4)
    folder = tmp_path / "llava"
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "</s>", "<image>", "w"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(image_processor=images, tokenizer=fast, patch_size=8, image_token="<image>").save_pretrained(folder)
    return folder


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["../../outside", "{root}/outside", "..\\..\\outside/../../x"])
def test_the_name_of_a_chat_template_cannot_leave_the_folder(llava, tmp_path, capsys, name):
    from hf_efficient import cli

    config = json.loads((llava / "tokenizer_config.json").read_text())
    name = name.format(root=tmp_path)  # an absolute one as well
    config["chat_template"] = [{"name": "default", "template": "x"}, {"name": name, "template": "owned"}]
    (llava / "tokenizer_config.json").write_text(json.dumps(config))
    (llava / "chat_template.jinja").unlink(missing_ok=True)
    before = tree(tmp_path)
    code = cli.main(["convert-llava", str(llava), str(tmp_path / "sparse"), "--quiet"])
    new = {path for path in tree(tmp_path) - before if not path.startswith("sparse")}
    assert not new
    if code:
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("hf-efficient convert-llava: error: ")
        assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "sub/../../x.safetensors"])
def test_an_index_cannot_name_files_of_another_folder(llava, tmp_path, capsys, name):
    from hf_efficient import cli

    (llava / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (llava / "model.safetensors.index.json").write_text(json.dumps(index))
    assert cli.main(["convert-llava", str(llava), str(tmp_path / "sparse"), "--quiet"]) == 2
    assert "names safetensors files of its own folder" in capsys.readouterr().err
    assert not (tmp_path / "sparse").exists()


def test_code_beside_a_source_is_never_run(llava, tmp_path, monkeypatch):
    """A converter reads configuration, weights and tokenizer of a checkpoint; its Python files are not looked at."""
    from hf_efficient import cli

    (llava / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name, keys in (("config.json", ("AutoConfig", "AutoModel")), ("processor_config.json", ("AutoProcessor",))):
        config = json.loads((llava / name).read_text()) if (llava / name).is_file() else {}
        config["auto_map"] = dict.fromkeys(keys, "evil.Evil")
        (llava / name).write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to run code"))
    cli.main(["convert-llava", str(llava), str(tmp_path / "sparse"), "--quiet"])
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "sparse" / "evil.py").exists()


def test_pictures_of_a_folder_are_written_below_dest(tmp_path):
    """Names are taken relative to the source, also behind a link that leads elsewhere."""
    from PIL import Image

    from hf_efficient import cli

    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (12, 12)).save(tmp_path / "elsewhere" / "linked.png")
    (tmp_path / "photos" / "...").mkdir(parents=True)
    Image.new("RGB", (12, 12)).save(tmp_path / "photos" / "..." / "a b;$(x).png")
    (tmp_path / "photos" / "link.png").symlink_to(tmp_path / "elsewhere" / "linked.png")
    before = tree(tmp_path)
    assert cli.main(["cartoonize", str(tmp_path / "photos"), str(tmp_path / "out"), "--quiet"]) == 0
    new = tree(tmp_path) - before
    assert new
    assert all(path.split("/")[0] == "out" for path in new)
