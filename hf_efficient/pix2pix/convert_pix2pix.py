"""Generator files of the widely used PyTorch implementation (`netG` key layout) to checkpoints of this package.

The layout nests every U-Net level in the one around it (`model.model.0`, `model.model.1.model.1`, ...) and lists a
ResNet flat (`model.1`, `model.4`, ...). Architecture, width, norm and dropout are read from keys and shapes.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .configuration_pix2pix import Pix2PixConfig
from .modeling_pix2pix import Pix2PixModel


_UNET_START, _UNET_STEP = "model.model.", "1.model."  # the outermost block's submodule is its layer 1, inner ones' 3


def convert_pix2pix_checkpoint(
    source: str | os.PathLike, destination: str | os.PathLike, *, overwrite: bool = False
) -> Path:
    """Convert one generator file.

    What the file does not tell: a U-Net's dropout layers have no weights and come last in their blocks, so its
    `dropout` becomes 0.5, the value of that implementation's default; it plays no role at inference unless
    `inference_dropout` is set. Batch norm checkpoints get `inference_stats="running"`, which is what that
    implementation computes in `eval()` mode.

    Args:
        source (`str` or `os.PathLike`): A `.safetensors` file, or a `.pth` file, read with
            `torch.load(weights_only=True)` alone.
        destination (`str` or `os.PathLike`): Folder of the new checkpoint.
        overwrite (`bool`, defaults to `False`): Replace a `destination` that holds files.

    Returns:
        `pathlib.Path`: The folder written.

    Raises:
        FileNotFoundError: If `source` is no file.
        FileExistsError: If `destination` is a file or holds `source`, or holds files and `overwrite` is false.
        ValueError: If `source` holds another architecture or is no checkpoint.
    """
    source, destination = Path(source), Path(destination)
    if not source.is_file():
        found = "which is a folder" if source.is_dir() else "which does not exist"
        raise FileNotFoundError(f"`source` must be a file such as latest_net_G.pth, got {source}, {found}.")
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"`destination` must be a folder, got the file {destination}: choose another path.")
    if destination.exists() and any(destination.iterdir()) and not overwrite:
        raise FileExistsError(
            f"`destination` must be absent or an empty folder, got {destination}, which holds files: choose another "
            "folder or pass `overwrite=True`."
        )
    if source.resolve().is_relative_to(destination.resolve()):
        raise FileExistsError(
            f"`destination` must not hold what is converted, got {destination} for {source}: choose another folder."
        )
    weights = {name.removeprefix("module."): value for name, value in _read(source).items()}
    if any(name.startswith(_UNET_START) for name in weights):
        config, state = _convert_unet(weights, source)
    elif "model.1.weight" in weights:
        config, state = _convert_resnet(weights, source)
    else:
        raise _unknown(source, f"no key starts with {_UNET_START!r} or is 'model.1.weight'")
    model = Pix2PixModel(config)
    _load(model, state, source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".converting-") as name:
        staging, old = Path(name) / "checkpoint", Path(name) / "old"
        model.save_pretrained(staging)
        if destination.exists():
            os.replace(destination, old)
        try:
            os.replace(staging, destination)
        except OSError:
            if old.exists():
                os.replace(old, destination)
            raise
    return destination


def _read(source: Path) -> dict[str, Tensor]:
    if source.suffix == ".safetensors":
        try:
            return load_file(source)
        except Exception as error:
            raise ValueError(f"{source} is no readable safetensors file: {error}.") from error
    try:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"`source` must hold plain weights, got {source}, which is no PyTorch file, is damaged, or holds objects "
            "beside tensors (code in a pickle is never run): save the generator's state_dict() alone."
        ) from error
    named = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    if not named or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(
            f"`source` must hold a flat dictionary of tensors, got {source} with other values: save the generator's "
            "state_dict() alone."
        )
    return weights


def _unknown(source: Path, why: str) -> ValueError:
    return ValueError(
        f"{source} does not have the key layout of a pix2pix `unet_128`, `unet_256`, `resnet_6blocks` or "
        f"`resnet_9blocks` generator: {why}."
    )


def _find_norm(weights: dict[str, Tensor], norm_keys: list[str], conv_with_norm: str) -> str:
    """Batch norm has weights; instance norm has none, but the convolution before it a bias; else there is no norm."""
    if any(f"{key}.weight" in weights for key in norm_keys):
        return "batch"
    return "instance" if f"{conv_with_norm}.bias" in weights else "none"


def _take(state: dict[str, Tensor], new: str, weights: dict[str, Tensor], old: str) -> None:
    """Move every tensor of one layer."""
    for name in [name for name in weights if re.fullmatch(re.escape(old) + r"\.[a-z_]+", name)]:
        state[f"network.{new}.{name.rsplit('.', 1)[1]}"] = weights.pop(name)


def _drop_untrained(weights: dict[str, Tensor], norm: str) -> None:
    """Old files carry running averages of instance norms; that implementation ignores them, too."""
    if norm == "instance":
        for name in [
            name for name in weights if re.search(r"\.(running_mean|running_var|num_batches_tracked)$", name)
        ]:
            del weights[name]


def _convert_unet(weights: dict[str, Tensor], source: Path) -> tuple[Pix2PixConfig, dict[str, Tensor]]:
    weights = dict(weights)
    prefixes = [_UNET_START]
    while True:
        inner = prefixes[-1] + (_UNET_STEP if len(prefixes) == 1 else "3.model.")
        if f"{inner}1.weight" not in weights:
            break
        prefixes.append(inner)
    levels = len(prefixes)
    if f"{_UNET_START}0.weight" not in weights or levels < 2:
        raise _unknown(source, "the U-Net's outermost levels are missing")
    first, last = weights[f"{_UNET_START}0.weight"], weights.get(f"{_UNET_START}3.weight")
    if last is None or first.ndim != 4 or last.ndim != 4:
        raise _unknown(source, "the U-Net's outermost layers are missing")
    norm = _find_norm(weights, [f"{prefixes[-1]}4"], f"{prefixes[-1]}3")
    _drop_untrained(weights, norm)
    state: dict[str, Tensor] = {}
    for level, prefix in enumerate(prefixes):
        down, down_norm, up, up_norm = (1, 2, 5, 6)
        if level == 0:
            down, up = 0, 3
        elif level == levels - 1:
            up, up_norm = 3, 4
        _take(state, f"down.{level}", weights, f"{prefix}{down}")
        _take(state, f"up.{level}", weights, f"{prefix}{up}")
        if 0 < level < levels - 1:
            _take(state, f"down_norm.{level}", weights, f"{prefix}{down_norm}")
        if level > 0:
            _take(state, f"up_norm.{level}", weights, f"{prefix}{up_norm}")
    _check_rest(weights, source)
    return _config(source, first, last.shape[1], generator="unet", num_levels=levels, norm=norm, dropout=0.5), state


def _convert_resnet(weights: dict[str, Tensor], source: Path) -> tuple[Pix2PixConfig, dict[str, Tensor]]:
    weights = dict(weights)
    numbers = {int(match[1]) for match in (re.match(r"model\.(\d+)\.conv_block\.", name) for name in weights) if match}
    blocks = len(numbers)
    if blocks not in (6, 9):
        raise _unknown(source, f"a ResNet has 6 or 9 residual blocks, this file has {blocks}")
    second = weights.get("model.10.conv_block.6.weight")  # a dropout layer moves the second convolution from 5 to 6
    dropout = second is not None and second.ndim == 4
    norm = _find_norm(weights, ["model.2"], "model.1")
    _drop_untrained(weights, norm)
    after = 10 + blocks
    layers = {"stem": 1, "stem_norm": 2, "down.0": 4, "down_norm.0": 5, "down.1": 7, "down_norm.1": 8}
    layers |= {"up.0": after, "up_norm.0": after + 1, "up.1": after + 3, "up_norm.1": after + 4, "head": after + 7}
    first, last = weights["model.1.weight"], weights.get(f"model.{after + 7}.weight")
    if last is None or first.ndim != 4 or last.ndim != 4:
        raise _unknown(source, "the ResNet's first or last convolution is missing")
    state: dict[str, Tensor] = {}
    for new, old in layers.items():
        _take(state, new, weights, f"model.{old}")
    second = 6 if dropout else 5
    inside = {"conv1": 1, "norm1": 2, "conv2": second, "norm2": second + 1}
    for block in range(blocks):
        for new, old in inside.items():
            _take(state, f"blocks.{block}.{new}", weights, f"model.{10 + block}.conv_block.{old}")
    _check_rest(weights, source)
    generator, drop = f"resnet_{blocks}blocks", 0.5 if dropout else 0.0
    return _config(source, first, last.shape[0], generator=generator, norm=norm, dropout=drop), state


def _config(source: Path, first: Tensor, out_channels: int, **fields: Any) -> Pix2PixConfig:
    """Build the configuration; the training size is not in a file, so it becomes the usual one of the depth."""
    side = 2 ** fields["num_levels"] if fields["generator"] == "unet" else 256
    try:
        return Pix2PixConfig(
            num_channels=first.shape[1],
            num_output_channels=out_channels,
            base_channels=first.shape[0],
            image_size=side,
            **fields,
        )
    except ValueError as error:
        raise _unknown(source, str(error).rstrip(".")) from error


def _check_rest(weights: dict[str, Tensor], source: Path) -> None:
    if weights:
        raise _unknown(source, f"{len(weights)} keys have no place in it, e.g. {min(weights)!r}")


def _load(model: Pix2PixModel, state: dict[str, Tensor], source: Path) -> None:
    """Load every tensor; convolutions without bias before no norm get zeros."""
    wanted = model.state_dict()
    if model.config.norm == "none":
        state = {**{name: torch.zeros_like(wanted[name]) for name in wanted if name.endswith(".bias")}, **state}
    missing = sorted(wanted.keys() - state.keys() - {name for name in wanted if name.endswith("num_batches_tracked")})
    extra = sorted(state.keys() - wanted.keys())
    wrong = sorted(name for name in state.keys() & wanted.keys() if state[name].shape != wanted[name].shape)
    for names, what in ((missing, "is missing"), (extra, "has no place"), (wrong, "has another shape")):
        if names:
            raise _unknown(source, f"{names[0]!r} (in our names) {what}")
    model.load_state_dict(state, strict=False)
