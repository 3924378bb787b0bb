"""README is run: its snippets, its commands, its links; figures stand beside command, hardware and date."""

import ast
import json
import re
import shlex
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from hf_efficient import cli


REPOSITORY = Path(__file__).resolve().parent.parent
TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.S | re.M)
SNIPPETS = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    part.strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    for part in line.split("&&")
    if part.strip()
]
COMMANDS += [
    part.strip()
    for inline in re.findall(r"`((?:pip|pytest|hf-efficient|python) [^`]+)`", TEXT)
    for part in inline.split("&&")
]
HEADINGS = ["Install", "Use", "Measured numbers", "Layout", "Develop", "Limits", "Cite and licences"]


def section(heading: str) -> str:
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M)[1]


def test_order_of_sections():
    assert re.findall(r"^## (.+)$", TEXT, re.M) == HEADINGS
    opening = TEXT.split("## Install")[0]
    assert re.search(r"^\| method \|", opening, re.M), "the table of methods comes before everything else"


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: code.strip().splitlines()[0])
def test_snippet_imports_what_exists(code):
    """Every imported name is there; the run itself is in the slow tier."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = __import__(node.module, fromlist=[alias.name for alias in node.names])
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_command_is_accepted(command):
    program, *arguments = shlex.split(command)
    if program == "hf-efficient":
        if arguments:
            parsed = cli._build_parser(arguments[0], cli.load_command(arguments[0]))[0].parse_args(arguments)
            assert parsed.command == arguments[0]
    elif program == "accelerate":
        assert arguments[0] == "launch"
        parsed = launch_command_parser().parse_args(arguments[1:])
        assert (parsed.multi_gpu, parsed.num_processes, parsed.training_script) == (True, 4, "train.py")
    elif program == "pip":
        assert arguments[0] == "install"
        extras = {extra for words in arguments for extra in re.findall(r"\[(.+)\]", words)}
        assert extras <= set(metadata("hf-efficient").get_all("Provides-Extra"))
    elif program == "python":
        script = REPOSITORY / arguments[0]
        assert script.is_file(), f"{arguments[0]} does not exist"
        for option in (word for word in arguments[1:] if word.startswith("--")):
            assert f'"{option}"' in script.read_text(encoding="utf-8"), f"{arguments[0]} has no {option}"
    else:
        assert program in ("ruff", "pytest")


def test_the_two_commands_stand_there():
    assert 'pip install -e ".[quickstart]" && hf-efficient quickstart' in TEXT
    assert 'pip install -e ".[test]" && pytest' in TEXT
    assert 'pip install --quiet -e ".[test]"' in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", TEXT)
    assert targets
    assert not [target for target in targets if not (REPOSITORY / target).exists()]
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in HEADINGS}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def leaf(document: dict, name: str) -> float:
    for key in name.split("."):
        document = document[key]
    return document


TABLES = re.findall(r"^<!-- numbers: (\S+) -->\n(.*?)(?=\n\n|\Z)", TEXT, re.S | re.M)


def test_every_table_of_numbers_names_its_file():
    """A table in that section stands under `<!-- numbers: FILE -->`, so that the next test can compare it."""
    tables = re.findall(r"^\|.*\n\|[-| :]+\n", section("Measured numbers"), re.M)
    assert len(tables) == len(TABLES)


@pytest.mark.parametrize(("file", "table"), TABLES, ids=[file for file, _ in TABLES])
def test_numbers_are_those_of_the_file(file, table):
    """Rows `| name | number | ...` where `name` is a key of the file, in backticks, `a.b` for nested ones."""
    document = json.loads((REPOSITORY / file).read_text(encoding="utf-8"))
    rows = re.findall(r"^\| `([\w.]+)` \| ([-\d.,]+)", table, re.M)
    assert rows
    for name, shown in rows:
        digits = len(shown.partition(".")[2])
        assert f"{leaf(document, name):.{digits}f}" == shown.replace(",", ""), name
    words = section("Measured numbers")
    for fact in (document["meta"]["command"], document["meta"]["date"], document["meta"]["cpu"]):
        assert fact in words, f"{file}: {fact!r} does not stand beside its numbers"
    assert re.search(rf"\b{document['meta']['threads']} threads?\b", words)


GAIN = re.compile(r"\d+(\.\d+)?\s?(x|%|points?)(?![\w-])")


def test_gains_in_the_first_table_are_backed():
    """A gain in the table of methods also stands in the section of numbers or in a card."""
    cards = "\n".join(path.read_text(encoding="utf-8") for path in REPOSITORY.glob("model_cards/*/README.md"))
    backed = section("Measured numbers") + cards
    table = TEXT.split("## Install")[0]
    for match in GAIN.finditer(table):
        number = re.match(r"[\d.]+", match[0])[0]
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", backed), f"{match[0]} is not backed by a measurement"


# what stands for the checkpoints and the data that a reader has; `sys.argv`: a folder for them, then the snippets
TOY = """
import sys
from pathlib import Path
import numpy, torch
from PIL import Image
from transformers import (
    CLIPConfig, CLIPForImageClassification, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration,
    ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification,
)
torch.manual_seed(0)
torch.set_num_threads(1)
toys = Path(sys.argv[1])
small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
vision = CLIPVisionConfig(**small)
text = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=64)
config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=63, image_seq_length=16)
LlavaForConditionalGeneration(config).save_pretrained(toys / "llava-hf/llava-1.5-7b-hf")
CLIPForImageClassification(CLIPConfig(vision_config=small, num_labels=2)).save_pretrained(toys / "openai/clip-vit-large-patch14-336")
ViTForImageClassification(ViTConfig(**small)).save_pretrained(toys / "google/vit-base-patch16-224")
resnet = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2], layer_type="basic")
ResNetForImageClassification(resnet).save_pretrained(toys / "microsoft/resnet-50")
row = {"input_ids": [1] + [63] * 16 + [2, 3, 4, 5, 6], "labels": [-100] * 18 + [3, 4, 5, 6]}
train_dataset = [{**row, "pixel_values": torch.randn(3, 32, 32)} for _ in range(4)]
def data_collator(rows):
    batch = {key: torch.tensor([item[key] for item in rows]) for key in ("input_ids", "labels")}
    return {**batch, "pixel_values": torch.stack([item["pixel_values"] for item in rows])}
images = [{"pixel_values": torch.randn(3, 32, 32), "labels": number % 2} for number in range(8)]
picture = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=numpy.uint8))
photos = [{"image": picture, "labels": picture}, {"image": picture.rotate(90), "labels": picture}]
names = {"train_dataset": train_dataset, "data_collator": data_collator, "images": images, "photos": photos}
for code in sys.argv[2:]:
    exec(compile(code, "README.md", "exec"), names)
"""  # noqa: E501
TOYS = (
    "llava-hf/llava-1.5-7b-hf",
    "openai/clip-vit-large-patch14-336",
    "google/vit-base-patch16-224",
    "microsoft/resnet-50",
)


def test_the_reader_is_told_what_is_not_defined():
    """Names a snippet uses and none defines are the reader's own, and the text around says what they are."""
    known = {"train_dataset", "data_collator", "images", "photos"}
    for name in known:
        assert re.search(rf"`{name}`", TEXT), f"README does not say what {name} is"


@pytest.mark.slow
def test_snippets_run_in_order(tmp_path):
    """As in a notebook; data sets and collator are the reader's own, checkpoints of the Hub are toys."""
    import os
    import subprocess

    codes = SNIPPETS
    assert len(codes) >= 3
    for name in TOYS:
        codes = [code.replace(f'"{name}"', f'"{tmp_path}/toys/{name}"') for code in codes]
    codes = [code.replace("model_cards/", f"{REPOSITORY}/model_cards/") for code in codes]
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", TOY, tmp_path / "toys", *codes],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
