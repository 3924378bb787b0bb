"""Every folder in model_cards/ is a Hub repository: card from results, nothing pickled, loads without this package."""

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors import safe_open

from hf_efficient import hub
from hf_efficient.results import read_results


REPOSITORY = Path(__file__).resolve().parent.parent
CARDS = REPOSITORY / "model_cards"
DYNAMIC_LLAVA = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoProcessor",
)
# checkpoint -> how it loads: Auto classes, and whether the trust flag is needed
EXPECTED = {
    "dynamic-llava-easy-vqa": (DYNAMIC_LLAVA, True),
    "dynamic-llava-scenes": (DYNAMIC_LLAVA, True),
    "vit-toe-cifar10": (("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoImageProcessor"), False),
    "resnet20-kdfs-cifar10": (
        ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoImageProcessor"),
        True,
    ),
    "resnet20-cifar10": (("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoImageProcessor"), True),
    "pix2pix-cartoon2photo": (("AutoConfig", "AutoModel", "AutoModelForImageToImage", "AutoImageProcessor"), True),
}
MAX_FILE_BYTES, MAX_PICTURE_BYTES = 8 * 1024**2, 1024**2
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def present() -> list[str]:
    return sorted(path.name for path in CARDS.iterdir() if path.is_dir()) if CARDS.is_dir() else []


every_card = pytest.mark.parametrize("name", sorted({*EXPECTED, *present()}))


@every_card
def test_card_renders_again_identically(name):
    results = read_results(CARDS / name)
    assert results["name"] == name
    assert (CARDS / name / "README.md").read_text(encoding="utf-8") == hub.render_card(results)


@every_card
def test_card_is_what_the_hub_reads(name):
    card = (CARDS / name / "README.md").read_text(encoding="utf-8")
    data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.S)[1])
    assert data["pipeline_tag"]
    assert data["license"]
    assert "hf_efficient" in data["tags"]
    results = data["model-index"][0]["results"]
    assert [metric for entry in results for metric in entry["metrics"]], "no measured number in the model-index"
    assert re.findall(r"^## (.+)$", card, re.M) == list(hub.HEADINGS)


@every_card
def test_numbers_say_where_they_come_from(name):
    results = read_results(CARDS / name)
    assert results["runs"], "results.json holds every run"
    assert results["seeds"]
    assert re.fullmatch(r"[0-9a-f]{7,40}(\+changes)?", results["meta"]["commit"])
    script = re.search(r"examples/\w+\.py", results["meta"]["command"])
    assert script, f"the command names no example: {results['meta']['command']}"
    assert (REPOSITORY / script[0]).is_file()
    assert not re.search(r"/(root|home|tmp|work)/", json.dumps(results)), "a path of one machine"


@every_card
def test_files_are_those_of_a_repository(name):
    """Exactly what is pushed lies in the folder: nothing pickled, nothing left over, nothing large."""
    folder = CARDS / name
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(files) == set(hub.checkpoint_files(folder))
    assert {"README.md", "results.json", "config.json", "model.safetensors"} <= set(files)
    for key, path in files.items():
        assert path.stat().st_size <= MAX_FILE_BYTES, f"{key} has {path.stat().st_size} bytes"
        if path.suffix in PICTURES:
            assert path.stat().st_size <= MAX_PICTURE_BYTES, f"{key} has {path.stat().st_size} bytes"
            Image.open(path).verify()
    shown = {picture["file"] for picture in read_results(folder).get("pictures", [])}
    assert shown, "a card shows at least one picture"


@every_card
def test_weights_are_half_precision(name):
    with safe_open(CARDS / name / "model.safetensors", "pt") as weights:
        kinds = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118 - not a dict
    assert kinds <= {"F16", "BF16", "I64", "U8", "BOOL"}, kinds


@every_card
def test_shipped_code_is_that_of_the_package(name):
    shipped = sorted((CARDS / name).glob("*.py"))
    assert bool(shipped) == EXPECTED[name][1], "code lies beside the weights exactly where the trust flag is needed"
    for copy in shipped:
        (source,) = (REPOSITORY / "hf_efficient").glob(f"*/{copy.name}")
        assert copy.read_bytes() == source.read_bytes(), (
            f"{copy.name} differs from {source}; save the checkpoint again"
        )


@every_card
def test_usage_is_python_and_names_the_checkpoint(name):
    usage = read_results(CARDS / name)["usage"]
    compile(usage, name, "exec")
    assert name in usage
    assert "hf_efficient" not in usage, "the card's snippet works where hf_efficient is not installed"


LOAD_ALL = """
import json, warnings
from pathlib import Path
import transformers
folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
for name, (classes, trust) in cases.items():
    for auto in classes:
        kwargs = {"trust_remote_code": True} if trust else {}
        if auto.startswith("AutoModel"):
            kwargs["output_loading_info"] = True
        loaded = getattr(transformers, auto).from_pretrained(folder / name, **kwargs)
        if auto.startswith("AutoModel"):
            loaded, info = loaded
            missing = {key for key in info["missing_keys"] if not key.startswith("pooler.")}  # no part of a classifier
            assert not missing, (name, auto, info)
            assert auto == "AutoModel" or not info["unexpected_keys"], (name, auto, info)
            home = "transformers_modules" if trust else "transformers."
            assert type(loaded).__module__.startswith(home), type(loaded)
        print(name, auto, type(loaded).__name__)
"""


def test_all_load_where_neither_this_package_nor_torchvision_can_be_imported(clean_process):
    cases = {name: EXPECTED[name] for name in present()}
    done = clean_process(LOAD_ALL, CARDS, json.dumps(cases), block=("hf_efficient", "torchvision"))
    assert len(done.stdout.splitlines()) >= sum(len(classes) for classes, _ in cases.values())


ANSWER = """
import torch
from pathlib import Path
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = Path(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert processor.tokenizer.padding_side == "left"
def ask(text):
    return [{"role": "user", "content": [{"type": "image", "image": Image.open(sys.argv[2])}, {"type": "text", "text": text}]}]
batch = [ask(sys.argv[3]), ask(sys.argv[3] + " " + sys.argv[3])]
inputs = processor.apply_chat_template(batch, add_generation_prompt=True, tokenize=True, return_dict=True, padding=True, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
words = processor.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
assert words[0].strip(), words
kept = [len(index) for row in model.last_sparsity.image_index for index in row]
tokens = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
assert all(0 < n < tokens for n in kept), (kept, tokens)
"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("dynamic-llava")])
def test_dynamic_llava_answers_where_this_package_cannot_be_imported(name, clean_process):
    sample = read_results(CARDS / name)["sample"]
    clean_process(ANSWER, CARDS / name, CARDS / name / sample["file"], sample["text"])


def test_clean_processes_are_clean(clean_process):
    """The guard of the tests above: a blocked package cannot be imported and looks not installed."""
    done = clean_process(
        "from transformers.utils import is_torchvision_available\nprint(is_torchvision_available())\n"
        "try:\n    import hf_efficient.hub\nexcept ImportError as error:\n    print('blocked')",
        block=("hf_efficient", "torchvision"),
    )
    assert done.stdout.split() == ["False", "blocked"]
