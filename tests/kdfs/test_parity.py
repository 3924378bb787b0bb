"""Losses, temperature schedule and multiply-adds agree with the authors' code (`tests/fixtures/kdfs.*`)."""

import pytest
import torch

from hf_efficient import CifarResNetConfig, CifarResNetForImageClassification, count_flops
from hf_efficient.kdfs.losses_kdfs import distillation_loss, flops_loss, reconstruction_loss
from hf_efficient.kdfs.sampling_kdfs import gumbel_temperature


def close(value, expected, rtol):
    torch.testing.assert_close(torch.as_tensor(value).double(), torch.tensor(expected).double(), rtol=rtol, atol=0)


@pytest.mark.parametrize(("temperature", "name"), [(1.0, "kd_T1_no_scale"), (3.0, "kd_T3_scaled_by_T2")])
def test_distillation(original, temperature, name):
    numbers, tensors = original
    loss = distillation_loss(tensors["loss.logits_s"], tensors["loss.logits_t"], temperature)
    close(loss, numbers["loss_values"][name], numbers["tolerances"]["losses"]["rtol"])


def test_reconstruction(original):
    numbers, tensors = original
    loss = reconstruction_loss(tensors["loss.feat_s"], tensors["loss.feat_t"])
    close(loss, numbers["loss_values"]["rc"], numbers["tolerances"]["losses"]["rtol"])


def test_flops_loss(original):
    numbers, _ = original
    loss = flops_loss(torch.tensor(80e6, dtype=torch.float64), 125.49e6, 0.48)
    close(loss, numbers["loss_values"]["mask_loss_F80M_B125.49M_r0.48"], numbers["tolerances"]["losses"]["rtol"])


def test_gumbel_schedule(original):
    numbers, _ = original
    schedule = numbers["gumbel_temperature_start1_end0.1_epochs350"]
    assert len(schedule) == 7
    for epoch, expected in schedule.items():
        close(gumbel_temperature(int(epoch), 350, 1.0, 0.1), expected, 1e-12)


@pytest.mark.parametrize(("depth", "name"), [(56, "resnet_56_cifar10"), (110, "resnet_110_cifar10")])
def test_cifar_networks_have_the_known_size(original, depth, name):
    expected = original[0]["flops_conventions"][name]
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=depth))
    assert count_flops(model, (3, 32, 32)) == expected["conv_plus_fc"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["true_params"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer_type", "depths", "sizes", "name"),
    [
        ("basic", [2, 2, 2, 2], [64, 128, 256, 512], "ResNet_18_imagenet"),
        ("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048], "ResNet_50_imagenet"),
    ],
)
def test_imagenet_networks_have_the_known_size(original, layer_type, depths, sizes, name):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(layer_type=layer_type, depths=depths, hidden_sizes=sizes, num_labels=1000)
    model = ResNetForImageClassification(config)
    expected = original[0]["flops_conventions"][name]
    assert count_flops(model, (1, 3, 224, 224)) == expected["conv_plus_fc"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["true_params"]


def test_count_flops_refuses_a_shape_without_channels():
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8))
    with pytest.raises(ValueError, match=r"\(32, 32\)"):
        count_flops(model, (32, 32))
