"""At least one number of every card, measured again from its checkpoint; slow."""

import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, AutoModelForImageTextToText, AutoProcessor

from hf_efficient import Pix2PixModel, count_flops
from hf_efficient.kdfs import quickstart_kdfs
from hf_efficient.results import read_results
from hf_efficient.toe import speedup_bound


pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parent.parent
CARDS = REPOSITORY / "model_cards"


def load(name: str):
    model = AutoModelForImageTextToText.from_pretrained(CARDS / name, trust_remote_code=True, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(CARDS / name, trust_remote_code=True)


def test_easy_vqa_answers_as_many_questions_right(monkeypatch):
    """All questions of the test split, which the wheel of easy-VQA brings."""
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "examples"), *sys.path])
    from dynamic_llava_easy_vqa import measure
    from dynamic_llava_easy_vqa_data import load_easy_vqa

    data, (model, processor) = load_easy_vqa("test"), load("dynamic-llava-easy-vqa")
    found = measure(model, data, processor, list(range(len(data.questions))))
    (metric,) = read_results(CARDS / "dynamic-llava-easy-vqa")["metrics"]
    assert found["questions"] == 9673
    # two questions more or less: another processor rounds other ties
    assert found["all"] / 100 == pytest.approx(metric["value"], abs=3e-4)


def test_scenes_describes_the_sample_in_the_same_words():
    model, processor = load("dynamic-llava-scenes")
    results = read_results(CARDS / "dynamic-llava-scenes")
    image = Image.open(CARDS / "dynamic-llava-scenes" / results["sample"]["file"])
    message = {"type": "image", "image": image}, {"type": "text", "text": results["sample"]["text"]}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": list(message)}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=120, do_sample=False)
    said = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.split() == results["details"]["sample_answer"].removesuffix("</s>").split()


def test_pix2pix_has_as_many_parameters():
    results = read_results(CARDS / "pix2pix-cartoon2photo")
    model = Pix2PixModel.from_pretrained(CARDS / "pix2pix-cartoon2photo")
    assert model.num_parameters() == results["details"]["parameters"]
    assert f"{model.num_parameters() / 1e6:.1f} M parameters" in results["summary"]


def test_toe_has_as_many_parameters_and_the_same_bound():
    """The images are not free to ship; what the schedule allows follows from the checkpoint alone."""
    results = read_results(CARDS / "vit-toe-cifar10")
    model = AutoModelForImageClassification.from_pretrained(CARDS / "vit-toe-cifar10")
    assert f"{model.num_parameters() / 1e6:.1f} M parameters" in results["summary"]
    figures = results["details"]["figures"]["toe"]
    patches = (model.config.image_size // model.config.patch_size) ** 2
    assert f"{patches} tokens" in results["summary"]
    assert speedup_bound(model, patches)[0] == pytest.approx(figures["bound"], rel=1e-9)
    seconds = {arm: sum(run["cpu_seconds"] for run in results["runs"] if run["arm"] == arm) for arm in ("full", "toe")}
    assert seconds["full"] / seconds["toe"] == pytest.approx(figures["speedup"], rel=1e-9)


@pytest.mark.parametrize("name", ["resnet20-kdfs-cifar10", "resnet20-cifar10"])
def test_resnet20_costs_what_its_card_says(name):
    """The images are not free to ship; multiply-adds and parameters follow from the checkpoint alone."""
    results = read_results(CARDS / name)
    model = AutoModelForImageClassification.from_pretrained(CARDS / name, trust_remote_code=True, dtype=torch.float32)
    macs, parameters = results["details"]["macs"], results["details"]["parameters"]
    assert count_flops(model, (3, 32, 32)) == macs
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert f"{parameters:,} parameters" in results["summary"]
    assert f"{macs / 1e6:.1f} M" in results["summary"]


def test_quickstart_quotes_the_table_of_the_card():
    folder = CARDS / quickstart_kdfs.CARD
    [said] = quickstart_kdfs._quote(folder / "results.json")
    card = (folder / "README.md").read_text(encoding="utf-8")
    for title in ("KDFS -50 %", "dense, trained on for the same epochs"):
        value = re.search(rf"^\| {title} \| ([\d.]+) \|", card, re.M)[1]
        assert f"{value} %" in said
