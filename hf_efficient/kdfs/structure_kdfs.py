"""Read a network's structure: which filters can go, who reads them, where their mask makes slicing exact.

Every channel of every tensor carries a *slot*: 0 for a channel that always stays, `offset + i + 1` for a channel that
disappears with filter `i` of a group. A group is the output filters of one convolution. Slots travel through
activations, pooling, concatenation, flattening and depthwise convolutions. They end where they cannot be followed (a
residual addition with other channels): there the group keeps its own filter set and is scattered to full width.

A channel is *clean* once its mask acted on it and only functions with `f(0) = 0` followed: then a consumer reads
exact zeros, and leaving the channel out changes nothing. A mask acts on the output of every normalisation that a
group passes, so the mask of a pre-activation network acts on every consumer's normalised input.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from .tracing_kdfs import ModuleOutput, NetworkRecord, Operation, record_network


EXCLUDED = "named by `exclude_layers`"
CLEAN, DIRTY = 0, -1  # a positive state is 1 + number of the convolution whose unmasked output this is

# fmt: off
KEEPS_ZERO = frozenset((
    "relu", "relu_", "relu6", "silu", "silu_", "hardswish", "hardswish_", "gelu", "gelu_", "tanh", "tanh_",
    "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "selu", "mish", "mish_", "clone", "alias", "detach",
    "_to_copy", "contiguous", "neg", "abs", "hardtanh", "hardtanh_", "hardshrink", "softshrink", "sin", "erf",
    "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "native_dropout",
    "_prelu_kernel", "upsample_nearest2d", "upsample_bilinear2d", "lift_fresh",
))
MOVES_ZERO = frozenset((
    "sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "softplus", "exp", "log_sigmoid_forward", "cos", "rsub",
    "rsqrt", "reciprocal",
))
# fmt: on
ADDITIONS = frozenset(("add", "add_", "sub", "sub_"))
PRODUCTS = frozenset(("mul", "mul_"))
RESHAPES = frozenset(("view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze", "_reshape_alias"))
MATMULS = frozenset(("addmm", "mm", "linear"))


@dataclass
class FilterGroup:
    """The output filters of one convolution.

    Args:
        name (`str`): Module name of the convolution.
        size (`int`): Number of filters.
        offset (`int`): Its filters have the slots `offset + 1 ... offset + size`.
    """

    name: str
    size: int
    offset: int


@dataclass
class Layer:
    """A module whose width follows from the masks.

    Args:
        name (`str`): Module name.
        kind (`str`): `conv`, `depthwise`, `linear` or `norm`.
        inputs (`np.ndarray` of shape `(in_channels,)`): Slot of every input channel.
        outputs (`np.ndarray` of shape `(out_channels,)`): Slot of every output channel.
        macs (`int`): Multiply-adds per pair of input and output channel (per output channel for `depthwise`).
        weights (`int`): Parameters per such pair.
        extras (`int`): Parameters per output channel (bias; scale and shift of a normalisation).
        masked (`bool`): The mask acts on this module's output.
        masks_output (`bool`): It must be multiplied onto the output, since the module ends in an `f(0) != 0`.
        scattered (`bool`): The sliced module's output is put back to full width, zeros elsewhere.
    """

    name: str
    kind: str
    inputs: np.ndarray
    outputs: np.ndarray
    macs: int = 0
    weights: int = 0
    extras: int = 0
    masked: bool = False
    masks_output: bool = False
    scattered: bool = False


@dataclass
class NetworkStructure:
    """What the pruning pass knows of a network.

    Args:
        groups (`list[FilterGroup]`): Prunable convolutions in order of execution.
        layers (`dict[str, Layer]`): All convolutions, linear layers and normalisations by module name.
        stages (`list[str]`): Module whose output is the last full feature map of each resolution.
        stage_channels (`dict[str, int]`): Width of each of these feature maps.
        stage_sizes (`dict[str, tuple[int, int]]`): Their height and width.
        whole (`dict[str, str]`): Convolutions left whole, with the reason.
        input_shape (`tuple[int, int, int]`): Channels, height, width of the image it was read with.
    """

    groups: list[FilterGroup] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    stage_channels: dict[str, int] = field(default_factory=dict)
    stage_sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    input_shape: tuple[int, ...] = (3, 32, 32)

    @property
    def slots(self) -> int:
        """Number of slots, slot 0 included."""
        return 1 + sum(group.size for group in self.groups)


def _conv_kind(module: nn.Module) -> str:
    if module.groups == 1:
        return "conv"
    return "depthwise" if module.groups == module.in_channels else "grouped"


def _axes(op: Operation, rank: int) -> set[int]:
    """Axes that a reduction runs over; all of them where it names none."""
    named = op.arguments[1] if len(op.arguments) > 1 and isinstance(op.arguments[1], tuple) else ()
    return {axis % rank for axis in named or range(rank)}


class _Reader:
    """One pass over the record for a given decision which groups end in a scatter and which are masked at once."""

    def __init__(self, model: nn.Module, record: NetworkRecord, rules: "_Decisions") -> None:
        self.modules = dict(model.named_modules())
        self.record = record
        self.rules = rules
        self.slots: dict[int, np.ndarray] = {}
        self.states: dict[int, np.ndarray] = {}
        self.depths: dict[int, int] = {}
        self.layers: dict[str, Layer] = {}
        self.groups: list[FilterGroup] = []
        self.sources: list[str] = []  # convolutions whose raw output a state names
        self.maps: list[tuple[tuple[int, ...], str, bool, bool, int]] = []

    # state of tensors

    def slot(self, number: int) -> np.ndarray:
        if number not in self.slots:
            shape = self.record.shapes[number]
            self.slots[number] = np.zeros(shape[1] if len(shape) > 1 else 0, dtype=np.int64)
            self.states[number] = np.zeros_like(self.slots[number])
        return self.slots[number]

    def put(self, number: int, slots: np.ndarray, states: np.ndarray) -> None:
        self.slots[number] = slots
        self.states[number] = np.where(slots > 0, states, CLEAN)

    def names(self, slots: np.ndarray) -> set[str]:
        """Names of the groups behind the slots."""
        starts = np.array([group.offset for group in self.groups])
        found = np.unique(np.searchsorted(starts, slots[slots > 0] - 1, side="right") - 1)
        return {self.groups[index].name for index in found}

    def pin(self, slots: np.ndarray) -> None:
        """The groups behind these slots cannot be followed further: scatter them where they are masked first."""
        self.rules.pinned |= self.names(slots)

    # one event after the other

    def read(self) -> None:
        for event in self.record.events:
            if isinstance(event, ModuleOutput):
                self.module_output(event)
            elif event.outputs:
                self.operation(event)
        for name in self.names(self.slot(self.record.output)):
            self.rules.whole.setdefault(name, "its filters are the network's answer")

    def operation(self, op: Operation) -> None:
        out = op.outputs[0]
        self.depths[out] = max([self.depths.get(number, 0) for number in op.inputs], default=0)
        if op.name == "convolution":
            return self.convolution(op)
        if "batch_norm" in op.name:
            return self.batch_norm(op)
        if op.name in MATMULS:
            return self.linear(op)
        labelled = [number for number in op.inputs if self.slot(number).any()]
        if not labelled:
            return self.put(out, np.zeros_like(self.fresh(out)), np.zeros_like(self.fresh(out)))
        source = labelled[0]
        slots, states = self.slots[source], self.states[source]
        shape, shape_in = self.record.shapes[out], self.record.shapes[source]
        if self.keeps_zero(op):
            self.put(out, slots, states)
        elif op.name in MOVES_ZERO or (op.name in ADDITIONS and len(op.inputs) == 1):
            self.move_zero(op, source, out)
        elif op.name in ("mean", "amax", "sum") and 1 not in _axes(op, len(shape_in)):
            self.put(out, slots, states)
        elif op.name == "constant_pad_nd" and len(op.arguments[1]) <= 2 * (len(shape_in) - 2):
            value = op.arguments[2] if len(op.arguments) > 2 else 0
            plain = value in (0, -np.inf)  # minus infinity comes before a maximum: the channel stays as it was
            self.put(out, slots, states if plain else np.full_like(states, DIRTY))
        elif op.name in RESHAPES and len(shape) > 1 and shape[0] == shape_in[0] and shape[1] % len(slots) == 0:
            repeat = shape[1] // len(slots)
            self.put(out, np.repeat(slots, repeat), np.repeat(states, repeat))
        elif op.name == "cat" and (op.arguments[1] if len(op.arguments) > 1 else 0) % len(shape) == 1:
            self.put(
                out,
                np.concatenate([self.slot(number) for number in op.inputs]),
                np.concatenate([self.states[number] for number in op.inputs]),
            )
        elif op.name == "slice" and len(op.arguments) > 1 and op.arguments[1] % len(shape_in) != 1:
            self.put(out, slots, states)
        elif op.name in ADDITIONS:
            self.addition(op)
        elif op.name in PRODUCTS:
            self.product(op)
        else:
            self.pin(np.concatenate([self.slots[number] for number in labelled]))
            for number in op.outputs:
                self.put(number, self.fresh(number), self.fresh(number))

    def keeps_zero(self, op: Operation) -> bool:
        """Whether a zero stays zero, and no operand has a value per channel (as the slopes of a PReLU may)."""
        if op.name in PRODUCTS | {"div", "div_"}:
            return len(op.inputs) == 1
        return op.name in KEEPS_ZERO and all(np.prod(self.record.shapes[number]) == 1 for number in op.inputs[1:])

    def width(self, number: int, rank: int) -> int:
        """Channels of an operand beside one of `rank` axes; shapes align at the last axis."""
        shape = self.record.shapes[number]
        axis = 1 - rank + len(shape)
        return shape[axis] if 0 <= axis < len(shape) else 1

    def fresh(self, number: int) -> np.ndarray:
        shape = self.record.shapes[number]
        return np.zeros(shape[1] if len(shape) > 1 else 0, dtype=np.int64)

    def move_zero(self, op: Operation, source: int, out: int) -> None:
        slots = self.slots[source]
        for name, layer in self.layers.items():
            if f"{op.module}.".startswith(f"{name}.") and layer.masked:  # an activation inside the masked module
                self.rules.masks_output.add(name)
                return self.put(out, slots, self.states[source])
        self.put(out, slots, np.full_like(slots, DIRTY))

    def addition(self, op: Operation) -> None:
        first, second = op.inputs[:2]
        out = op.outputs[0]
        a, b = self.slot(first), self.slot(second)
        if np.array_equal(a, b):
            states = np.where(self.states[first] == self.states[second], self.states[first], DIRTY)
            return self.put(out, a, states)
        self.pin(np.concatenate([a, b]))
        depths = self.depths.get(first, 0), self.depths.get(second, 0)
        shortcut = a if depths[0] < depths[1] else b if depths[1] < depths[0] else a[:0]
        for name in self.names(shortcut):
            self.rules.whole.setdefault(name, "it carries a shortcut")
        self.put(out, self.fresh(out), self.fresh(out))

    def product(self, op: Operation) -> None:
        first, second = op.inputs[:2]
        out = op.outputs[0]
        a, b = self.slot(first), self.slot(second)
        rank = len(self.record.shapes[out])
        aligned = [len(self.record.shapes[number]) == rank for number in (first, second)]
        if all(aligned) and np.array_equal(a, b):
            clean = (self.states[first] == CLEAN) | (self.states[second] == CLEAN)
            return self.put(out, a, np.where(clean, CLEAN, DIRTY))
        if aligned[0] and not b.any() and self.width(second, rank) == 1:
            return self.put(out, a, self.states[first])
        if aligned[1] and not a.any() and self.width(first, rank) == 1:
            return self.put(out, b, self.states[second])
        self.pin(np.concatenate([a, b]))
        self.put(out, self.fresh(out), self.fresh(out))

    def demand_clean(self, number: int) -> None:
        """A consumer that sums over channels must read exact zeros."""
        slots, states = self.slot(number), self.states[number]
        for state in np.unique(states[slots > 0]):
            if state == DIRTY:
                self.pin(slots[states == DIRTY])
            elif state != CLEAN:
                self.rules.masked_at_once.add(self.sources[state - 1])

    def owner(self, op: Operation) -> tuple[str, nn.Module | None]:
        """The module that ran a convolution, if it ran once and read its own parameter, not one computed from it."""
        name = op.module
        fits = self.record.weights.get(name) == op.inputs[1] and self.record.calls.get(name, 0) == 1
        return name, self.modules[name] if fits else None

    def convolution(self, op: Operation) -> None:
        source, out = op.inputs[0], op.outputs[0]
        self.depths[out] += 1
        slots = self.slot(source)
        shape = self.record.shapes[out]
        name, module = self.owner(op)
        kind = _conv_kind(module) if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else "unknown"
        if kind in ("unknown", "grouped"):
            reason = "it is shared, transposed, no module or computes its weight anew in every pass"
            reason = "it is a grouped convolution" if kind == "grouped" else reason
            self.rules.whole.setdefault(name, reason)
            self.pin(slots)
            self.put(out, self.fresh(out), self.fresh(out))
            if kind == "grouped":
                self.add_conv(name, "grouped", module, self.fresh(source), self.fresh(out), shape)
            return
        if kind == "depthwise":
            if self.rules.whole.get(name) == EXCLUDED:  # it is as wide as what it reads
                for producer in self.names(slots):
                    self.rules.whole.setdefault(producer, f"the depthwise {name} after it is {EXCLUDED}")
            outputs = np.repeat(slots, module.out_channels // module.in_channels)
        else:
            self.demand_clean(source)
            outputs = self.new_group(name, module)
        layer = self.add_conv(name, kind, module, slots, outputs, shape)
        self.sources.append(name)
        states = np.full_like(outputs, len(self.sources))
        layer.masked = name in self.rules.masked_at_once and bool(outputs.any())
        if layer.masked:
            states[:] = CLEAN
        if kind == "conv" and name in self.rules.pinned and not self.norm_follows(out):
            layer.masked = layer.scattered = True
            outputs = np.zeros_like(outputs)
        self.put(out, outputs, states)

    def new_group(self, name: str, module: nn.Module) -> np.ndarray:
        if name in self.rules.whole:
            return np.zeros(module.out_channels, dtype=np.int64)
        group = FilterGroup(name, module.out_channels, sum(group.size for group in self.groups))
        self.groups.append(group)
        return np.arange(group.size, dtype=np.int64) + group.offset + 1

    def add_conv(
        self, name: str, kind: str, module: nn.Module, inputs: np.ndarray, outputs: np.ndarray, shape: tuple[int, ...]
    ) -> Layer:
        taps = int(np.prod(module.kernel_size))
        extras = 0 if module.bias is None else 1
        per_pair = 1 if kind != "grouped" else 1 / module.groups
        positions = int(np.prod(shape[2:]))
        layer = Layer(name, kind, inputs, outputs, positions * taps * per_pair, taps * per_pair, extras)
        self.layers[name] = layer
        return layer

    def norm_follows(self, number: int) -> bool:
        """Whether one normalisation, and nothing else, reads the tensor."""
        readers = [event for event in self.record.events if isinstance(event, Operation) and number in event.inputs]
        return len(readers) == 1 and "batch_norm" in readers[0].name and self.norm_module(readers[0]) is not None

    def norm_module(self, op: Operation) -> nn.Module | None:
        """The normalisation that ran, if its tensors lie where they can be sliced."""
        module = self.modules.get(op.module)
        fits = isinstance(module, nn.modules.batchnorm._BatchNorm) and self.record.calls[op.module] == 1
        return module if fits else None

    def batch_norm(self, op: Operation) -> None:
        source, out = op.inputs[0], op.outputs[0]
        slots = self.slot(source)
        module = self.norm_module(op)
        if module is None:
            self.pin(slots)
            return self.put(out, self.fresh(out), self.fresh(out))
        extras = 2 if module.affine else 0
        layer = Layer(op.module, "norm", slots, slots, extras=extras, masked=bool(slots.any()))
        layer.masks_output = op.module in self.rules.masks_output
        self.layers[op.module] = layer
        owners = self.names(slots)
        if owners and owners <= self.rules.pinned:
            layer.scattered = True
            slots = np.zeros_like(slots)
        self.put(out, slots, np.zeros_like(slots))

    def linear(self, op: Operation) -> None:
        name = op.module
        module = self.modules.get(name)
        out = op.outputs[0]
        source = op.inputs[1] if op.name == "addmm" else op.inputs[0]
        self.depths[out] += 1
        slots = self.slot(source)
        own = isinstance(module, nn.Linear) and "weight" in module._parameters  # not computed from others
        if own and self.record.calls[name] == 1 and len(slots) == module.in_features:
            self.demand_clean(source)
            extras = 0 if module.bias is None else 1
            rows = self.record.shapes[out][0]
            self.layers[name] = Layer(name, "linear", slots, self.fresh(out), rows, 1, extras)
        elif slots.any():
            self.pin(slots)
        self.put(out, self.fresh(out), self.fresh(out))

    def module_output(self, event: ModuleOutput) -> None:
        shape = self.record.shapes[event.number]
        slots = self.slot(event.number)
        layer = self.layers.get(event.module)
        if layer is not None and layer.masks_output and not layer.scattered:
            self.put(event.number, slots, np.zeros_like(slots))
        if len(shape) == 4 and shape[2] * shape[3] > 1:
            readable = bool((self.states[event.number] == CLEAN).all())
            self.maps.append((shape[2:], event.module, readable, not slots.any(), shape[1]))


@dataclass
class _Decisions:
    pinned: set[str] = field(default_factory=set)
    whole: dict[str, str] = field(default_factory=dict)
    masked_at_once: set[str] = field(default_factory=set)
    masks_output: set[str] = field(default_factory=set)

    def size(self) -> tuple[int, ...]:
        return len(self.pinned), len(self.whole), len(self.masked_at_once), len(self.masks_output)


def _stages(reader: _Reader) -> dict[str, int]:
    """The widest readable feature map of every resolution at which something is pruned; whole ones are preferred."""
    resolutions = list(dict.fromkeys(size for size, *_ in reader.maps))
    latest = {item[1]: item for item in reader.maps}  # of a module that runs twice its last output is kept
    pruned = {
        size for size, name, *_ in reader.maps if name in reader.layers and (reader.layers[name].outputs > 0).any()
    }
    stages = {}
    for resolution in resolutions:
        maps = [item for item in latest.values() if item[0] == resolution and item[2]]
        wide = [item for item in maps if item[3]] or maps
        if resolution in pruned and wide:
            last = max(enumerate(wide), key=lambda item: (item[1][4], item[0]))[1]  # the widest, of these the last
            stages[last[1]] = last[4]
    return stages


def check_convolutions(model: nn.Module) -> None:
    """Refuse a network that has no filters to prune.

    Args:
        model (`nn.Module`): An image classifier.

    Raises:
        ValueError: If it has no convolutions, or is a vision transformer whose only ones cut the image into patches.
    """
    kind = type(model).__name__
    convs = [module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)]
    if not convs:
        raise ValueError(f"`model` must contain convolutions, but {kind} has none; KDFS prunes filters of CNNs.")
    attends = any("attention" in type(module).__name__.lower() for module in model.modules())
    if attends and all(conv.kernel_size == conv.stride and max(conv.stride) > 1 for conv in convs):
        raise ValueError(
            f"`model` must have filters to prune, but {kind} is a vision transformer, whose only convolution cuts the "
            "image into patches; Token Expansion (`ToECallback`) makes the training of plain ones cheaper, to prune "
            "take a convolutional network such as a ResNet."
        )


def read_structure(
    model: nn.Module,
    input_shape: tuple[int, ...],
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
) -> NetworkStructure:
    """Read which filters can be pruned and what follows from pruning them.

    One image runs through the network; no rule names an architecture.

    Args:
        model (`nn.Module`): An image classifier.
        input_shape (`tuple[int, ...]`): `(channels, height, width)` of its images.
        include (`Iterable[str]`, *optional*): Regular expressions; only matching convolutions are pruned. Depthwise
            ones follow those that they read.
        exclude (`Iterable[str]`, *optional*): Regular expressions; matching convolutions are left whole, and with a
            depthwise one those that it reads.

    Returns:
        [`NetworkStructure`]: Groups, layers and stages.

    Raises:
        ValueError: If the model has no convolutions, none that can be pruned, or is a vision transformer.
    """
    check_convolutions(model)
    rules = _Decisions()
    for name in [name for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)]:
        if include is not None and not any(re.search(pattern, name) for pattern in include):
            rules.whole[name] = "not named by `include_layers`"
        elif any(re.search(pattern, name) for pattern in exclude or ()):
            rules.whole[name] = EXCLUDED
    record = record_network(model, input_shape)
    while True:
        before = rules.size()
        reader = _Reader(model, record, rules)
        reader.read()
        if rules.size() == before:
            break
    if not reader.groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(rules.whole.items())[:3])
        named = any("`" in reason for reason in rules.whole.values())
        remedy = "loosen `include_layers` or `exclude_layers`" if named else "choose another network"
        raise ValueError(f"No convolution of {type(model).__name__} can be pruned ({reasons}); {remedy}.")
    followers = {name for name, layer in reader.layers.items() if layer.kind == "depthwise" and layer.outputs.any()}
    whole = {name: reason for name, reason in rules.whole.items() if name in reader.modules.keys() - followers}
    stages = _stages(reader)
    sizes = {name: tuple(size) for size, name, *_ in reader.maps}
    return NetworkStructure(
        groups=reader.groups,
        layers=reader.layers,
        stages=list(stages),
        stage_channels=stages,
        stage_sizes={name: sizes[name] for name in stages},
        whole=whole,
        input_shape=tuple(input_shape[-3:]),
    )
