"""Slicing is exact in every family, and costs what the masks promised."""

import copy

import pytest
import torch
from torch import nn

from hf_efficient import CifarResNetConfig, CifarResNetForImageClassification, count_flops
from hf_efficient.kdfs.slicing_kdfs import slice_network, write_back
from hf_efficient.kdfs.structure_kdfs import read_structure


FAST = [
    "cifar_resnet",
    "resnet_basic",
    "resnet_bottleneck",
    "mobilenet_v2",
    "plain",
    "timm_resnet",
    "timm_densenet",
]
HEAVY = [
    "timm_vgg_bn",
    "timm_mobilenetv2",
    "timm_efficientnet_lite0",
    "timm_resnet50",
    "timm_densenet121",
    "timm_inception_v3",
]
FAMILIES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in HEAVY)]
TARGET = 0.35


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def relative(a, b):
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sliced_network_is_the_masked_one(network, slice_randomly, family):
    model, shape = network(family)
    model = model.double()
    masked, pruned = slice_randomly(model, shape, target_flops_reduction=TARGET)
    images = torch.randn(3, *shape, dtype=torch.float64)
    with torch.no_grad():
        dense, expected, got = (net(images).logits for net in (model, masked, pruned))
    assert relative(expected, got) < 1e-12, "exact: what is left is the rounding of sums"
    assert relative(dense, expected) > 1e-2, "the masks must do something"

    dense_macs, macs = count_flops(model, shape), count_flops(pruned, shape)
    assert macs == count_flops(masked, shape) == round(float(masked.cost.count_macs(masked.frozen_masks)))
    assert parameters(pruned) == round(float(masked.cost.count_parameters(masked.frozen_masks)))
    assert masked.dense_macs == dense_macs
    assert abs(1 - macs / dense_macs - TARGET) < 0.01
    kept = masked.kept_channels()
    counts = [(group.size, kept[f"network.{group.name}"][1]) for group in masked.structure.groups]
    assert min(after for _, after in counts) >= 1
    assert sum(after < before for before, after in counts) >= len(counts) // 3


STEPS = ["prelu", "scale", "pad_with_ones", "mean_of_all", "pad_features"]
STEPS += ["standardised", "functional_norm", "sigmoid_norm", "split"]


@pytest.mark.parametrize("step", STEPS)
def test_steps_with_values_of_their_own_are_exact(network, slice_randomly, step):
    """What cannot be sliced (a parameter per channel) or is not zero at zero gets its filters scattered before it."""
    model, shape = network(step)
    masked, pruned = slice_randomly(model.double(), shape, target_flops_reduction=0.05, include_layers=["conv1"])
    assert not masked.frozen_masks.all()
    images = torch.randn(2, *shape, dtype=torch.float64)
    with torch.no_grad():
        assert relative(masked(images).logits, pruned(images).logits) < 1e-12


@pytest.mark.parametrize("family", ["cifar_resnet", "resnet_bottleneck", "timm_densenet"])
def test_rounded_widths_are_exact_too(network, slice_randomly, family):
    model, shape = network(family)
    masked, pruned = slice_randomly(model.double(), shape, target_flops_reduction=0.3, round_to=8)
    images = torch.randn(2, *shape, dtype=torch.float64)
    with torch.no_grad():
        assert relative(masked(images).logits, pruned(images).logits) < 1e-5
    dropped = 0
    for group in masked.structure.groups:
        conv = pruned.network.get_submodule(group.name)
        assert conv.out_channels % 8 == 0 or conv.out_channels == group.size
        dropped += group.size - conv.out_channels
    assert dropped > 0


@pytest.mark.parametrize("family", ["cifar_resnet", "timm_densenet", "plain"])
def test_off_is_off(network, mask, family):
    """With every filter kept the masked network gives the host's logits bit for bit."""
    model, shape = network(family)
    masked = mask(model, shape, random=False, initial_keep_margin=50.0, target_flops_reduction=0.3)
    images = torch.randn(2, *shape)
    with torch.no_grad():
        assert torch.equal(masked(images).logits, model(images).logits)
        assert torch.equal(masked.network(images).logits, model(images).logits)


def test_the_mask_acts_after_the_normalisation(network, mask):
    """A dropped filter is zero where the next convolution reads it, not the shift of its normalisation."""
    model, shape = network("cifar_resnet")
    masked = mask(model, shape, target_flops_reduction=0.3)
    masked.freeze_masks()
    block = masked.network.cifar_resnet.layer1[0]
    seen = {}
    block.bn1.register_forward_hook(lambda module, args, output: seen.update(bn1=output))
    with torch.no_grad():
        masked(torch.randn(2, *shape))
    layer = masked.structure.layers["cifar_resnet.layer1.0.bn1"]
    keep = torch.cat([torch.ones(1), masked.frozen_masks])[torch.from_numpy(layer.outputs)] > 0
    assert not keep.all()
    assert not seen["bn1"][:, ~keep].any()
    assert (seen["bn1"][:, keep].abs().amax(dim=(0, 2, 3)) > 0).all()
    assert (block.bn1.bias[~keep].abs() > 1e-3).all(), "the shift alone would not be zero"


def test_residual_ends_keep_their_own_filters(network, mask):
    model, shape = network("resnet_basic")
    structure = mask(model, shape, target_flops_reduction=0.3).structure
    layers = structure.layers
    for block in ("0.layers.0", "0.layers.1", "1.layers.0", "1.layers.1"):
        first = layers[f"resnet.encoder.stages.{block}.layer.0.normalization"]
        last = layers[f"resnet.encoder.stages.{block}.layer.1.normalization"]
        assert (first.scattered, last.scattered) == (False, True)
        assert (last.outputs > 0).all()
    assert "resnet.encoder.stages.1.layers.0.shortcut.convolution" in structure.whole
    assert structure.stages == ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]


def test_a_depthwise_convolution_follows_its_producer(network, slice_randomly):
    model, shape = network("mobilenet_v2")
    masked, pruned = slice_randomly(model, shape, target_flops_reduction=0.3)
    layers = masked.structure.layers
    block = "mobilenet_v2.layer.1"
    assert (layers[f"{block}.conv_3x3.convolution"].outputs == layers[f"{block}.expand_1x1.convolution"].outputs).all()
    conv = pruned.network.get_submodule(f"{block}.conv_3x3.convolution")
    assert conv.groups == conv.in_channels == conv.out_channels < layers[f"{block}.conv_3x3.convolution"].inputs.size


def test_an_excluded_depthwise_convolution_stays_whole(network, slice_randomly):
    """It is as wide as what it reads, so that stays whole as well; one that is merely not included follows."""
    model, shape = network("mobilenet_v2")
    block = "mobilenet_v2.layer.1"
    _, pruned = slice_randomly(model, shape, target_flops_reduction=0.2, exclude_layers=["conv_3x3"])
    for name in (f"{block}.conv_3x3.convolution", f"{block}.expand_1x1.convolution"):
        assert pruned.network.get_submodule(name).out_channels == model.get_submodule(name).out_channels
    structure = read_structure(model, shape, exclude=["conv_3x3"])
    assert "named by `exclude_layers`" in structure.whole[f"{block}.expand_1x1.convolution"]
    only = read_structure(model, shape, include=["expand_1x1"])
    assert (only.layers[f"{block}.conv_3x3.convolution"].outputs > 0).all()
    assert f"{block}.conv_3x3.convolution" not in only.whole


def test_every_reader_of_a_preactivation_network_is_masked(network, mask):
    model, shape = network("timm_densenet")
    masked = mask(model, shape, target_flops_reduction=0.3)
    layers = masked.structure.layers
    group = next(group for group in masked.structure.groups if group.name.endswith("denselayer1.conv2"))
    slots = set(range(group.offset + 1, group.offset + 1 + group.size))
    readers = [layer.name for layer in layers.values() if layer.kind == "norm" and slots & set(layer.inputs.tolist())]
    assert len(readers) == 3  # two later layers and the transition
    assert all(layers[name].masked for name in readers)
    assert not masked.structure.whole


class Odd(nn.Module):
    """A shared, a grouped, a transposed-free chain and a gate: what cannot be followed is left whole or scattered."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.free = nn.Conv2d(8, 12, 1)
        self.gated = nn.Conv2d(12, 12, 1)
        self.last = nn.Conv2d(12, 6, 1)
        self.norm_last = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6 * 16, 5)

    def forward(self, pixel_values):
        hidden = torch.relu(self.norm(self.first(pixel_values)))
        hidden = torch.relu(self.shared(torch.relu(self.shared(hidden))))
        hidden = torch.relu(self.grouped(hidden))
        hidden = torch.relu(self.free(hidden))
        hidden = self.gated(hidden) * torch.sigmoid(hidden)
        hidden = torch.relu(self.norm_last(self.last(hidden)))
        return self.linear(nn.functional.adaptive_avg_pool2d(hidden, 4).flatten(1))


def test_what_cannot_be_followed_stays_exact(mask):
    model = Odd().double().eval()
    with torch.no_grad():
        model.norm.bias.fill_(0.5), model.norm_last.bias.fill_(-0.3)
    masked = mask(model, (3, 8, 8), target_flops_reduction=0.1)
    structure = masked.structure
    assert {"shared", "grouped"} <= set(structure.whole)
    groups = {group.name for group in structure.groups}
    assert {"first", "free", "gated", "last"} == groups
    assert structure.layers["norm"].scattered
    # flattened 4x4 maps: every filter is read sixteen times
    assert structure.layers["linear"].inputs.size == 96
    masked.freeze_masks()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for name, layer in structure.layers.items():
        if not layer.scattered:
            continue
        seen = {}
        handle = masked.network.get_submodule(name).register_forward_hook(
            lambda module, args, output, seen=seen: seen.update(output=output)
        )
        masked(images)
        handle.remove()
        keep = torch.cat([torch.ones(1), masked.frozen_masks])[torch.from_numpy(layer.outputs)] > 0
        assert not seen["output"][:, ~keep].any(), f"{name} would not be scattered exactly"


def test_layers_are_chosen_by_name(network):
    model, shape = network("cifar_resnet")
    only = read_structure(model, shape, include=[r"layer3\."])
    assert {group.name.split(".")[1] for group in only.groups} == {"layer3"}
    without = read_structure(model, shape, exclude=[r"conv2$"])
    assert all(group.name.endswith("conv1") for group in without.groups)
    with pytest.raises(ValueError, match=r"include_layers"):
        read_structure(model, shape, include=["nothing"])


def test_a_model_without_convolutions_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(ValueError, match="Sequential has none"):
        read_structure(model, (3, 2, 2))


def test_an_unreachable_target_names_the_range(network, mask):
    model, shape = network("cifar_resnet")
    with pytest.raises(ValueError, match=r"at most 0\.\d+ .* but is 0\.99; choose a target in \(0, 0\.\d+\]"):
        mask(model, shape, target_flops_reduction=0.99)


def test_reading_leaves_the_model_as_it_was(network):
    model, shape = network("cifar_resnet")
    model.train()
    model.cifar_resnet.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    read_structure(model, shape)
    assert model.training
    assert not model.cifar_resnet.bn1.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_pruned_network_is_pruned_again(network, slice_randomly, mask):
    model, shape = network("cifar_resnet")
    model = model.double()
    _, once = slice_randomly(model, shape, target_flops_reduction=0.3)
    masked, twice = slice_randomly(once, shape, target_flops_reduction=0.3)
    images = torch.randn(2, *shape, dtype=torch.float64)
    with torch.no_grad():
        assert relative(masked(images).logits, twice(images).logits) < 1e-5
    assert abs(count_flops(twice, shape) / count_flops(once, shape) - 0.7) < 0.01
    assert twice.config.base_config.model_type == "cifar_resnet"
    index = twice.network.cifar_resnet.layer3[1].bn2.filter_index
    kept = twice.network.cifar_resnet.layer3[1].conv2.out_channels
    assert index.dtype == torch.int64
    assert len(index) == 24
    assert sorted(index[index < kept].tolist()) == list(range(kept))


def test_trained_weights_go_back_into_the_masked_network(network, slice_randomly):
    model, shape = network("cifar_resnet")
    masked, pruned = slice_randomly(model.double(), shape, target_flops_reduction=0.3)
    with torch.no_grad():
        for value in pruned.network.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1)
    images = torch.randn(2, *shape, dtype=torch.float64)
    with torch.no_grad():
        assert relative(masked(images).logits, pruned(images).logits) > 1e-3
        write_back(masked, pruned)
        assert relative(masked(images).logits, pruned(images).logits) < 1e-5


def test_masks_must_be_frozen_before_slicing(network, mask):
    model, shape = network("cifar_resnet")
    with pytest.raises(ValueError, match="freeze_masks"):
        slice_network(mask(model, shape, target_flops_reduction=0.3), model)


@pytest.mark.parametrize("depth", [9, 2, "20"])
def test_depth_is_six_n_plus_two(depth):
    with pytest.raises((ValueError, TypeError), match=str(depth)):
        CifarResNetForImageClassification(CifarResNetConfig(depth=depth))


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.conv2)
    return model


def test_a_weight_that_is_computed_is_left_whole(network):
    model, shape = network("plain")
    structure = read_structure(parametrized(model), shape)
    assert {group.name for group in structure.groups} == {"conv1"}
    assert structure.layers["conv1"].scattered
    assert "computes its weight" in structure.whole["conv2"]
