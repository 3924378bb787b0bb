"""Photographs to cartoons in three ways and six strengths: the data of "cGANs for Cartoon to Real-life Images"."""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .figures_pix2pix import read_picture
from .image_processing_pix2pix import deep_to_grey


METHODS = ("bilateral", "palette", "mean_shift")
MAX_STRENGTH = 5
_CHUNK = 2**18  # pixels compared with the palette at a time: bounds the memory of large photographs
_SMALLEST_PYRAMID = 8  # pixels of the shorter side: below, a picture of half the size is nothing but a blur
_WORKING_SIDE = 256  # pixels; larger images are filtered at this shorter side, so a strength looks alike at any size


def cartoonize(image: Any, *, method: str = "bilateral", strength: int = 3) -> Any:
    """Turn a photograph into a cartoon; the same input always gives the same output.

    `bilateral` smooths surfaces but not outlines (Tomasi and Manduchi, 1998) and draws dark lines along the outlines;
    `palette` keeps few flat colours, found by k-means in the Lab space; `mean_shift` melts neighbouring pixels of
    similar colour into flat patches (Comaniciu and Meer, 2002).

    Example:
    ```python
    >>> dataset = dataset.map(lambda row: {"cartoon": cartoonize(row["image"], method="palette", strength=4)})
    ```

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `str`, `os.PathLike`, or a list of them): An image of any mode, an
            array of shape `(height, width)` or `(height, width, 1, 3 or 4)`, `uint8` or float in `[0, 1]`, or the path
            of a picture. A fourth channel is alpha and is kept.
        method (`str`, defaults to `"bilateral"`): `"bilateral"`, `"palette"` or `"mean_shift"`.
        strength (`int`, defaults to 3): 0 (the image itself) to 5.

    Returns:
        The cartoon, of the type, size and number format of `image` (a PIL image for a path); palettes become RGB, EXIF
        rotation is applied.

    Raises:
        ValueError: If `method`, `strength` or the array is not one of these, or a file is no picture.
        TypeError: If `image` is neither image, array nor path.
        ImportError: If OpenCV is missing.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    if isinstance(strength, bool) or not isinstance(strength, (int, np.integer)) or not 0 <= strength <= MAX_STRENGTH:
        raise ValueError(f"`strength` must be a whole number from 0 to {MAX_STRENGTH}, got {strength!r}.")
    if isinstance(image, (list, tuple)):
        return [cartoonize(one, method=method, strength=strength) for one in image]
    if isinstance(image, (str, os.PathLike)):
        image = read_picture(image)
    if isinstance(image, Image.Image):
        return _cartoonize_image(image, method, int(strength))
    if isinstance(image, np.ndarray):
        return _cartoonize_array(image, method, int(strength))
    raise TypeError(f"`image` must be a PIL image, an array or the path of a picture, got {type(image).__name__}.")


def _cartoonize_image(image: Image.Image, method: str, strength: int) -> Image.Image:
    image = ImageOps.exif_transpose(image)  # a copy
    if strength == 0:
        return image
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if image.mode.startswith("I") or image.mode == "F":
        image, has_alpha = Image.fromarray(deep_to_grey(image)), False
    mode = "RGBA" if has_alpha else "L" if image.mode in ("L", "1") else "RGB"
    return Image.fromarray(_cartoonize_array(np.asarray(image.convert(mode)), method, strength))


def _cartoonize_array(array: np.ndarray, method: str, strength: int) -> np.ndarray:
    shape, dtype = array.shape, array.dtype
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)) or 0 in shape:
        raise ValueError(f"An image array must be height x width (x 1, 3 or 4 channels), got the shape {shape}.")
    if dtype != np.uint8 and not np.issubdtype(dtype, np.floating):
        raise ValueError(f"An image array must be uint8 or float in [0, 1], got {dtype}.")
    if dtype != np.uint8 and not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(f"A float image array must lie in [0, 1], got [{array.min()}, {array.max()}].")
    if strength == 0:
        return array.copy()
    pixels = array if dtype == np.uint8 else (array * 255).round().astype(np.uint8)
    pixels = pixels.reshape(*shape[:2], -1)
    grey = pixels.shape[2] == 1
    rgb = np.ascontiguousarray(np.repeat(pixels, 3, 2) if grey else pixels[..., :3])
    cartoon = _FILTERS[method](_cv2(), rgb, strength)
    cartoon = cartoon.mean(2, keepdims=True).round().astype(np.uint8) if grey else cartoon
    cartoon = np.concatenate([cartoon, pixels[..., 3:]], 2) if pixels.shape[2] == 4 else cartoon
    cartoon = cartoon.reshape(shape)
    return cartoon if dtype == np.uint8 else (cartoon / 255).astype(dtype)


def _cv2() -> Any:
    try:
        return import_module("cv2")
    except ImportError as error:
        raise ImportError('cartoonize needs OpenCV; run pip install "hf-efficient[pix2pix]".') from error


def _shrink(cv2: Any, rgb: np.ndarray) -> np.ndarray:
    """Bring the shorter side down to the working size."""
    factor = _WORKING_SIDE / min(rgb.shape[:2])
    if factor >= 1:
        return rgb
    size = (max(1, round(rgb.shape[1] * factor)), max(1, round(rgb.shape[0] * factor)))
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)


def _grow(cv2: Any, small: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    if small.shape == rgb.shape:
        return small
    return cv2.resize(small, rgb.shape[1::-1], interpolation=cv2.INTER_CUBIC)


def _bilateral(cv2: Any, rgb: np.ndarray, strength: int) -> np.ndarray:
    """Smooth once more than `strength` says, then darken outlines; both grow with `strength`."""
    small = _shrink(cv2, rgb)
    for _ in range(strength + 1):
        small = cv2.bilateralFilter(small, d=7, sigmaColor=12 + 8 * strength, sigmaSpace=3)
    smooth = _grow(cv2, small, rgb).astype(np.float32)
    scale = max(1.0, min(rgb.shape[:2]) / _WORKING_SIDE)
    block = 2 * int(4 * scale) + 1
    grey = cv2.cvtColor(smooth, cv2.COLOR_RGB2GRAY)  # outlines of the smoothed surfaces: texture draws no specks
    mean = cv2.blur(grey, (block, block), borderType=cv2.BORDER_REPLICATE)
    threshold = 14 - 2 * strength  # grey values below the neighbourhood at which a line begins
    line = np.clip((mean - grey - threshold) / 8, 0, 1)[..., None]
    return (smooth * (1 - line * (0.4 + 0.12 * strength))).round().astype(np.uint8)


def _palette(cv2: Any, rgb: np.ndarray, strength: int) -> np.ndarray:
    """Keep 24, 16, 11, 8 or 5 colours, after a median filter that grows with `strength`."""
    colours = (24, 16, 11, 8, 5)[strength - 1]
    small = cv2.medianBlur(_shrink(cv2, rgb), 3 if strength < 4 else 5)
    lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB).reshape(-1, 3).astype(np.float32)
    sample = np.ascontiguousarray(lab[:: max(1, len(lab) // 4096)])
    if len(sample) <= colours:  # a handful of pixels is a palette already
        return rgb
    # start from equally large groups of rising lightness: k-means then needs no random numbers
    labels = np.empty((len(sample), 1), np.int32)
    labels[sample[:, 0].argsort(kind="stable"), 0] = np.arange(len(sample)) * colours // len(sample)
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 10, 0.5)
    _, _, centres = cv2.kmeans(sample, colours, labels, criteria, 1, cv2.KMEANS_USE_INITIAL_LABELS)
    palette = cv2.cvtColor(centres.round().astype(np.uint8)[None], cv2.COLOR_LAB2RGB)[0]
    full = cv2.cvtColor(cv2.medianBlur(rgb, 3 if strength < 4 else 5), cv2.COLOR_RGB2LAB).astype(np.float32)
    flat = full.reshape(-1, 3)
    nearest = np.empty(len(flat), np.intp)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        distance = (centres**2).sum(1) - 2 * part @ centres.T  # (pixels, colours), up to each pixel's own norm
        nearest[start : start + _CHUNK] = distance.argmin(1)
    return palette[nearest].reshape(rgb.shape)


def _mean_shift(cv2: Any, rgb: np.ndarray, strength: int) -> np.ndarray:
    """Melt pixels within a radius in space and colour that grows with `strength`."""
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 3, 1)
    radius, colours = (3 + strength) // 2 + 1, 6 + 8 * strength
    levels = int(min(rgb.shape[:2]) >= _SMALLEST_PYRAMID)
    small = cv2.pyrMeanShiftFiltering(_shrink(cv2, rgb), sp=radius, sr=colours, maxLevel=levels, termcrit=criteria)
    return _grow(cv2, small, rgb)


_FILTERS: dict[str, Callable[[Any, np.ndarray, int], np.ndarray]] = {
    "bilateral": _bilateral,
    "palette": _palette,
    "mean_shift": _mean_shift,
}
