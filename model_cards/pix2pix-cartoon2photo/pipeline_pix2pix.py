"""The `image-to-image` pipeline: one image, lists, columns, generators and batches of unequal sizes."""

import base64
import binascii
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from transformers import Pipeline

from .image_processing_pix2pix import Pix2PixImageProcessor, to_rgb


_BYTES = (bytes, bytearray, memoryview)


class ImageToImageError(ValueError):
    """Some inputs of a call could not be read; the others were translated.

    Args:
        failures (`dict[int, str]`): Position of each failed input -> what it was and what is wrong with it.
        results (`list[PIL.Image.Image | None]`): The outputs in order, `None` where an input failed. Empty for
            streams, whose outputs were already handed out.
    """

    def __init__(self, failures: dict[int, str], results: list[Image.Image | None]) -> None:
        self.failures, self.results = failures, results
        if len(results) == len(failures) == 1:
            super().__init__(f"The input could not be translated ({failures[0]}).")
            return
        listed = "; ".join(f"item {position}: {reason}" for position, reason in failures.items())
        where = "the others are in this error's `results`" if results else "the others were handed out"
        super().__init__(f"{len(failures)} of the inputs could not be translated ({listed}); {where}.")


class _Failure:
    """Takes the place of an output whose input could not be read."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class _Items(Dataset):
    """Lets the base class read any indexable collection item by item, without loading all of it."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> Any:
        return self.items[position]


class ImageToImagePipeline(Pipeline):
    """Translates images with any `AutoModelForImageToImage`, Pix2Pix and stock models alike.

    Example:
    ```python
    >>> import hf_efficient
    >>> from transformers import pipeline
    >>> translate = pipeline("image-to-image", model="user/pix2pix-cartoon2photo")
    >>> photo = translate("cartoon.png")
    ```

    Args:
        *args: As in [`Pipeline`].
        **kwargs: As in [`Pipeline`]; without `image_processor` a Pix2Pix model gets the one that fits it.
    """

    _load_processor = False
    _load_image_processor = None  # a model object may come without one
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.eval()  # one that was just trained is not: its answers would depend on chance and on batch mates
        if self.image_processor is None:
            if self.model.config.model_type != "pix2pix":
                raise ValueError(
                    f"`image_processor` is missing: {type(self.model).__name__} has none of its own here."
                )
            self.image_processor = Pix2PixImageProcessor.for_model(self.model.config)
        if self.device.type == "cpu" and self.model.dtype == torch.float16:
            self.model.float()  # half precision is a storage format on CPUs: float32 holds the same values, faster

    def _sanitize_parameters(self, timeout: float | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        if kwargs:
            raise TypeError(f"The image-to-image pipeline takes no {', '.join(f'`{name}`' for name in kwargs)}.")
        return ({} if timeout is None else {"timeout": timeout}), {}, {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Image.Image | list[Image.Image] | Iterator[Image.Image | None]:
        """Translate images; each output has the size of its input (times the scale of an upscaling model).

        Outputs are RGB, or grey where the model gives one channel, whatever the mode of the input, also of an opaque
        RGBA picture: what is transparent is laid over white, because the networks see no alpha. `hf-efficient
        translate` gives each result the alpha channel of its file back where some of it is transparent.

        Args:
            inputs (`str`, `Path`, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a collection of them): Paths,
                URLs, base64 strings, bytes, files opened in binary mode (such as `io.BytesIO`), images of any mode,
                arrays, `{"bytes": ..., "path": ...}` records; lists, tuples, 4-axis arrays, columns of a `datasets`
                data set, generators and `torch` data sets of them.
            **kwargs: `batch_size` and `num_workers` as in every pipeline, `timeout` in seconds for URLs.

        Returns:
            `PIL.Image.Image` for one input, a list for a list or column, an iterator for a generator or `torch` data
            set.

        Raises:
            ImageToImageError: After all other inputs are translated, if some could not be read or are no images.
            TypeError: If `inputs` is a whole data set of `datasets`, also a stream or one of several splits.
        """
        _refuse_table(inputs)
        if isinstance(inputs, (np.ndarray, torch.Tensor)) and inputs.ndim == 4:
            inputs = list(inputs)
        if _is_single(inputs):
            output = super().__call__(inputs, **kwargs)
            if isinstance(output, _Failure):
                raise ImageToImageError({0: output.reason}, [None])
            return output
        if isinstance(inputs, Dataset):
            return _stream(super().__call__(inputs, **kwargs))
        if isinstance(inputs, Sequence) or (hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")):
            outputs = list(super().__call__(_Items(inputs), **kwargs))
            failures = {i: output.reason for i, output in enumerate(outputs) if isinstance(output, _Failure)}
            if failures:
                kept = [None if isinstance(output, _Failure) else output for output in outputs]
                raise ImageToImageError(failures, kept)
            return outputs
        return _stream(super().__call__((item for item in inputs), **kwargs))

    def preprocess(self, image: Any, timeout: float | None = None) -> dict[str, list[Any]]:
        """Read one input.

        Args:
            image: One input of [`~ImageToImagePipeline.__call__`].
            timeout (`float`, *optional*): Seconds to wait for a URL.

        Returns:
            `dict`: `pixel_values` (one tensor of shape `(channels, height, width)`), `target_sizes` (height and width
            in pixels) and `failures` (what is wrong, else `None`), each in a list of one, so that images of unequal
            size can share a batch.
        """
        given = image
        try:
            image, size = _read(given, timeout)
            if self.model.config.model_type != "pix2pix":  # stock processors know fewer kinds of images
                image = to_rgb(image)
            pixels = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
        except Exception as error:  # whatever a broken file or URL raises: the rest of the batch goes on
            reason = f"{_describe(given)}: {_say_why(error)}"
            return {"pixel_values": [None], "target_sizes": [None], "failures": [reason]}
        return {"pixel_values": [pixels], "target_sizes": [size], "failures": [None]}

    def _forward(self, model_inputs: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Run the model once for each size in the batch."""
        scales_back = hasattr(self.image_processor, "post_process_image_to_image")
        pixels, sizes, failures = (_flatten(model_inputs[key]) for key in ("pixel_values", "target_sizes", "failures"))
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, image in enumerate(pixels):
            if image is not None:
                groups.setdefault(tuple(image.shape), []).append(row)
        outputs, targets = [None] * len(pixels), [None] * len(pixels)
        for (_, height, width), rows in groups.items():
            batch = torch.stack([pixels[row] for row in rows]).to(self.model.dtype)
            images = getattr(self.model(pixel_values=batch, return_dict=True), "reconstruction", None)
            if images is None:
                raise ValueError(
                    f"`model` must be an image-to-image model, but {type(self.model).__name__} gives no image back."
                )
            for row, image in zip(rows, images):
                high = sizes[row][0] * image.shape[1] // height  # an upscaling model scales the size, too
                wide = sizes[row][1] * image.shape[2] // width
                outputs[row] = image if scales_back else image[:, :high, :wide]
                targets[row] = (high, wide)
        return {"reconstruction": outputs, "target_sizes": targets, "failures": failures}

    def postprocess(self, model_outputs: dict[str, Any]) -> Image.Image | _Failure:
        """Turn one output into an image.

        Args:
            model_outputs (`dict`): `reconstruction`, `target_sizes` and `failures` of one input.

        Returns:
            `PIL.Image.Image`, or a marker that the call turns into an error.
        """
        values = (model_outputs[name] for name in ("reconstruction", "target_sizes", "failures"))
        image, size, failure = (value[0] if isinstance(value, list) else value for value in values)
        if failure is not None:
            return _Failure(failure)
        image = image[0] if image.ndim == 4 else image
        if hasattr(self.image_processor, "post_process_image_to_image"):
            return self.image_processor.post_process_image_to_image(image[None], [size])[0]
        pixels = (image.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _stream(outputs: Iterable[Any]) -> Iterator[Image.Image | None]:
    """Hand outputs out one by one, `None` for a failed input, and name the failed ones at the end."""
    failures = {}
    for position, output in enumerate(outputs):
        if isinstance(output, _Failure):
            failures[position] = output.reason
            yield None
        else:
            yield output
    if failures:
        raise ImageToImageError(failures, [])


def _flatten(rows: list[Any]) -> list[Any]:
    return [row[0] if isinstance(row, list) else row for row in rows]


def _is_single(inputs: Any) -> bool:
    """Whether `inputs` is one image, or nothing that could hold images: reading it says what is wrong."""
    if isinstance(inputs, (str, *_BYTES, Path, Image.Image, np.ndarray, torch.Tensor, dict)):
        return True
    if isinstance(inputs, (Dataset, Sequence)):
        return False
    return hasattr(inputs, "read") or not (hasattr(inputs, "__iter__") or hasattr(inputs, "__getitem__"))


def _refuse_table(inputs: Any) -> None:
    """Ask for a column where a whole data set of `datasets` was handed in."""
    splits = isinstance(inputs, dict)
    if not hasattr(inputs, "column_names") or not (splits or hasattr(inputs, "features")):
        return
    split, names = next(iter(inputs.column_names.items())) if splits else ("", inputs.column_names)
    table = f"table[{split!r}]" if splits else "table"
    named = f" {names}" if names else ""  # a stream may not know them
    example = f"pipe({table}[{(names or ['image'])[0]!r}])"
    raise TypeError(f"A table is no image: hand in one of its columns{named}, as in {example}.")


def _describe(image: Any) -> str:
    if isinstance(image, (str, Path)):
        return str(image) if len(str(image)) <= 200 else f"{str(image)[:60]}..."
    return type(image).__name__


def _say_why(error: Exception) -> str:
    """Say what is wrong with an input, without the name that stands before it; `read_picture` has the same words."""
    if isinstance(error, UnidentifiedImageError):
        return "no picture"
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    damaged = isinstance(error, (OSError, SyntaxError)) and not isinstance(error, FileNotFoundError)
    return f"no readable picture: {reason}" if damaged else reason


def _read(image: Any, timeout: float | None) -> tuple[Any, tuple[int, int]]:
    """Open one input.

    Args:
        image: Path, URL, base64 string, bytes, binary file, image, array or `{"bytes": ..., "path": ...}`.
        timeout (`float`, *optional*): Seconds to wait for a URL.

    Returns:
        `tuple`: The upright PIL image or the array, and its height and width in pixels.
    """
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, (str, Path)):
        image = _open(image, timeout)
    elif isinstance(image, _BYTES):
        image = Image.open(io.BytesIO(image))
    elif isinstance(image, io.TextIOBase):
        raise TypeError("a file must be opened in binary mode")
    elif hasattr(image, "read"):
        image = Image.open(image)
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        return image, (image.height, image.width)
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise TypeError("an image must be a path, URL, base64 string, bytes, binary file, PIL image or array")
    array = Pix2PixImageProcessor().process_image(image)
    return image, array.shape[1:]


def _open(source: str | Path, timeout: float | None) -> Image.Image:
    text = str(source)
    if text.startswith(("http://", "https://")):
        answer = httpx.get(text, timeout=timeout, follow_redirects=True)
        answer.raise_for_status()
        return Image.open(io.BytesIO(answer.content))
    if os.path.exists(text) or isinstance(source, Path):
        return Image.open(text)
    try:
        data = base64.b64decode(text.split(",", 1)[1] if text.startswith("data:image/") else text, validate=True)
        return Image.open(io.BytesIO(data))
    except (binascii.Error, ValueError, IndexError, UnidentifiedImageError):  # a name may look like base64
        raise FileNotFoundError("no such file, and neither a URL nor the base64 of an image") from None
