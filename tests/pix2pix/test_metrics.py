"""The `evaluate` modules load by path and equal torchmetrics."""

import json

import evaluate
import numpy as np
import pytest
import torch
import torchmetrics.functional.image as functional
from transformers import EvalPrediction

from hf_efficient.pix2pix.metrics_pix2pix import ImageMetrics


@pytest.fixture
def images(picture):
    predictions = [picture(16, 16), picture(20, 24)]
    return predictions, [picture(16, 17).resize((16, 16)), picture(20, 25).resize((24, 20))]


def tensors(images):
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in images]


@pytest.mark.parametrize(
    ("name", "function"),
    [("psnr", "peak_signal_noise_ratio"), ("ssim", "structural_similarity_index_measure")],
)
def test_the_modules_equal_torchmetrics(repository, images, name, function):
    metric = evaluate.load(str(repository / "hf_efficient" / "metrics" / name))
    pairs = zip(*(tensors(side) for side in images))
    expected = np.mean([float(getattr(functional, function)(*pair, data_range=1.0)) for pair in pairs])
    assert metric.compute(predictions=images[0], references=images[1])[name] == pytest.approx(expected, abs=1e-5)
    for prediction, reference in zip(*images):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute()[name] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=r"Pair 0 must have one size, got \(16, 16\) and \(24, 20\) pixels"):
        metric.compute(predictions=[images[0][0]], references=[images[1][1]])


def test_identical_images_have_no_psnr(repository, images):
    """Infinity is no JSON, and would be the mean whatever the other pairs are: as in `evaluate_robustness`."""
    metric = evaluate.load(str(repository / "hf_efficient" / "metrics" / "psnr"))
    expected = metric.compute(predictions=images[0], references=images[1])["psnr"]
    same = images[0][0]
    mixed = metric.compute(predictions=[*images[0], same], references=[*images[1], same])
    assert mixed["psnr"] == pytest.approx(expected)
    alone = metric.compute(predictions=[same], references=[same])
    assert json.dumps(alone, allow_nan=False) == '{"psnr": null}'


def test_an_evaluation_counts_an_image_without_error_as_100_decibels():
    """A model that gets one image exactly right must not fall behind one that nearly does, or become infinite."""
    label = torch.zeros(3, 3, 16, 16)
    output = label + torch.tensor([0.0, 1e-6, 0.2]).view(3, 1, 1, 1)
    metrics = ImageMetrics()
    assert metrics(EvalPrediction(output[:2].numpy(), label[:2].numpy()), compute_result=False) == {}
    result = metrics(EvalPrediction(output[2:].numpy(), label[2:].numpy()))
    assert result["psnr"] == pytest.approx((100 + 100 + 20) / 3, abs=1e-4)  # the error 0.2 of a range of 2
    assert json.dumps(result, allow_nan=False)


def test_images_smaller_than_the_window_of_ssim_are_named(repository, picture):
    metric = evaluate.load(str(repository / "hf_efficient" / "metrics" / "ssim"))
    with pytest.raises(ValueError, match=r"Pair 0 must have at least 11 pixels on a side, got \(30, 9\)"):
        metric.compute(predictions=[picture(9, 30)], references=[picture(9, 30)])


def test_the_modules_combine(repository, images):
    folder = repository / "hf_efficient" / "metrics"
    combined = evaluate.combine([str(folder / name) for name in ("psnr", "ssim")])
    values = combined.compute(predictions=images[0], references=images[1])
    for name in ("psnr", "ssim"):
        metric = evaluate.load(str(folder / name))
        assert values[name] == metric.compute(predictions=images[0], references=images[1])[name]


def test_kid_needs_a_network_and_separates_two_sets(repository, images):
    metric = evaluate.load(str(repository / "hf_efficient" / "metrics" / "kid"))

    def colours(pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], 1)

    same = metric.compute(predictions=images[0], references=images[0], features=colours)
    other = metric.compute(predictions=images[0], references=images[1], features=colours)
    assert same["kid"] <= other["kid"]
    assert other == metric.compute(predictions=images[0], references=images[1], features=colours)
    with pytest.raises(ValueError, match="`features` is missing"):
        metric.compute(predictions=images[0], references=images[1])
    with pytest.raises(ValueError, match="At least 2 images are needed on each side, got 1"):
        metric.compute(predictions=images[0][:1], references=images[1][:1], features=colours)
