"""Put learnable masks on a network from outside: hooks, no copied forward.

A mask acts on the *output* of a module. For a convolution or a normalisation that is the same as multiplying its
weight and bias, which costs nothing per pixel, so the parameters are replaced by masked ones while the module runs.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .configuration_kdfs import KDFSConfig
from .flops_kdfs import build_cost_model
from .sampling_kdfs import choose_filters, fit_masks, gumbel_noise, reachable_reduction, sample_filters
from .structure_kdfs import NetworkStructure


logger = logging.get_logger(__name__)

CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing", "grad_checkpointing")  # transformers, timm


@dataclass
class KDFSMaskedOutput(ModelOutput):
    """Output of [`KDFSMaskedModel`].

    Args:
        loss (`torch.FloatTensor` without axes, *optional*): Cross entropy, if labels were given.
        logits (`torch.FloatTensor` of shape `(batch, labels)`): Logits of the masked network.
        stage_features (`tuple[torch.FloatTensor]`, *optional*): Decoded feature map of every stage, in training only.
        macs (`torch.DoubleTensor` without axes, *optional*): Multiply-adds of the sampled masks, in training only.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    stage_features: tuple[Tensor, ...] | None = None
    macs: Tensor | None = None


class FeatureTaps:
    """Keep the latest output of some modules.

    Args:
        network (`nn.Module`): The network.
        names (`list[str]`): Names of its modules.
    """

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        self.names = list(names)
        self.features: dict[str, Tensor] = {}
        self.handles = [
            network.get_submodule(name).register_forward_hook(partial(self._keep, name)) for name in self.names
        ]

    def _keep(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.features[name] = output

    def pop(self) -> tuple[Tensor, ...]:
        """Hand out the feature maps of the last forward pass and forget them.

        Returns:
            `tuple[torch.FloatTensor]`: Of shape `(batch, channels, height, width)` each, in the order of the names.
        """
        features = tuple(self.features[name] for name in self.names)
        self.features = {}
        return features

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


class _MaskedModule:
    """Hooks that let one module run under its mask."""

    def __init__(self, owner: "KDFSMaskedModel", module: nn.Module, slots: np.ndarray, masks_output: bool) -> None:
        self.owner = owner
        contiguous = bool((np.diff(slots) == 1).all())
        self.slots = slice(int(slots[0]), int(slots[-1]) + 1) if contiguous else torch.from_numpy(slots)
        self.on_output = masks_output or module.weight is None
        self.originals: dict[str, Tensor] = {}
        if self.on_output:  # first in line: a scatter that is already there comes after the mask
            module.register_forward_hook(self.multiply, prepend=True)
        else:
            module.register_forward_pre_hook(self.swap)
            module.register_forward_hook(self.restore, prepend=True, always_call=True)

    def mask(self) -> Tensor | None:
        masks = self.owner.current_slots
        if masks is None:
            return None
        if isinstance(self.slots, Tensor) and self.slots.device != masks.device:
            self.slots = self.slots.to(masks.device)
        return masks[self.slots]  # (channels,)

    def multiply(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        mask = self.mask()
        return output if mask is None else output * mask.to(output.dtype).view(1, -1, *[1] * (output.dim() - 2))

    def swap(self, module: nn.Module, args: tuple) -> None:
        mask = self.mask()
        if mask is None:
            return
        for name in ("weight", "bias"):
            parameter = module._parameters.get(name)
            if parameter is not None:
                self.originals[name] = parameter
                mask_of = mask.to(parameter.dtype).view(-1, *[1] * (parameter.dim() - 1))
                module._parameters[name] = parameter * mask_of

    def restore(self, module: nn.Module, args: tuple, output: Any) -> None:
        module._parameters.update(self.originals)
        self.originals = {}


class KDFSMaskedModel(nn.Module):
    """A network whose filters carry keep/drop logits.

    In training it draws one Gumbel mask per optimiser step; in evaluation it takes the likelier choice; after
    [`freeze_masks`] the masks are fixed in both.

    Args:
        network (`nn.Module`): An image classifier; it is changed in place (hooks), so hand in a copy.
        structure ([`NetworkStructure`]): Its structure.
        config ([`KDFSConfig`]): Settings of the run.

    Raises:
        ValueError: If the target cannot be reached, or the network recomputes its activations.
    """

    accepts_loss_kwargs = False
    main_input_name = "pixel_values"

    def __init__(self, network: nn.Module, structure: NetworkStructure, config: KDFSConfig) -> None:
        super().__init__()
        if any(getattr(module, flag, False) is True for module in network.modules() for flag in CHECKPOINTING):
            self.activation_checkpointing_enable()
        self.structure = structure
        self.pruning_config = config
        self.cost = build_cost_model(network, structure)
        self.sizes = [group.size for group in structure.groups]
        self.dense_macs = float(self.cost.count_macs(torch.ones(sum(self.sizes))))
        limit = reachable_reduction(self.cost, self.sizes, config.min_filters, config.round_to)
        if limit <= 0:
            raise ValueError(
                f"With `min_filters` {config.min_filters} and `round_to` {config.round_to} no filter can be removed: "
                f"the widest layer that may be pruned has {max(self.sizes)}; lower `min_filters` or `round_to`."
            )
        if config.target_flops_reduction > limit:
            named = f"{math.floor(limit * 1e4) / 1e4:.4f}"  # rounded down: it can be reached
            raise ValueError(
                f"`target_flops_reduction` must be at most {named} for this network with min_filters="
                f"{config.min_filters} and round_to={config.round_to}, but is {config.target_flops_reduction}; "
                f"choose a target in (0, {named}]."
            )
        self.network = network.to(memory_format=torch.contiguous_format)  # safetensors holds no other layout
        reference = next(network.parameters())
        self.mask_logits = nn.ParameterList(
            nn.Parameter(self._initial_logits(group.name).to(reference.device)) for group in structure.groups
        )
        self.register_buffer("frozen_masks", torch.ones(sum(self.sizes), device=reference.device))
        self.register_buffer("masks_frozen", torch.zeros((), dtype=torch.bool, device=reference.device))
        self.taps = FeatureTaps(network, structure.stages if config.reconstruction_weight > 0 else [])
        self.decoders = nn.ModuleList(self._decoder(name) for name in self.taps.names)
        self.decoders.to(reference.device, reference.dtype)
        self.importance_is_measured = False
        self.temperature = config.gumbel_start_temperature
        self.noise_seed, self.noise_step = 0, 0
        self.current_slots: Tensor | None = None  # mask of every slot while a forward pass runs
        for name, layer in structure.layers.items():
            if layer.masked:
                _MaskedModule(self, network.get_submodule(name), layer.outputs, layer.masks_output)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Refuse: masks exist while a forward pass runs, and activations would be computed again after it.

        Args:
            kwargs (`Any`): As of [`~transformers.PreTrainedModel.activation_checkpointing_enable`].

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Activation checkpointing (gradient checkpointing) must be off while masks are learned, but is on; switch "
            "it off in the arguments and in the model, or take smaller batches with `gradient_accumulation_steps`."
        )

    def _initial_logits(self, name: str) -> Tensor:
        layer = next(
            (
                item
                for item in self.structure.layers.values()
                if item.kind == "norm" and item.masked and self._reads_only(item, name)
            ),
            None,
        )
        weight = self.network.get_submodule(layer.name if layer else name).weight
        if weight is None:
            weight = self.network.get_submodule(name).weight
        importance = (
            weight.detach().float().flatten(1).norm(dim=1) if weight.dim() > 1 else weight.detach().float().abs()
        )
        spread = importance.std() if len(importance) > 1 else importance.new_zeros(())
        scaled = (importance - importance.mean()) / spread if spread > 0 else torch.zeros_like(importance)
        keep = self.pruning_config.initial_keep_margin + self.pruning_config.initial_importance_spread * scaled
        return torch.stack([torch.zeros_like(keep), keep], dim=1)  # (filters, 2)

    def _reads_only(self, layer: Any, name: str) -> bool:
        group = next(group for group in self.structure.groups if group.name == name)
        return len(layer.inputs) == group.size and layer.inputs[0] == group.offset + 1

    def _decoder(self, name: str) -> nn.Conv2d:
        layer = self.structure.stage_channels[name]
        decoder = nn.Conv2d(layer, layer, kernel_size=1)
        nn.init.dirac_(decoder.weight)  # starts as the identity: the student starts as the teacher
        nn.init.zeros_(decoder.bias)
        return decoder

    def drop_decoders(self) -> None:
        """Train without the reconstruction loss."""
        self.taps.remove()
        self.taps = FeatureTaps(self.network, [])
        self.decoders = nn.ModuleList()

    def set_noise(self, seed: int, step: int, temperature: float) -> None:
        """Choose the draw of the next forward passes.

        Args:
            seed (`int`): Seed of the run.
            step (`int`): Global step; all micro steps and processes of one step share one mask.
            temperature (`float`): Gumbel-softmax temperature.
        """
        self.noise_seed, self.noise_step, self.temperature = seed, step, temperature

    def masks(self) -> Tensor:
        """The masks of a forward pass in the present mode.

        Returns:
            `torch.FloatTensor` of shape `(filters,)`: All groups, one after the other.
        """
        if self.masks_frozen:
            return self.frozen_masks
        if not self.training:
            return torch.cat([choose_filters(logits) for logits in self.mask_logits])
        logits = torch.cat(list(self.mask_logits)).float()
        noise = gumbel_noise(tuple(logits.shape), self.noise_seed, self.noise_step).to(logits.device)
        return sample_filters(logits, noise, self.temperature)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> KDFSMaskedOutput:
        """Run the network under its masks.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Images.
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*): Classes.

        Returns:
            [`KDFSMaskedOutput`]: Logits; in training also the decoded stage features and the cost of the masks.
        """
        with torch.autocast(pixel_values.device.type, enabled=False):
            masks = self.masks()
            macs = self.cost.to(masks.device).count_macs(masks) if self.training else None
        self.current_slots = torch.cat([masks.new_ones(1), masks])  # (slots,)
        try:
            output = self.network(pixel_values)
        finally:
            self.current_slots = None
        features = self.taps.pop()
        logits = getattr(output, "logits", output)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        if not self.training:
            return KDFSMaskedOutput(loss=loss, logits=logits)
        decoded = tuple(decoder(feature) for decoder, feature in zip(self.decoders, features, strict=True))
        return KDFSMaskedOutput(loss=loss, logits=logits, stage_features=decoded or None, macs=macs)

    def run_under(self, masks: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of the network under given masks, which may carry a gradient.

        Args:
            masks (`torch.FloatTensor` of shape `(filters,)`): All groups, one after the other.
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Images.
            labels (`torch.LongTensor` of shape `(batch,)`): Classes.

        Returns:
            `torch.FloatTensor` without axes: The loss.
        """
        self.current_slots = torch.cat([masks.new_ones(1), masks])  # (slots,)
        try:
            output = self.network(pixel_values)
        finally:
            self.current_slots = None
            self.taps.features = {}
        return nn.functional.cross_entropy(getattr(output, "logits", output).float(), labels)

    def freeze_masks(self) -> None:
        """Fix the masks at the target: least certain filters are flipped until the cost is met."""
        config = self.pruning_config
        masks = fit_masks(list(self.mask_logits), self.cost, config.keep_share, config.min_filters, config.round_to)
        self.frozen_masks.copy_(torch.cat(masks))
        self.masks_frozen.fill_(True)
        reduction = 1 - float(self.cost.count_macs(self.frozen_masks.cpu())) / self.dense_macs
        if abs(reduction - config.target_flops_reduction) > 0.01:
            logger.warning(
                "The layers are too coarse for the target: %.4f of the multiply-adds are removed, not %.4f; "
                "with round_to=%d no step of one layer, and no step up with one down, ends closer.",
                reduction,
                config.target_flops_reduction,
                config.round_to,
            )

    @torch.no_grad()
    def kept_channels(self) -> dict[str, tuple[int, int]]:
        """Input and output channels of every layer under the masks without noise.

        Returns:
            `dict[str, tuple[int, int]]`: By module name inside this model, as the sliced network will have them.
        """
        masks = (
            self.frozen_masks if self.masks_frozen else torch.cat([choose_filters(item) for item in self.mask_logits])
        )
        slots = torch.cat([masks.new_ones(1), masks]).cpu().numpy() > 0
        return {
            f"network.{name}": (int(slots[layer.inputs].sum()), int(slots[layer.outputs].sum()))
            for name, layer in self.structure.layers.items()
        }
