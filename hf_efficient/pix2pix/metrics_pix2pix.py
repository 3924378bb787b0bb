"""What an evaluation of a Pix2Pix training measures."""

from collections import defaultdict
from importlib import import_module

import torch
from transformers import EvalPrediction


HIGHEST_PSNR = 100.0  # decibels


class ImageMetrics:
    """PSNR and SSIM of an evaluation, batch by batch (torchmetrics); images in `[-1, 1]`.

    An image without error, whose PSNR is infinite, counts as 100 dB: the mean stays a number that JSON has, and a
    checkpoint that gets it right is not behind one that nearly does. [`evaluate_robustness`] leaves such images out.
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = defaultdict(float)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch.

        Args:
            prediction (`EvalPrediction`): Outputs and labels of shape `(batch, channels, height, width)`.
            compute_result (`bool`, defaults to `True`): Whether this was the last batch.

        Returns:
            `dict[str, float]`: `psnr` in decibels and `ssim`, means over the images, after the last batch.

        Raises:
            ImportError: If torchmetrics is missing.
        """
        try:
            functions = import_module("torchmetrics.functional.image")
        except ImportError as error:
            raise ImportError(
                'Measuring PSNR and SSIM needs torchmetrics; run pip install "hf-efficient[pix2pix]".'
            ) from error
        output, label = (torch.as_tensor(x).float() for x in (prediction.predictions, prediction.label_ids))
        output = output.clamp(-1, 1)
        self.totals["images"] += len(output)
        peaks = functions.peak_signal_noise_ratio(output, label, data_range=2.0, dim=(1, 2, 3), reduction="none")
        self.totals["psnr"] += peaks.clamp(max=HIGHEST_PSNR).sum().item()
        ssim = functions.structural_similarity_index_measure(output, label, data_range=2.0, reduction="sum")
        self.totals["ssim"] += ssim.item()
        if not compute_result:
            return {}
        totals, self.totals = self.totals, defaultdict(float)
        return {name: totals[name] / totals["images"] for name in ("psnr", "ssim")}
