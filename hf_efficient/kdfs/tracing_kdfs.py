"""Record which tensor operation read and wrote what while one image passes through a network.

The record knows nothing of filters; [`structure_kdfs`] reads it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Operation:
    """One tensor operation.

    Args:
        name (`str`): Name without overload, such as `convolution`.
        module (`str`): Innermost module that ran it.
        arguments (`tuple`): Positional arguments; tensors are replaced by their numbers wrapped in [`Ref`].
        inputs (`list[int]`): Numbers of the tensors read, in order.
        outputs (`list[int]`): Numbers of the tensors written.
    """

    name: str
    module: str
    arguments: tuple
    inputs: list[int]
    outputs: list[int]


@dataclass(frozen=True)
class Ref:
    """Number of a tensor in the record."""

    number: int


@dataclass
class ModuleOutput:
    """A module returned a tensor (module name, tensor number)."""

    module: str
    number: int


@dataclass
class NetworkRecord:
    """What happened, in order.

    Args:
        events (`list[Operation | ModuleOutput]`): Operations and module returns.
        shapes (`dict[int, tuple[int, ...]]`): Shape of every tensor by its number.
        calls (`dict[str, int]`): How often each module ran.
        weights (`dict[str, int]`): Number of the parameter `weight` of every module that was read as it is.
        output (`int`): Number of the logits.
    """

    events: list[Operation | ModuleOutput] = field(default_factory=list)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    output: int = -1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.record = NetworkRecord()
        self.alive: list[Tensor] = []  # holds every tensor, so that an id names one tensor only
        self.numbers: dict[int, int] = {}
        self.stack: list[str] = [""]

    def number(self, tensor: Tensor) -> int:
        if id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.alive)
            self.record.shapes[len(self.alive)] = tuple(tensor.shape)
            self.alive.append(tensor)
        return self.numbers[id(tensor)]

    def _refer(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Ref(self.number(value))
        if isinstance(value, (list, tuple)):
            return tuple(self._refer(item) for item in value)
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.record.events.append(
            Operation(
                name=func.overloadpacket.__name__,
                module=self.stack[-1],
                arguments=self._refer(args),
                inputs=[self.number(tensor) for tensor in _tensors(args)],
                outputs=[self.number(tensor) for tensor in _tensors(result)],
            )
        )
        return result


def example_input(model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    """One image of zeros on the model's device.

    Args:
        model (`nn.Module`): Gives device and dtype.
        input_shape (`tuple[int, ...]`): `(channels, height, width)`, a batch axis before it is ignored.

    Returns:
        `torch.FloatTensor` of shape `(1, channels, height, width)`.

    Raises:
        ValueError: If `input_shape` has not three or four axes.
    """
    if len(input_shape) not in (3, 4):
        raise ValueError(
            f"`input_shape` must be (channels, height, width), with or without a batch axis, but is {input_shape}."
        )
    parameter = next(model.parameters(), torch.zeros(()))
    return torch.zeros(1, *input_shape[-3:], device=parameter.device, dtype=parameter.dtype)


def record_network(model: nn.Module, input_shape: tuple[int, ...]) -> NetworkRecord:
    """Run one image through the network in evaluation mode and record every tensor operation.

    Args:
        model (`nn.Module`): An image classifier that returns logits or an output with `.logits`.
        input_shape (`tuple[int, ...]`): `(channels, height, width)`.

    Returns:
        [`NetworkRecord`]: Operations with the module that ran them and the returns of all modules.

    Raises:
        ValueError: If the network does not take such an image, or returns no logits.
    """
    recorder = _Recorder()
    record = recorder.record

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            recorder.stack.append(name)
            record.calls[name] = record.calls.get(name, 0) + 1

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            recorder.stack.pop()
            if isinstance(output, Tensor):
                record.events.append(ModuleOutput(name, recorder.number(output)))

        return hook

    handles = []
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
                handles.append(module.register_forward_hook(leave(name)))
        image = example_input(model, input_shape)
        with torch.no_grad(), recorder:
            output = model(image)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot take an image of the shape {tuple(input_shape[-3:])} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); give images as its processor "
            "makes them."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in recorder.numbers:
            record.weights[name] = recorder.numbers[id(weight)]
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        logits = next(_tensors(logits), None)
    if logits is None:
        raise ValueError(
            f"`model` must return logits, but {type(model).__name__} returns a {type(output).__name__}; take the "
            "class with a head for image classification."
        )
    record.output = recorder.number(logits)
    return record
