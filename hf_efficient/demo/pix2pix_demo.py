"""The tab of Pix2Pix in the demo: a photograph becomes a cartoon, and the cartoon a photograph again."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from hf_efficient.pix2pix.cartoonize_pix2pix import MAX_STRENGTH, METHODS, cartoonize
from hf_efficient.pix2pix.pipeline_pix2pix import ImageToImagePipeline

from .pictures_demo import block, paragraph, read_picture, table
from .serve_demo import CARDS


CARD = CARDS["pix2pix"]
SIDE = 256  # shorter side in pixels where no model says at which size it was trained
TITLES = {
    "bilateral": "bilateral: smooth, with outlines",
    "palette": "palette: few colours",
    "mean_shift": "mean shift",
}


@dataclass
class Pix2PixDemo:
    """Cartoonizers and a model that translates back.

    Args:
        checkpoint (`str`, *optional*): Folder or Hub id of a cartoon-to-photo model; None leaves translation out.
    """

    checkpoint: str | None = None
    _translate: Any = None

    def load(self) -> Any:
        """Load the pipeline once.

        Returns:
            [`ImageToImagePipeline`], or None without a checkpoint.
        """
        if self._translate is None and self.checkpoint:
            from transformers import AutoModelForImageToImage

            model = AutoModelForImageToImage.from_pretrained(self.checkpoint).eval()
            self._translate = ImageToImagePipeline(model=model, device="cpu")
        return self._translate

    def about(self) -> str:
        """Say which model translates.

        Returns:
            `str`: One sentence.
        """
        if self.checkpoint:
            return f"Translated by {self.checkpoint.rstrip('/').rpartition('/')[2]}."
        return f"The checkpoint {CARD} is missing, so cartoons are made but not translated back."

    def run(self, path: str | None, method: str, strength: float) -> tuple[Image.Image, Image.Image | None, str]:
        """Make a cartoon and translate it.

        Args:
            path (`str`, *optional*): The picture.
            method (`str`): One of `cartoonize`'s methods.
            strength (`float`): 0 (the picture itself, for one that is a cartoon already) to 5.

        Returns:
            `tuple`: Cartoon, translation (None without a checkpoint) and HTML with the figures.

        Raises:
            ValueError: If the picture or a setting cannot be used; the message says why.
            ImportError: If OpenCV is missing.
        """
        if method not in METHODS:
            raise ValueError(f"The method must be one of {', '.join(METHODS)}.")
        picture = read_picture(path)
        translate = self.load()
        picture = _fit(picture, getattr(translate.model.config, "image_size", SIDE) if translate else SIDE)
        start = time.perf_counter()
        cartoon = cartoonize(picture, method=method, strength=int(strength))
        seconds = [time.perf_counter() - start]
        if translate is None:
            rows = [["cartoon", _format_psnr(cartoon, picture), f"{seconds[0]:.2f}"]]
            return cartoon, None, self._words(picture, rows)
        start = time.perf_counter()
        photo = translate(cartoon)
        seconds.append(time.perf_counter() - start)
        rows = [
            ["cartoon", _format_psnr(cartoon, picture), f"{seconds[0]:.2f}"],
            ["translated", _format_psnr(photo, picture), f"{seconds[1]:.2f}"],
        ]
        return cartoon, photo, self._words(picture, rows)

    def _words(self, picture: Image.Image, rows: list[list[str]]) -> str:
        return block(
            table(["", "PSNR to the upload, dB", "seconds"], rows),
            paragraph(
                f"Worked on at {picture.width} x {picture.height} pixels. PSNR is higher where the pixels are nearer "
                "to those of the upload; it says little about how natural a picture looks. Seconds are wall clock of "
                "one pass.",
                "soft",
            ),
        )


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """Bring the shorter side to `side`, the longer to at most three times that by cutting the ends off."""
    scale = side / min(picture.size)
    width, height = (min(3 * side, max(side, round(length * scale))) for length in picture.size)
    left = max(0.0, (picture.width - width / scale) / 2)
    top = max(0.0, (picture.height - height / scale) / 2)
    box = (left, top, min(picture.width, left + width / scale), min(picture.height, top + height / scale))
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _format_psnr(image: Image.Image, photo: Image.Image) -> str:
    """Peak signal-to-noise ratio of two pictures of one size."""
    difference = np.asarray(image.convert("RGB"), np.float64) - np.asarray(photo, np.float64)
    error = float((difference**2).mean())
    return "identical" if error == 0 else f"{10 * np.log10(255**2 / error):.1f}"


__all__ = ["MAX_STRENGTH", "TITLES", "Pix2PixDemo"]
