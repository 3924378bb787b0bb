"""Kernel distance between two sets of images, as an `evaluate` module: `evaluate.load("hf_efficient/metrics/kid")`."""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor, nn


class Kid(evaluate.Metric):
    """Kernel distance of features of two sets of images, from torchmetrics."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=(
                "Squared maximum mean discrepancy between features of two sets of images (lower is better), computed "
                "by torchmetrics. It is the Kernel Inception Distance only where the features are Inception's."
            ),
            citation="Binkowski, Sutherland, Arbel, Gretton: Demystifying MMD GANs, ICLR 2018",
            inputs_description="predictions, references: images. compute(features=network): what compares them.",
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(
        self,
        predictions: list[Any],
        references: list[Any],
        features: Callable[[Tensor], Tensor] | None = None,
        subsets: int = 50,
        subset_size: int = 50,
        seed: int = 0,
    ) -> dict[str, float]:
        """Compare both sets.

        Args:
            predictions (`list[PIL.Image.Image]`): Images to judge.
            references (`list[PIL.Image.Image]`): Real images.
            features (`Callable`): Network from images `(batch, 3, height, width)` in `[0, 1]` to `(batch, features)`.
            subsets (`int`, defaults to 50): Random subsets averaged over.
            subset_size (`int`, defaults to 50): Images in each; at most as many as there are.
            seed (`int`, defaults to 0): Seed of the subsets.

        Returns:
            `dict[str, float]`: `kid` and its spread over the subsets, `kid_std`.

        Raises:
            ValueError: If `features` is missing or there are fewer than two images.
            ImportError: If torchmetrics is not installed.
        """
        try:
            from torchmetrics.image.kid import KernelInceptionDistance
        except ImportError as error:
            raise ImportError('kid needs torchmetrics; run pip install "hf-efficient[pix2pix]".') from error

        if features is None:
            raise ValueError("`features` is missing: pass a network, such as compute(features=network).")
        if len(predictions) < 2:
            raise ValueError(f"At least 2 images are needed on each side, got {len(predictions)}.")
        metric = KernelInceptionDistance(
            feature=nn.Identity(), subsets=subsets, subset_size=min(subset_size, len(predictions))
        )
        with torch.no_grad():
            for images, real in ((references, True), (predictions, False)):
                for image in images:
                    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
                    metric.update(features(pixels), real=real)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mean, spread = metric.compute()
        return {"kid": float(mean), "kid_std": float(spread)}
