"""Peak signal-to-noise ratio of images, as an `evaluate` module: `evaluate.load("hf_efficient/metrics/psnr")`."""

import math
from typing import Any

import datasets
import evaluate
import numpy as np
import torch


class Psnr(evaluate.Metric):
    """Mean peak signal-to-noise ratio over pairs of images of equal size that differ, from torchmetrics."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean peak signal-to-noise ratio in decibels of pairs of images that differ (higher: better).",
            citation="https://en.wikipedia.org/wiki/Peak_signal-to-noise_ratio",
            inputs_description="predictions, references: images of equal size.",
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float | None]:
        """Measure each pair and average.

        Args:
            predictions (`list[PIL.Image.Image]`): Images to judge.
            references (`list[PIL.Image.Image]`): What they should be.

        Returns:
            `dict[str, float | None]`: `psnr` in decibels, the mean over the pairs that differ, as in
            `evaluate_robustness`: that of identical images is infinite, which JSON has not. `None` where all are.

        Raises:
            ValueError: If a pair has unequal sizes.
            ImportError: If torchmetrics is not installed.
        """
        try:
            from torchmetrics.functional.image import peak_signal_noise_ratio
        except ImportError as error:
            raise ImportError('psnr needs torchmetrics; run pip install "hf-efficient[pix2pix]".') from error

        values = []
        for number, (prediction, reference) in enumerate(zip(predictions, references)):
            pair = [
                torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
                for image in (prediction, reference)
            ]
            if pair[0].shape != pair[1].shape:
                sizes = f"{prediction.size} and {reference.size}"
                raise ValueError(f"Pair {number} must have one size, got {sizes} pixels.")
            values.append(float(peak_signal_noise_ratio(*pair, data_range=1.0)))
        finite = [value for value in values if math.isfinite(value)]
        return {"psnr": float(np.mean(finite)) if finite else None}
