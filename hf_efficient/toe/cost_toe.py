"""What a schedule can save: multiply-adds of every stage against plain training (arithmetic on a model's shapes)."""

from numbers import Integral

import torch
from torch import Tensor, nn

from .attachment_toe import EncoderSite, find_encoder
from .configuration_toe import ToEConfig
from .expansion_toe import TokenExpansion


def count_step_multiply_adds(site: EncoderSite, num_patches: int, num_kept: int, after_layer: int) -> int:
    """Multiply-adds of one image's forward pass: patch projection, linear layers, attention products.

    A layer of n rows costs `n * (weights of its linear layers) + 2 * n^2 * dim`; heads and normalisation are left out,
    as is the selection: the bound is what an expansion for free would give. The backward pass costs twice as much for
    every term, so that ratios hold for whole training steps.

    Args:
        site (`EncoderSite`): The encoder, see `find_encoder`.
        num_patches (`int`): Patch tokens N of an image.
        num_kept (`int`): Patch tokens handed on by the stage.
        after_layer (`int`): Layers that see all tokens.

    Returns:
        `int`
    """
    others = site.num_prefix_tokens + site.num_suffix_tokens
    total = num_patches * sum(m.weight.numel() for m in site.embeddings.modules() if isinstance(m, nn.Conv2d))
    for position, layer in enumerate(site.layers):
        rows = others + (num_patches if position < after_layer else num_kept)
        linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        total += rows * sum(m.weight.numel() for m in linear) + 2 * rows**2 * linear[0].in_features
    return total


def count_patches(model: nn.Module, pixel_values: Tensor) -> int:
    """Patch tokens N that a model makes of an image.

    Args:
        model (`nn.Module`): The model to train.
        pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Images of the size trained on.

    Returns:
        `int`

    Raises:
        ValueError: If the model is refused.
    """
    site, rows = find_encoder(model), []

    def note(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        rows.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    handle = site.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            model(pixel_values=pixel_values)
    finally:
        handle.remove()
    return rows[0] - site.num_prefix_tokens - site.num_suffix_tokens


def speedup_bound(
    model: nn.Module, num_patches: int, config: ToEConfig | None = None, num_epochs: int | None = None
) -> tuple[float, list[float]]:
    """How much faster a whole training can get at equal epochs, by multiply-adds.

    Args:
        model (`nn.Module`): The model to train.
        num_patches (`int`): Patch tokens N of an image.
        config (`ToEConfig`, *optional*): The schedule.
        num_epochs (`int`, *optional*): Length of the training; needed if `stage_starts` are epochs.

    Returns:
        `tuple`: Time of plain training over time of ToE training, and the cost of every stage as a share of plain.

    Raises:
        ValueError: If `num_epochs` is missing or too small, `num_patches` is no number of tokens, or the model is
            refused.
    """
    site, expansion = find_encoder(model), TokenExpansion(config)
    config = expansion.config
    if isinstance(num_patches, bool) or not isinstance(num_patches, Integral) or num_patches < 1:
        raise ValueError(
            f"`num_patches` must be an integer of at least 1, the patch tokens of an image, got {num_patches!r}."
        )
    if config.counts_epochs and (num_epochs is None or num_epochs <= config.stage_starts[-1]):
        raise ValueError(
            f"`num_epochs` must be above the last of `stage_starts` {config.stage_starts}, got {num_epochs}."
        )
    total = float(num_epochs) if config.counts_epochs else 1.0
    plain = count_step_multiply_adds(site, num_patches, num_patches, config.after_layer)
    shares = [
        count_step_multiply_adds(site, num_patches, expansion.num_kept(num_patches, stage), config.after_layer) / plain
        for stage in range(1, config.num_stages + 1)
    ]
    ends = [*config.stage_starts[1:], total]
    cost = config.stage_starts[0] / total + sum(
        share * (end - start) / total for share, start, end in zip(shares, config.stage_starts, ends)
    )
    return 1 / cost, shares
