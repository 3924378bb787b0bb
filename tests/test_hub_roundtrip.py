"""Checkpoints go to a Hub on the loopback and come back into clean processes; slow, several processes each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from local_hub import LocalHub
from PIL import Image
from test_model_cards import CARDS, EXPECTED
from transformers import CLIPVisionConfig, LlamaConfig

from hf_efficient import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from hf_efficient.results import read_results


pytestmark = pytest.mark.slow
PUSH = """
import sys
from hf_efficient import push_checkpoint
folder, repo, private, revision = sys.argv[1:]
print(push_checkpoint(folder, repo, private=private == "private", revision=revision or None))
"""
PUSH_THRICE = """
import sys
from hf_efficient import push_checkpoint
try:
    push_checkpoint(*sys.argv[1:])
except Exception as error:
    print(type(error).__name__, "broke")
push_checkpoint(*sys.argv[1:])
push_checkpoint(*sys.argv[1:])
"""
FETCH = """
import sys
from huggingface_hub import hf_hub_download
hf_hub_download(sys.argv[1], "config.json")
"""
LOAD = """
import sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
repo, revision, local = sys.argv[1:]
sys.modules["hf_efficient"] = None
config = AutoConfig.from_pretrained(repo, revision=revision, trust_remote_code=True)
assert config.model_type == "dynamic_llava"
assert type(config).__module__.startswith("transformers_modules."), type(config)
inner = AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(repo, revision=revision, trust_remote_code=True)
from safetensors.torch import load_file
stored = load_file(local)
pushed = {name.removeprefix("model."): value for name, value in inner.state_dict().items()}
same = [any(torch.equal(value, other) for other in stored.values() if other.shape == value.shape) for value in pushed.values()]
assert pushed and all(same)
model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2)
"""  # noqa: E501

LOAD_CARD = """
import sys
import transformers
from PIL import Image
sys.modules["hf_efficient"] = None
repo, trust, task, sample, *classes = sys.argv[1:]
flag = {"trust_remote_code": True} if trust == "trust" else {}
for name in classes:
    loaded = getattr(transformers, name).from_pretrained(repo, **flag)
    home = "transformers_modules." if flag and "Processor" not in name else "transformers"
    assert type(loaded).__module__.startswith(home), type(loaded)
pipe = transformers.pipeline(task, model=repo, **flag)
image = Image.open(sample)
if task == "image-text-to-text":
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what color is the shape?"}]
    print(pipe(text=[{"role": "user", "content": content}], max_new_tokens=3))
else:
    print(pipe(image))
"""


@pytest.fixture
def hub():
    with LocalHub() as server:
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=64, pad_token_id=0
    )
    small = {"predictor_hidden_size": 16, "predictor_num_heads": 2, "predictor_intermediate_size": 16}
    config = DynamicLlavaConfig(vision_config=vision, text_config=text, image_token_id=63, image_seq_length=4, **small)
    model = DynamicLlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "sparse")
    torch.save({"lr": 1}, tmp_path / "sparse" / "training_args.bin")
    Image.new("RGB", (8, 8)).save(tmp_path / "sparse" / "preview.png")
    return tmp_path / "sparse"


def client(
    code: str, *arguments: object, hub: LocalHub, home: Path, token: str | None = "hf_local"
) -> tuple[int, str]:
    environment = {**os.environ, **hub.client_environment(home, token)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home.parent, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_push_and_load(hub, folder, tmp_path):
    code, output = client(PUSH, folder, "me/sparse", "public", "", hub=hub, home=tmp_path / "a")
    assert code == 0, output
    pushed = hub.files("me/sparse")
    assert "training_args.bin" not in pushed
    for name in ("config.json", "model.safetensors", "modeling_dynamic_llava.py", "preview.png"):
        assert pushed[name] == (folder / name).read_bytes()
    assert b"pipeline_tag: image-text-to-text" in pushed["README.md"]

    weights = folder / "model.safetensors"
    code, output = client(LOAD, "me/sparse", "main", weights, hub=hub, home=tmp_path / "b", token=None)
    assert code == 0, output
    refused = LOAD.replace(", trust_remote_code=True", ", trust_remote_code=False")
    code, output = client(refused, "me/sparse", "main", weights, hub=hub, home=tmp_path / "c", token=None)
    assert code != 0
    assert "trust_remote_code=True" in output
    assert not list((tmp_path / "c").rglob("modeling_dynamic_llava.py")), "code came down without the flag"


@pytest.mark.parametrize("name", sorted(path.name for path in CARDS.iterdir() if path.is_dir()))
def test_every_published_checkpoint(hub, name, tmp_path):
    """Pushed as it lies in model_cards/, it loads and answers from an empty cache where the package is missing."""
    classes, trust = EXPECTED[name]
    results = read_results(CARDS / name)
    picture = results.get("sample") or results["pictures"][0]  # any picture will do
    sample, repo = CARDS / name / picture["file"], f"me/{name}"
    code, output = client(PUSH, CARDS / name, repo, "public", "", hub=hub, home=tmp_path / "a")
    assert code == 0, output
    assert {key: (CARDS / name / key).read_bytes() for key in hub.files(repo) if key != ".gitattributes"} == {
        key: value for key, value in hub.files(repo).items() if key != ".gitattributes"
    }
    arguments = results["pipeline_tag"], sample, *classes
    flag = "trust" if trust else "plain"
    code, output = client(LOAD_CARD, repo, flag, *arguments, hub=hub, home=tmp_path / "b", token=None)
    assert code == 0, output
    if trust:
        code, output = client(LOAD_CARD, repo, "plain", *arguments, hub=hub, home=tmp_path / "c", token=None)
        assert code != 0
        assert "trust_remote_code=True" in output
        assert not list((tmp_path / "c").rglob("modeling_*.py")), "code came down without the flag"


def test_push_to_a_revision_leaves_main_alone(hub, folder, tmp_path):
    code, output = client(PUSH, folder, "me/sparse", "public", "v2", hub=hub, home=tmp_path / "a")
    assert code == 0, output
    assert hub.files("me/sparse") == {}
    assert "config.json" in hub.files("me/sparse", "v2")


def test_private_repository_needs_the_token(hub, folder, tmp_path):
    code, output = client(PUSH, folder, "me/secret", "private", "", hub=hub, home=tmp_path / "a")
    assert code == 0, output
    assert hub.repos["me/secret"]["private"]
    code, output = client(FETCH, "me/secret", hub=hub, home=tmp_path / "b", token=None)
    assert code != 0
    assert "RepositoryNotFoundError" in output
    code, output = client(FETCH, "me/secret", hub=hub, home=tmp_path / "c")
    assert code == 0, output


def test_push_without_token_is_refused_in_one_sentence(hub, folder, tmp_path):
    command = "import sys\nfrom hf_efficient.cli import main\nsys.exit(main(['push', *sys.argv[1:]]))"
    code, output = client(command, folder, "me/sparse", hub=hub, home=tmp_path / "a", token=None)
    assert code == 2, output
    assert "hf-efficient push: error: " in output
    assert "Traceback" not in output
    assert hub.repos == {}


def test_broken_push_is_taken_up_again(hub, folder, tmp_path):
    hub.breaks_once = True
    code, output = client(PUSH_THRICE, folder, "me/sparse", hub=hub, home=tmp_path / "a")
    assert code == 0, output
    assert "broke" in output.splitlines()[0]
    assert hub.files("me/sparse")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert len(hub.repos["me/sparse"]["commits"]) == 3, "the empty one and two pushes; a broken push leaves none"
    uploads = [request for request in hub.requests if request.startswith("PUT /objects/")]
    assert len(uploads) == 2, "the one that broke and the one that arrived; what is there is not sent again"
