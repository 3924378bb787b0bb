"""The `evaluate` modules of the package: load by path, agree with plain arithmetic, combine, and are shipped."""

import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from PIL import Image
from setuptools import find_namespace_packages

from hf_efficient.metrics import load_metric


METRICS = Path(__file__).resolve().parent.parent / "hf_efficient" / "metrics"
TRUE = (
    "a dark scene . on the field a1 there is a small red ring . the field d4 holds a large blue cross . two shapes ."
)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in METRICS.glob("*/*.py")))
def test_every_module_says_what_it_is_and_is_shipped(name, repository):
    metric = evaluate.load(str(METRICS / name))
    assert metric.description
    assert "predictions, references" in metric.inputs_description
    packages = find_namespace_packages(str(repository), include=["hf_efficient", "hf_efficient.*"])
    assert f"hf_efficient.metrics.{name}" in packages, "setup.py finds the folder, so its file is installed"


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("accuracy", "sklearn.metrics", "quickstart"),
        ("kid", "torchmetrics.image.kid", "pix2pix"),
        ("psnr", "torchmetrics.functional.image", "pix2pix"),
        ("ssim", "torchmetrics.functional.image", "pix2pix"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(name, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    values = [1, 2] if name == "accuracy" else [Image.new("RGB", (16, 16))] * 2
    package = "scikit-learn" if name == "accuracy" else "torchmetrics"
    with pytest.raises(ImportError, match=rf'{name} needs {package}; run pip install "hf-efficient\[{extra}\]"'):
        load_metric(name).compute(predictions=values, references=values)


@pytest.mark.parametrize(
    ("predictions", "references", "share"),
    [([1, 2, 3, 4], [1, 2, 0, 0], 0.5), (["circle", "yes", "red"], ["circle", "no", "red"], 2 / 3), ([7], [7], 1.0)],
)
def test_accuracy_of_numbers_and_of_words(predictions, references, share):
    assert load_metric("accuracy").compute(predictions=predictions, references=references) == {"accuracy": share}


def test_accuracy_takes_arrays_batch_by_batch():
    metric, random = load_metric("accuracy"), np.random.default_rng(0)
    predictions, references = random.integers(0, 3, 40), random.integers(0, 3, 40)
    for start in range(0, 40, 8):
        metric.add_batch(predictions=predictions[start : start + 8], references=references[start : start + 8])
    assert metric.compute()["accuracy"] == (predictions == references).mean()


@pytest.mark.parametrize(
    ("said", "place", "size", "colour", "shape", "invented"),
    [
        (TRUE, 2, 2, 2, 2, 0),
        (TRUE.replace("red", "blue"), 2, 2, 1, 2, 0),
        (TRUE.replace("a1", "b2"), 1, 1, 1, 1, 1),
        (TRUE + " on a1 we find a large red ring .", 2, 2, 2, 2, 1),  # the first sentence about a place counts
        ("on a1 we find a large red ring . " + TRUE, 2, 1, 2, 2, 1),
        ("", 0, 0, 0, 0, 0),
        ("a1 d4 . small red ring .", 0, 0, 0, 0, 0),  # a fact needs place and thing in one sentence
    ],
)
def test_facts_of_one_description(said, place, size, colour, shape, invented):
    found = load_metric("facts").compute(predictions=[said], references=[TRUE])
    counts = {"place": place, "size": size, "colour": colour, "shape": shape}
    assert found.pop("per_description") == [{"objects": 2, "invented": invented, **counts}]
    assert found == {
        "facts": pytest.approx((place + colour + shape) / 6),
        "invented": invented,
        **{name: count / 2 for name, count in counts.items()},
    }


def test_facts_are_weighted_by_objects_and_take_other_patterns():
    one = "on the field b2 there is a small green square ."
    found = load_metric("facts").compute(predictions=[TRUE, ""], references=[TRUE, one])
    assert found["facts"] == pytest.approx(2 / 3)
    settings = {"place": r"\b(left|right)\b", "thing": r"a (?P<animal>cat|dog)", "counted": ("animal",)}
    animals = ("a cat sits left . a dog sits right .", "a cat sits left . a cat sits right .")
    found = load_metric("facts").compute(predictions=[animals[0]], references=[animals[1]], **settings)
    assert (found["facts"], found["animal"], found["place"]) == (0.5, 0.5, 1.0)


def test_facts_complain():
    with pytest.raises(ValueError, match=r"`counted` must name some of place, size, colour, shape, got \['taste'\]"):
        load_metric("facts").compute(predictions=[TRUE], references=[TRUE], counted=("taste",))
    with pytest.raises(ValueError, match="`references` must state at least one fact, got none"):
        load_metric("facts").compute(predictions=[TRUE], references=["nothing ."])


def test_modules_combine():
    texts = evaluate.combine([load_metric("accuracy"), load_metric("facts")])
    found = texts.compute(predictions=[TRUE, TRUE], references=[TRUE, TRUE.replace("red", "blue")])
    assert found["accuracy"] == 0.5
    assert found["facts"] == pytest.approx(11 / 12)
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(2)]
    pair = evaluate.combine([load_metric("psnr"), load_metric("ssim")])
    found = pair.compute(predictions=images, references=images[::-1])
    assert set(found) == {"psnr", "ssim"}
    assert found["ssim"] < 0.5


def test_the_scenes_are_read_whole(repository, monkeypatch):
    """Every object of a drawn scene is a fact that its own description states, by the default patterns."""
    monkeypatch.syspath_prepend(str(repository / "examples"))
    from dynamic_llava_scenes_data import make_scene

    scenes = [make_scene(seed) for seed in range(12)]
    texts = [scene.description for scene in scenes]
    found = load_metric("facts").compute(predictions=texts, references=texts)
    assert found["facts"] == found["size"] == 1
    assert [row["objects"] for row in found["per_description"]] == [len(scene.objects) for scene in scenes]
    halves = [text[: len(text) // 2] for text in texts]
    assert 0.2 < load_metric("facts").compute(predictions=halves, references=texts)["facts"] < 0.7


def test_unknown_metric():
    with pytest.raises(ValueError, match="`name` must be one of accuracy, facts, kid, psnr, ssim, got 'bleu'"):
        load_metric("bleu")
