"""Structural similarity of images, as an `evaluate` module: `evaluate.load("hf_efficient/metrics/ssim")`."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch


class Ssim(evaluate.Metric):
    """Mean structural similarity over pairs of images of equal size, from torchmetrics."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean structural similarity of pairs of images, at most 1 (higher is better).",
            citation="Wang, Bovik, Sheikh, Simoncelli: Image Quality Assessment, IEEE TIP 13(4), 2004",
            inputs_description="predictions, references: images of equal size.",
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        """Measure each pair and average.

        Args:
            predictions (`list[PIL.Image.Image]`): Images to judge.
            references (`list[PIL.Image.Image]`): What they should be.

        Returns:
            `dict[str, float]`: `ssim`.

        Raises:
            ValueError: If a pair has unequal sizes, or fewer than 11 pixels on a side, the window of SSIM.
            ImportError: If torchmetrics is not installed.
        """
        try:
            from torchmetrics.functional.image import structural_similarity_index_measure
        except ImportError as error:
            raise ImportError('ssim needs torchmetrics; run pip install "hf-efficient[pix2pix]".') from error

        values = []
        for number, (prediction, reference) in enumerate(zip(predictions, references)):
            pair = [
                torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
                for image in (prediction, reference)
            ]
            if pair[0].shape != pair[1].shape:
                sizes = f"{prediction.size} and {reference.size}"
                raise ValueError(f"Pair {number} must have one size, got {sizes} pixels.")
            if min(prediction.size) < 11:
                raise ValueError(f"Pair {number} must have at least 11 pixels on a side, got {prediction.size}.")
            values.append(float(structural_similarity_index_measure(*pair, data_range=1.0)))
        return {"ssim": float(np.mean(values))}
