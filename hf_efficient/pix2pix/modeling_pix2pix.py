"""Pix2Pix networks: the two generators of the paper and its PatchGAN discriminator (arXiv 1611.07004, Sec. 6.1)."""

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_pix2pix import NORMS, Pix2PixConfig


RECEPTIVE_FIELDS = {1: 0, 16: 1, 34: 2, 70: 3, 142: 4, 286: 5}  # pixels seen by one output -> strided convolutions
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass
class ImageToImageOutput(ModelOutput):
    """Output of an image-to-image model.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): Mean absolute difference to `labels`.
        reconstruction (`torch.FloatTensor` of shape `(batch, channels, height, width)`): The generated images, in
            `[-1, 1]`.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None


class Pix2PixBatchNorm(nn.BatchNorm2d):
    """Batch norm whose inference takes running averages or the statistics of each image alone.

    Modifications: `per_image` normalises each image with its own mean and biased variance (what training at batch size
    1 computes); a training forward without gradients leaves the running averages as they are, so that a preview or a
    repeated forward counts once.

    Args:
        num_features (`int`): Channels.
        per_image (`bool`): Whether inference uses the statistics of each image.
    """

    def __init__(self, num_features: int, per_image: bool = False) -> None:
        super().__init__(num_features)
        self.per_image = per_image

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` of shape `(batch, channels, height, width)`."""
        if self.training:
            momentum = self.momentum if torch.is_grad_enabled() else 0.0
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps
            )
        if self.per_image:
            return _instance_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class Pix2PixInstanceNorm(nn.Module):
    """Instance norm without weights and without running averages."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` of shape `(batch, channels, height, width)`, each channel of each image alone."""
        return _instance_norm(x, None, None, 1e-5)


def _instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Instance norm that also takes a single pixel, whose own mean is all there is: the answer is then the bias.

    Args:
        x (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Features.
        weight (`torch.FloatTensor` of shape `(channels,)`, *optional*): Scale.
        bias (`torch.FloatTensor` of shape `(channels,)`, *optional*): Shift.
        eps (`float`): Added to the variance.

    Returns:
        `torch.FloatTensor` of shape `(batch, channels, height, width)`.
    """
    return torch.instance_norm(x, weight, bias, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)


class Pix2PixUpConv(nn.ConvTranspose2d):
    """Transposed convolution with kernel 4, stride 2 and padding 1 that doubles height and width.

    Modifications: on a CPU, maps of few pixels (the deepest levels of a U-Net) and of few channels (its picture) go
    through one matrix product: the same sum over the same weights, faster (`examples/pix2pix_benchmark.py`).

    Args:
        in_channels (`int`): Channels of the input.
        out_channels (`int`): Channels of the output.
        bias (`bool`): Whether a bias is added.
    """

    max_pixels = 64  # of all images of a batch together
    max_channels = 4  # of the output

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__(in_channels, out_channels, 4, 2, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, in_channels, height, width)` to `(batch, out_channels, 2 * height, 2 * width)`."""
        batch, channels, height, width = x.shape
        small, few = batch * height * width <= self.max_pixels, self.out_channels <= self.max_channels
        if not (small or few) or not _reorders(x):
            return super().forward(x)
        weight = self.weight.reshape(channels, -1).t()  # (16 * out_channels, in_channels)
        if small:
            patches = weight @ x.reshape(batch, channels, height * width)
        else:
            patches = F.conv2d(x, weight.reshape(-1, channels, 1, 1)).flatten(2)
        y = F.fold(patches, (2 * height, 2 * width), 4, padding=1, stride=2)
        return y if self.bias is None else y + self.bias.view(1, -1, 1, 1)


class Pix2PixScore(nn.Conv2d):
    """Convolution with kernel 4, stride 1, padding 1 and one output channel: the scores of a PatchGAN.

    Modifications: on a CPU the 16 products of every pixel are made at once and then added up where they belong: the
    same sum over the same weights, faster (`examples/pix2pix_benchmark.py`).

    Args:
        in_channels (`int`): Channels of the input.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels, 1, 4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, in_channels, height, width)` to `(batch, 1, height - 1, width - 1)`."""
        if not _reorders(x):
            return super().forward(x)
        channels, height, width = x.shape[1:]
        taps = self.weight.reshape(channels, 16).flip(1).t().reshape(16, channels, 1, 1)
        products = F.conv2d(x, taps).flatten(2)  # (batch, 16, height * width)
        return F.fold(products, (height - 1, width - 1), 4, padding=2) + self.bias.view(1, 1, 1, 1)


def _reorders(x: Tensor) -> bool:
    """Whether a layer may sum in another order: float32 on a CPU, outside of a compiler or exporter and autocast."""
    plain = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    return not plain and x.device.type == "cpu" and x.dtype == torch.float32


def make_norm(norm: str, channels: int, per_image: bool = False) -> nn.Module:
    """Build the norm layer that a configuration names.

    Args:
        norm (`str`): `"instance"`, `"batch"` or `"none"`.
        channels (`int`): Channels of its input.
        per_image (`bool`): For batch norm: inference uses the statistics of each image.

    Returns:
        `nn.Module`: The layer.
    """
    if norm == "batch":
        return Pix2PixBatchNorm(channels, per_image)
    return Pix2PixInstanceNorm() if norm == "instance" else nn.Identity()


class Pix2PixUNet(nn.Module):
    """U-Net of `num_levels` halvings and as many doublings (paper, Sec. 6.1.1).

    Level `l` (0 is outermost) works with `base_channels * min(2**l, 8)` filters. The outermost and the innermost
    halving have no norm. As in the widely used PyTorch layout, the activation before each halving works in place, so a
    skip connection carries the LeakyReLU'd features.

    Args:
        config ([`Pix2PixConfig`]): The architecture.
    """

    def __init__(self, config: Pix2PixConfig) -> None:
        super().__init__()
        self.config = config
        levels = config.num_levels
        widths = [config.base_channels * min(2**level, 8) for level in range(levels)]
        bias = config.norm != "batch"
        per_image = config.inference_stats == "batch"
        self.down, self.down_norm = nn.ModuleList(), nn.ModuleList()
        self.up, self.up_norm = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            outer = config.num_channels if level == 0 else widths[level - 1]
            self.down.append(nn.Conv2d(outer, width, 4, 2, 1, bias=bias))
            plain = level in (0, levels - 1)
            self.down_norm.append(nn.Identity() if plain else make_norm(config.norm, width, per_image))
            inner = width if level == levels - 1 else 2 * width
            out = config.num_output_channels if level == 0 else widths[level - 1]
            self.up.append(Pix2PixUpConv(inner, out, bias=bias or level == 0))
            self.up_norm.append(nn.Identity() if level == 0 else make_norm(config.norm, out, per_image))

    def forward(self, x: Tensor) -> Tensor:
        """Translate `x` of shape `(batch, num_channels, height, width)`, height and width divisible by `2**levels`."""
        skips: list[Tensor] = []
        for level, (conv, norm) in enumerate(zip(self.down, self.down_norm)):
            if level > 0:
                x = F.leaky_relu(x, 0.2)
                skips.append(x)
            x = norm(conv(x))
        for level in reversed(range(len(self.up))):
            x = self.up_norm[level](self.up[level](F.relu(x)))
            if 4 <= level < len(self.up) - 1:
                x = F.dropout(x, self.config.dropout, self.training or self.config.inference_dropout)
            if level > 0:
                x = torch.cat([skips[level - 1], x], 1)
        return torch.tanh(x)


class Pix2PixResidualBlock(nn.Module):
    """Two 3x3 convolutions with reflected borders, added to their input.

    Args:
        config ([`Pix2PixConfig`]): The architecture.
        channels (`int`): Channels of input and output.
    """

    def __init__(self, config: Pix2PixConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        bias, per_image = config.norm != "batch", config.inference_stats == "batch"
        self.conv1 = nn.Conv2d(channels, channels, 3, bias=bias)
        self.norm1 = make_norm(config.norm, channels, per_image)
        self.conv2 = nn.Conv2d(channels, channels, 3, bias=bias)
        self.norm2 = make_norm(config.norm, channels, per_image)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`, `(batch, channels, height, width)`."""
        y = F.relu(self.norm1(self.conv1(_reflect(x, 1))))
        y = F.dropout(y, self.config.dropout, self.training or self.config.inference_dropout)
        return x + self.norm2(self.conv2(_reflect(y, 1)))


class Pix2PixResNet(nn.Module):
    """Generator of Johnson et al.: two halvings, residual blocks, two doublings.

    Args:
        config ([`Pix2PixConfig`]): The architecture.
    """

    def __init__(self, config: Pix2PixConfig) -> None:
        super().__init__()
        bias, per_image, width = config.norm != "batch", config.inference_stats == "batch", config.base_channels
        self.stem = nn.Conv2d(config.num_channels, width, 7, bias=bias)
        self.stem_norm = make_norm(config.norm, width, per_image)
        self.down = nn.ModuleList(
            [nn.Conv2d(width * k, 2 * width * k, 3, stride=2, padding=1, bias=bias) for k in (1, 2)]
        )
        self.down_norm = nn.ModuleList([make_norm(config.norm, 2 * width * k, per_image) for k in (1, 2)])
        blocks = [Pix2PixResidualBlock(config, 4 * width) for _ in range(config.num_residual_blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(2 * width * k, width * k, 3, 2, 1, output_padding=1, bias=bias) for k in (2, 1)]
        )
        self.up_norm = nn.ModuleList([make_norm(config.norm, width * k, per_image) for k in (2, 1)])
        self.head = nn.Conv2d(width, config.num_output_channels, 7)

    def forward(self, x: Tensor) -> Tensor:
        """Translate `x` of shape `(batch, num_channels, height, width)`, height and width divisible by 4."""
        x = F.relu(self.stem_norm(self.stem(_reflect(x, 3))))
        for conv, norm in zip(self.down, self.down_norm):
            x = F.relu(norm(conv(x)))
        for block in self.blocks:
            x = block(x)
        for conv, norm in zip(self.up, self.up_norm):
            x = F.relu(norm(conv(x)))
        return torch.tanh(self.head(_reflect(x, 3)))


def _reflect(x: Tensor, width: int) -> Tensor:
    """Reflect `width` pixels at each border of `(batch, channels, height, width)`; smaller maps repeat their edge."""
    mode = "reflect" if min(x.shape[2:]) > width else "replicate"
    return F.pad(x, (width, width, width, width), mode=mode)


class Pix2PixModel(PreTrainedModel):
    """Generator of Pix2Pix: images in `[-1, 1]` to images in `[-1, 1]`.

    `torch.onnx.export(model, ..., dynamo=True)` gives the answers of the chosen `inference_stats`. Dropout does not
    survive the export, so a generator with `inference_dropout=True` is refused there.

    Args:
        config ([`Pix2PixConfig`]): Architecture and inference mode.
    """

    config_class = Pix2PixConfig
    base_model_prefix = "generator"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _auto_class = "AutoModelForImageToImage"
    _no_split_modules = ["Pix2PixUNet", "Pix2PixResNet"]

    def __init__(self, config: Pix2PixConfig) -> None:
        super().__init__(config)
        self.network = Pix2PixUNet(config) if config.generator == "unet" else Pix2PixResNet(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint.

        Modifications: weights that are not those of the configuration are refused, where the base class may leave some
        at random with a warning.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub id.
            *args: As in [`~PreTrainedModel.from_pretrained`].
            **kwargs: Likewise; `ignore_mismatched_sizes=True` switches the check off.

        Returns:
            [`Pix2PixModel`]: In evaluation mode; with `output_loading_info=True` a tuple, as in the base class.

        Raises:
            ValueError: If weights are missing, left over or of another shape.
        """
        unchecked = kwargs.pop("ignore_mismatched_sizes", False)
        with_info = kwargs.pop("output_loading_info", False)
        settings = {**kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **settings)
        wrong = {"missing": info["missing_keys"], "left over": info["unexpected_keys"]}
        wrong["of another shape"] = [key[0] for key in info["mismatched_keys"]]
        for what, keys in wrong.items():
            if keys and not unchecked:
                raise ValueError(
                    f"The weights of {pretrained_model_name_or_path} are not those of the architecture in its "
                    f"configuration: {min(keys)} is {what}; take both files from one checkpoint."
                )
        return (model, info) if with_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Draw convolutions from N(0, 0.02) and batch norm scales from N(1, 0.02) (paper, Sec. 6.2)."""
        super()._init_weights(module)
        if isinstance(module, nn.BatchNorm2d):
            init.normal_(module.weight, mean=1.0, std=0.02)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageToImageOutput | tuple[Tensor, ...]:
        """Translate images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, num_channels, height, width)`): Source images in
                `[-1, 1]`; height and width divisible by `config.size_divisor`.
            labels (`torch.FloatTensor` of shape `(batch, num_output_channels, height, width)`, *optional*): Wanted
                images in `[-1, 1]`; the loss is the mean absolute difference.
            return_dict (`bool`, *optional*): `False` for a plain tuple.
            **kwargs: Ignored, for callers that hand every column of a batch through.

        Returns:
            [`ImageToImageOutput`]: `loss` (with `labels`) and `reconstruction`.

        Raises:
            ValueError: If the input has another number of channels, a side that is not divisible, or another shape
                than `labels`; or if a generator with `inference_dropout=True` is exported to ONNX.
        """
        # the exporter tries twice, the second time under dynamo, where the first question is always answered by no
        exported = torch.onnx.is_in_onnx_export() or (
            torch.compiler.is_exporting() and torch.compiler.is_dynamo_compiling()
        )
        if self.config.inference_dropout and exported:
            raise ValueError(
                "`inference_dropout` must be False for an export to ONNX, got True: the file would run without "
                "dropout and give other images; set `model.config.inference_dropout = False` to export without noise."
            )
        if not torch.compiler.is_compiling():
            self._check_input(pixel_values, labels)
        reconstruction = self.network(pixel_values)
        loss = None if labels is None else F.l1_loss(reconstruction, labels)
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return tuple(value for value in (loss, reconstruction) if value is not None)
        return ImageToImageOutput(loss=loss, reconstruction=reconstruction)

    def _check_input(self, pixel_values: Tensor, labels: Tensor | None) -> None:
        divisor, channels = self.config.size_divisor, self.config.num_channels
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(f"`pixel_values` must have the shape (batch, {channels}, height, width), got {shape}.")
        if shape[2] % divisor or shape[3] % divisor:
            raise ValueError(
                f"`pixel_values` must have a height and width divisible by {divisor}, got {shape[2]}x{shape[3]}; let "
                f"Pix2PixImageProcessor(size_divisor={divisor}) pad the images."
            )
        if labels is not None and tuple(labels.shape) != (shape[0], self.config.num_output_channels, *shape[2:]):
            raise ValueError(
                f"`labels` must have the size of `pixel_values`, got {tuple(labels.shape)} for {shape}; "
                "both images of a pair need the same size."
            )

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save config, weights, code and image processor; each file appears whole or not at all.

        Modifications: everything is written to a temporary folder inside `save_directory` and moved into place when
        all of it is there, so a full disk leaves an older checkpoint as it was. Where no `preprocessor_config.json`
        that fits the generator is there, one is written, so that the checkpoint works in a pipeline.

        Args:
            save_directory (`str` or `os.PathLike`): Folder of the checkpoint.
            *args: As in [`~PreTrainedModel.save_pretrained`].
            **kwargs: As in [`~PreTrainedModel.save_pretrained`]; with `push_to_hub=True` the checkpoint is uploaded to
                `repo_id` after it is saved.
        """
        from .image_processing_pix2pix import Pix2PixImageProcessor

        directory = Path(save_directory)
        push = kwargs.pop("push_to_hub", False)
        hub = {
            name: kwargs.pop(name) for name in ("repo_id", "commit_message", "create_pr", "private") if name in kwargs
        }
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as name:
            staging = Path(name)
            super().save_pretrained(staging, *args, **kwargs)
            if (staging / "config.json").exists() and not self._fits(directory / "preprocessor_config.json"):
                Pix2PixImageProcessor.for_model(self.config).save_pretrained(staging)
            written = {path.name for path in staging.iterdir()}
            for path in sorted(staging.iterdir()):
                os.replace(path, directory / path.name)
        if any(_WEIGHT_FILE.fullmatch(name) for name in written):
            for path in directory.iterdir():  # shards of an older, differently split save
                if _WEIGHT_FILE.fullmatch(path.name) and path.name not in written:
                    path.unlink()
        if push:
            self.push_to_hub(hub.pop("repo_id", directory.name), token=kwargs.get("token"), **hub)

    def _fits(self, file: Path) -> bool:
        """Whether an image processor is there already, and not that of an older generator of another depth."""
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        divisor, channels = fields.get("size_divisor"), fields.get("num_channels")
        ours = divisor is not None and channels is not None
        return not ours or (divisor % self.config.size_divisor == 0 and channels == self.config.num_channels)


def _files_to_ship() -> tuple[type, ...]:
    """Name the pipeline's file to `save_pretrained`, which ships the files it finds imported; never called."""
    from .pipeline_pix2pix import ImageToImagePipeline

    return (ImageToImagePipeline,)


class Pix2PixDiscriminator(nn.Module):
    """PatchGAN: scores whether each patch of a target is real, given its source (paper, Sec. 6.1.2).

    Args:
        receptive_field (`int`, defaults to 70): Side in pixels of the patch one score sees: 1, 16, 34, 70, 142 or 286.
        num_channels (`int`, defaults to 6): Channels of source and target together.
        base_channels (`int`, defaults to 64): Filters of the first convolution.
        norm (`str`, defaults to `"instance"`): `"instance"`, `"batch"` or `"none"`.

    Raises:
        ValueError: If `receptive_field` is none of the six, `norm` none of the three, or a number of channels below 1.
    """

    def __init__(
        self, receptive_field: int = 70, num_channels: int = 6, base_channels: int = 64, norm: str = "instance"
    ) -> None:
        super().__init__()
        if receptive_field not in RECEPTIVE_FIELDS:
            allowed = ", ".join(str(size) for size in RECEPTIVE_FIELDS)
            raise ValueError(f"`receptive_field` must be one of {allowed} pixels, got {receptive_field}.")
        if norm not in NORMS:
            raise ValueError(f"`norm` must be one of {', '.join(NORMS)}, got {norm!r}.")
        for name, value in (("num_channels", num_channels), ("base_channels", base_channels)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.receptive_field, self.norm = receptive_field, norm
        bias, halvings, width = norm != "batch", RECEPTIVE_FIELDS[receptive_field], base_channels
        if halvings == 0:
            layers = [nn.Conv2d(num_channels, width, 1), nn.LeakyReLU(0.2, True)]
            layers += [nn.Conv2d(width, 2 * width, 1, bias=bias), make_norm(norm, 2 * width), nn.LeakyReLU(0.2, True)]
            layers += [nn.Conv2d(2 * width, 1, 1, bias=bias)]
        else:
            layers = [nn.Conv2d(num_channels, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
            for layer in range(1, halvings + 1):
                before, after = width * min(2 ** (layer - 1), 8), width * min(2**layer, 8)
                stride = 2 if layer < halvings else 1
                layers += [nn.Conv2d(before, after, 4, stride, 1, bias=bias), make_norm(norm, after)]
                layers += [nn.LeakyReLU(0.2, True)]
            layers += [Pix2PixScore(width * min(2**halvings, 8))]
        self.layers = nn.Sequential(*layers)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)

    @property
    def smallest_side(self) -> int:
        """Height and width in pixels below which there is not a single score."""
        return 3 * 2 ** RECEPTIVE_FIELDS[self.receptive_field] if self.receptive_field > 1 else 1

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Score patches.

        Args:
            source (`torch.FloatTensor` of shape `(batch, channels, height, width)`): The condition, in `[-1, 1]`.
            target (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Real or generated, in `[-1, 1]`.

        Returns:
            `torch.FloatTensor` of shape `(batch, 1, patches_high, patches_wide)`: Logits, high where real.

        Raises:
            ValueError: If the images are too small for a single score.
        """
        if min(source.shape[2:]) < self.smallest_side:
            raise ValueError(
                f"`receptive_field={self.receptive_field}` needs images of at least {self.smallest_side} pixels, got "
                f"{source.shape[2]}x{source.shape[3]}; choose a smaller receptive field or larger images."
            )
        return self.layers(torch.cat([source, target], 1))
