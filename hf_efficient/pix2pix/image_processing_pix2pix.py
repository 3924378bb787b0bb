"""Images to network input and back: any kind and size of image goes in, the same size comes out."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack

from .configuration_pix2pix import Pix2PixConfig


_TINY = 7  # pixels: at the edge of its padding, a shorter side would be no more than what networks draw along borders


class Pix2PixImageProcessorKwargs(ImagesKwargs, total=False):
    """Keyword arguments of [`Pix2PixImageProcessor`] beyond the usual ones.

    Args:
        size_divisor (`int`): Height and width are padded to a multiple of it.
        num_channels (`int`): 3 for RGB, 1 for grey.
    """

    size_divisor: int
    num_channels: int


class Pix2PixImageProcessor(PilBackend):
    """Scales pixels to `[-1, 1]`, pads by reflection to a multiple of `size_divisor`, and undoes both.

    It works on PIL and NumPy alone, so its results do not depend on whether torchvision is installed.

    Args:
        **kwargs: `do_resize` (default `False`), `size`, `resample`, `do_rescale`, `rescale_factor`, `do_normalize`,
            `image_mean`, `image_std`, `do_pad` (default `True`), `size_divisor` (default 256, pixels), `num_channels`
            (default 3).
    """

    valid_kwargs = Pix2PixImageProcessorKwargs
    _auto_class = "AutoImageProcessor"

    do_convert_rgb = True
    do_resize = False
    size = {"height": 256, "width": 256}
    resample = PILImageResampling.BICUBIC
    do_center_crop = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_pad = True
    size_divisor = 256
    num_channels = 3

    def __init__(self, **kwargs: Unpack[Pix2PixImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)
        if self.size_divisor < 1:
            raise ValueError(f"`size_divisor` must be at least 1 pixel, got {self.size_divisor}.")

    @classmethod
    def for_model(cls, config: Pix2PixConfig, **kwargs: Any) -> "Pix2PixImageProcessor":
        """Build the processor that fits a generator.

        Args:
            config ([`Pix2PixConfig`]): The generator's configuration.
            **kwargs: Settings of the processor that differ from its defaults.

        Returns:
            [`Pix2PixImageProcessor`]: With the divisor, size and channels of the generator.
        """
        channels, side = config.num_channels, config.image_size
        defaults = {
            "size_divisor": config.size_divisor,
            "size": {"height": side, "width": side},
            "num_channels": channels,
            "image_mean": [0.5] * channels,
            "image_std": [0.5] * channels,
        }
        return cls(**{**defaults, **kwargs})

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        def with_channels(image: Any) -> Any:  # the base class takes no height x width arrays
            flat = isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 2
            return image[..., None] if flat else image

        images = (
            [with_channels(image) for image in images] if isinstance(images, (list, tuple)) else with_channels(images)
        )
        return super()._prepare_images_structure(images, expected_ndims)

    def process_image(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Bring one image to an array with values in `[0, 255]`.

        Transparent pixels are laid over white, EXIF rotation is applied, 16-bit values are scaled down, palettes and
        grey become RGB. Float arrays are taken as `[0, 1]`.

        Args:
            image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): Of any mode; arrays as height x width, height x
                width x channels or channels x height x width with 1, 2 (grey and alpha), 3 or 4 channels. Where both
                ends of the shape could be the channels, 3 are; else NumPy's are last and PyTorch's first.
            do_convert_rgb (`bool`, *optional*): Kept for the base class; the result always has `num_channels`.
            input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"` for arrays where the shape
                does not tell.
            **kwargs: `num_channels` of the result.

        Returns:
            `np.ndarray` of shape `(num_channels, height, width)`: `uint8`, or `float32` for float arrays.
        """
        channels = kwargs.get("num_channels") or self.num_channels
        if isinstance(image, Image.Image):
            array = _pil_to_array(image)
        else:
            first = isinstance(image, torch.Tensor)
            if first:  # NumPy has no bfloat16
                image = (image.float() if image.dtype == torch.bfloat16 else image).detach().cpu().numpy()
            array = _flatten_alpha(_channels_last(_array_to_255(np.asarray(image)), input_data_format, first))
        if array.shape[2] == 1 and channels == 3:
            array = np.repeat(array, 3, 2)
        elif array.shape[2] == 3 and channels == 1:
            grey = array @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2 luma
            array = (grey.round() if array.dtype == np.uint8 else grey).astype(array.dtype)[..., None]
        return np.ascontiguousarray(array.transpose(2, 0, 1))

    def pad(self, image: np.ndarray, size_divisor: int) -> np.ndarray:
        """Reflect the lower and right border until both sides are divisible.

        A side below 7 pixels is laid into the middle and reflected, its borders included, on both sides: networks
        change the colours along the edge of their input, where all of it would lie.

        Args:
            image (`np.ndarray` of shape `(channels, height, width)`): Any values.
            size_divisor (`int`): Divisor in pixels.

        Returns:
            `np.ndarray` of shape `(channels, padded_height, padded_width)`.
        """
        for axis in (1, 2):
            side = image.shape[axis]
            more = -side % size_divisor
            if more:
                before = _before(side, side + more)
                borders = [(0, 0), (0, 0), (0, 0)]
                borders[axis] = (before, more - before)
                image = np.pad(image, borders, mode="symmetric" if side < _TINY else "reflect")
        return image

    def _preprocess(
        self, images: list[np.ndarray], do_pad: bool, size_divisor: int, return_tensors: str | None, **kwargs: Any
    ) -> BatchFeature:
        processed = []
        for image in images:
            if kwargs["do_resize"]:
                range_ = 1 if image.dtype == np.uint8 else 255  # PIL resizes floats in [0, 1]
                image = self.resize(image / range_ if range_ > 1 else image, kwargs["size"], kwargs["resample"])
                image = image * range_
            image = image.astype(np.float32)
            if kwargs["do_rescale"]:
                image *= np.float32(kwargs["rescale_factor"])
            if kwargs["do_normalize"]:
                mean, std = (np.array(kwargs[name], np.float32)[:, None, None] for name in ("image_mean", "image_std"))
                image = (image - mean) / std
            processed.append(self.pad(image, size_divisor) if do_pad else image)
        if return_tensors is not None and len({image.shape for image in processed}) > 1:
            sizes = sorted({"x".join(str(side) for side in image.shape[1:]) for image in processed})
            raise ValueError(
                f"Images of one batch must have one size after padding, got {', '.join(sizes)}; hand them in one by "
                "one, set `do_resize=True`, or use the image-to-image pipeline, which takes unequal sizes."
            )
        return BatchFeature(data={"pixel_values": processed}, tensor_type=return_tensors)

    def post_process_image_to_image(
        self, outputs: Any, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[Image.Image]:
        """Turn network output into images of the size that went in.

        Args:
            outputs ([`ImageToImageOutput`] or `torch.FloatTensor` of shape `(batch, channels, height, width)`): Values
                in `[-1, 1]`; others are clipped.
            target_sizes (`list[tuple[int, int]]`, *optional*): Height and width of each original image in pixels; the
                padding beyond is cut off, and with `do_resize` the rest is scaled back.

        Returns:
            `list[PIL.Image.Image]`: One image for each row of the batch.

        Raises:
            ValueError: If `target_sizes` has another length than the batch.
        """
        images = getattr(outputs, "reconstruction", outputs)
        if target_sizes is not None and len(target_sizes) != len(images):
            raise ValueError(f"`target_sizes` must name one size an image, got {len(target_sizes)} for {len(images)}.")
        mean = torch.tensor(self.image_mean).view(-1, 1, 1) if self.do_normalize else 0.0
        std = torch.tensor(self.image_std).view(-1, 1, 1) if self.do_normalize else 1.0
        factor = self.rescale_factor if self.do_rescale else 1.0
        pictures = []
        for row, image in enumerate(images):
            image = image.detach().float().cpu()
            if target_sizes is not None:
                height, width = self._size_inside(target_sizes[row])
                top, left = _before(height, image.shape[1]), _before(width, image.shape[2])
                image = image[:, top : top + height, left : left + width]
            if self.do_normalize and len(image) != mean.numel():  # colours out of grey or the other way round
                mean, std = mean.mean().view(1, 1, 1), std.mean().view(1, 1, 1)
            pixels = ((image * std + mean) / factor).clamp_(0, 255).round_().to(torch.uint8)
            pixels = pixels.permute(1, 2, 0).numpy()
            picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
            if target_sizes is not None and self.do_resize:
                picture = picture.resize(target_sizes[row][::-1], self.resample)
            pictures.append(picture)
        return pictures

    def _size_inside(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that an image of this size has before it is padded."""
        if not self.do_resize:
            return size
        return self.resize(np.zeros((1, *size), np.uint8), self.size, self.resample).shape[1:]


def _before(side: int, padded: int) -> int:
    """Pixels of padding above or left of an image of this height or width."""
    return max(0, padded - side) // 2 if side < _TINY else 0


def to_rgb(image: Image.Image | np.ndarray | torch.Tensor) -> Image.Image:
    """Read an image of any kind as [`Pix2PixImageProcessor`] does.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): As in [`~Pix2PixImageProcessor.process_image`].

    Returns:
        `PIL.Image.Image`: Upright, RGB.
    """
    array = Pix2PixImageProcessor().process_image(image)
    return Image.fromarray(np.ascontiguousarray(array.round().astype(np.uint8).transpose(1, 2, 0)))


def deep_to_grey(image: Image.Image) -> np.ndarray:
    """Scale grey images of 16 or 32 bits a pixel to 8.

    Args:
        image (`PIL.Image.Image`): Of mode `"I;16"` (and its byte orders), `"I"` or `"F"`. The first has values up to
            65535; the others too where they have any above 255, and floats up to 1 are scaled up.

    Returns:
        `np.ndarray` of shape `(height, width)`: `uint8`.
    """
    values = np.asarray(image).astype(np.float32)
    high = values.max() if values.size else 0
    if image.mode == "F" and high <= 1:
        values = values * 255
    elif image.mode.startswith("I;16") or high > 255:
        values = values / 257  # 65535 -> 255
    return values.clip(0, 255).round().astype(np.uint8)


def _pil_to_array(image: Image.Image) -> np.ndarray:
    """Return `(height, width, 3)` for colour and `(height, width, 1)` for grey images, `uint8`."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits a pixel, grey
        return deep_to_grey(image)[..., None]
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image.convert("RGB"))


def _array_to_255(array: np.ndarray) -> np.ndarray:
    """Scale the values of an array to `[0, 255]`: `uint8` stays, wider integers and floats are scaled."""
    if array.size == 0 or not (array.dtype == bool or np.issubdtype(array.dtype, np.number)):
        raise ValueError(f"An image array must hold numbers, got {array.dtype} of shape {array.shape}.")
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return (array / np.float32(257)).round().astype(np.uint8)
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.integer):
        if low < 0 or high > 255:
            raise ValueError(f"An integer image array must hold values in [0, 255], got [{low}, {high}].")
        return array.astype(np.uint8)
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ValueError(f"A float image array must hold values in [0, 1], got [{low}, {high}].")
    return array.astype(np.float32) * 255


def _channels_last(array: np.ndarray, data_format: str | ChannelDimension | None, first: bool) -> np.ndarray:
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise ValueError(f"An image array must have 2 or 3 axes, got the shape {array.shape}.")
    if data_format is not None:
        first = ChannelDimension(data_format) == ChannelDimension.FIRST
    else:
        ends = (array.shape[0], array.shape[2])
        possible = [end in (1, 2, 3, 4) for end in ends]
        if not any(possible):
            raise ValueError(f"An image array must have 1 to 4 channels, got the shape {array.shape}.")
        if possible != [True, True]:
            first = possible[0]
        elif (ends[0] == 3) != (ends[1] == 3):
            first = ends[0] == 3
    return array.transpose(1, 2, 0) if first else array


def _flatten_alpha(array: np.ndarray) -> np.ndarray:
    """Lay the last of 2 or 4 channels over white."""
    if array.shape[2] in (1, 3):
        return array
    alpha = array[..., -1:].astype(np.float32) / 255
    flat = array[..., :-1] * alpha + 255 * (1 - alpha)
    return flat.round().astype(np.uint8) if array.dtype == np.uint8 else flat.astype(np.float32)
