"""Count multiply-adds, of a plain network or of one under masks."""

from typing import Any

import numpy as np
import torch
from torch import nn

from .sampling_kdfs import CostModel
from .structure_kdfs import NetworkStructure
from .tracing_kdfs import example_input


def count_flops(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds (MACs) of all convolutions and linear layers for one sample.

    Biases, normalisation, activations, pooling and additions are free. On a masked network ([`KDFSMaskedModel`]) the
    dropped filters are, too: the number is that of the sliced network.

    Args:
        model (`nn.Module`): Any network whose first argument is an image.
        input_shape (`tuple[int, ...]`): `(channels, height, width)`; a batch axis before it is ignored.

    Returns:
        `int`: Multiply-adds of one sample.

    Raises:
        ValueError: If `input_shape` has not three or four axes.

    Example:
    ```python
    >>> from hf_efficient import CifarResNetConfig, CifarResNetForImageClassification, count_flops

    >>> count_flops(CifarResNetForImageClassification(CifarResNetConfig(depth=20)), (3, 32, 32))
    40551040
    ```
    """
    kept = model.kept_channels() if hasattr(model, "kept_channels") else {}
    total = 0

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            nonlocal total
            if isinstance(module, nn.Linear):
                default = (module.in_features, module.out_features)
                positions, groups = output[..., 0].numel(), 1
            else:
                default = (module.in_channels, module.out_channels)
                positions, groups = output[0, 0].numel() * int(np.prod(module.kernel_size)), module.groups
            inputs, outputs = kept.get(name, default)
            if groups > 1 and groups == module.in_channels:
                total += positions * outputs
            else:
                total += positions * inputs * outputs // groups

        return hook

    handles = [
        module.register_forward_hook(count(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(example_input(model, input_shape))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return total


def build_cost_model(model: nn.Module, structure: NetworkStructure) -> CostModel:
    """Multiply-adds and parameters as functions of the masks.

    Args:
        model (`nn.Module`): The network the structure was read from.
        structure ([`NetworkStructure`]): Its structure.

    Returns:
        [`CostModel`]: On the CPU; with all masks 1 it gives the counts of `model`.
    """
    layers = list(structure.layers.values())
    inputs = torch.zeros(len(layers), structure.slots, dtype=torch.float64)
    outputs = torch.zeros_like(inputs)
    for row, layer in enumerate(layers):
        outputs[row] = torch.from_numpy(np.bincount(layer.outputs, minlength=structure.slots))
        if layer.kind in ("depthwise", "norm"):
            inputs[row, 0] = 1
        else:
            inputs[row] = torch.from_numpy(np.bincount(layer.inputs, minlength=structure.slots))
    columns = [
        torch.tensor([float(getattr(layer, name)) for layer in layers], dtype=torch.float64)
        for name in ("macs", "weights", "extras")
    ]
    cost = CostModel(inputs, outputs, *columns)
    everything = torch.ones(structure.slots - 1, dtype=torch.float64)
    cost.fixed_macs = count_flops(model, structure.input_shape) - float(cost.count_macs(everything))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cost.fixed_parameters = parameters - float(cost.count_parameters(everything))
    return cost
