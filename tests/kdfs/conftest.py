"""Tiny networks, perturbed normalisation and toy data for the KDFS tests."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
)
from transformers.modeling_outputs import ImageClassifierOutput

from hf_efficient import CifarResNetConfig, CifarResNetForImageClassification, KDFSConfig
from hf_efficient.kdfs.masking_kdfs import KDFSMaskedModel
from hf_efficient.kdfs.slicing_kdfs import host_network, slice_network
from hf_efficient.kdfs.structure_kdfs import read_structure


FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


class PlainConfig(PreTrainedConfig):
    model_type = "kdfs_test_plain"


class PlainNetwork(PreTrainedModel):
    """Two convolutions without normalisation: gradients do not depend on how a batch is split."""

    config_class = PlainConfig

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.linear = nn.Linear(16, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None):
        hidden = torch.relu(self.conv2(torch.relu(self.conv1(pixel_values))))
        return ImageClassifierOutput(logits=self.linear(hidden.mean(dim=(2, 3))))


class StandardisedConv(nn.Conv2d):
    """Its filters have mean 0 and variance 1 over all input channels, those that a mask sets to zero among them."""

    def forward(self, images):
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(images, (self.weight - mean) / (variance + 1e-6).sqrt(), self.bias)


class FunctionalNorm(nn.Module):
    """A normalisation whose tensors lie where nobody looks for them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-0.3, 0.3, channels))
        self.register_buffer("variance", torch.linspace(0.5, 1.5, channels))

    def forward(self, images):
        return nn.functional.batch_norm(images, self.mean, self.variance)


class SigmoidNorm(nn.BatchNorm2d):
    """Not zero where its scale and shift are."""

    def forward(self, images):
        return torch.sigmoid(super().forward(images))


class UnusualConfig(PreTrainedConfig):
    model_type = "kdfs_test_unusual"
    step: str = "prelu"


class UnusualNetwork(PreTrainedModel):
    """A convolution, a normalisation, one step that has a parameter or a value of its own, a convolution."""

    config_class = UnusualConfig

    def __init__(self, config: UnusualConfig) -> None:
        super().__init__(config)
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        norms = {"functional_norm": FunctionalNorm, "sigmoid_norm": SigmoidNorm}
        self.norm = norms.get(config.step, nn.BatchNorm2d)(12)
        self.prelu = nn.PReLU(12)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 12))
        conv = StandardisedConv if config.step == "standardised" else nn.Conv2d
        self.conv2 = conv(12, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 3)
        self.linear = nn.Linear(18 if config.step == "pad_features" else 16, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.PReLU):
            nn.init.constant_(module.weight, 0.25)

    def forward(self, pixel_values, labels=None):
        hidden, step = self.norm(self.conv1(pixel_values)), self.config.step
        if step == "prelu":
            hidden = self.prelu(hidden)
        elif step == "scale":
            hidden = torch.relu(hidden) * self.scale.view(-1, 1, 1)
        elif step == "pad_with_ones":
            hidden = nn.functional.pad(torch.relu(hidden), (1, 1, 1, 1), value=1.0)
        elif step == "mean_of_all":
            hidden = torch.relu(hidden) * torch.relu(hidden).mean()
        elif step == "split":
            hidden = torch.cat(torch.relu(hidden).split([4, 8], dim=1)[::-1], dim=1)
        hidden = torch.relu(self.conv3(torch.relu(self.conv2(hidden)))).mean(dim=(2, 3))
        if step == "fixed_view":
            hidden = hidden.view(-1, 16)
        if step == "pad_features":
            hidden = nn.functional.pad(hidden, (1, 1))
        return ImageClassifierOutput(logits=self.linear(hidden))


UNUSUAL_STEPS = ["prelu", "scale", "pad_with_ones", "mean_of_all", "pad_features"]
UNUSUAL_STEPS += ["standardised", "functional_norm", "sigmoid_norm", "split", "fixed_view"]
AutoConfig.register(PlainConfig.model_type, PlainConfig, exist_ok=True)
AutoConfig.register(UnusualConfig.model_type, UnusualConfig, exist_ok=True)
AutoModelForImageClassification.register(UnusualConfig, UnusualNetwork, exist_ok=True)
AutoModelForImageClassification.register(PlainConfig, PlainNetwork, exist_ok=True)


def _timm(architecture: str, **model_args: Any) -> nn.Module:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(architecture=architecture, num_labels=5, model_args=model_args or None)
    return TimmWrapperForImageClassification(config)


# family -> (network, size of its images)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "cifar_resnet": (
        lambda: CifarResNetForImageClassification(CifarResNetConfig(depth=14, hidden_sizes=[8, 16, 24])),
        16,
    ),
    "resnet_basic": (
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=16, hidden_sizes=[16, 24], depths=[2, 2], layer_type="basic", num_labels=5)
        ),
        32,
    ),
    "resnet_bottleneck": (
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], num_labels=5)
        ),
        32,
    ),
    "mobilenet_v2": (
        lambda: MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, num_labels=5)),
        32,
    ),
    "plain": (lambda: PlainNetwork(PlainConfig(num_labels=5)), 12),
    **{step: (lambda step=step: UnusualNetwork(UnusualConfig(step=step, num_labels=5)), 12) for step in UNUSUAL_STEPS},
    "timm_resnet": (lambda: _timm("resnet18", layers=[1, 1, 1, 1], channels=[16, 16, 24, 32]), 32),
    "timm_densenet": (lambda: _timm("densenet121", block_config=[3, 3], growth_rate=8), 32),
    "timm_vgg_bn": (lambda: _timm("vgg11_bn", mlp_ratio=0.01), 32),
    "timm_mobilenetv2": (lambda: _timm("mobilenetv2_050"), 32),
    "timm_efficientnet_lite0": (lambda: _timm("tf_efficientnet_lite0"), 64),
    "timm_resnet50": (lambda: _timm("resnet50"), 64),
    "timm_densenet121": (lambda: _timm("densenet121"), 64),
    "timm_inception_v3": (lambda: _timm("inception_v3"), 96),
}


def perturb(model: nn.Module) -> nn.Module:
    """Statistics, scales and shifts as after a training: nothing is 0 or 1 any more."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                shape = module.running_mean.shape
                module.weight.copy_(1 + 0.3 * torch.randn(shape, generator=generator))
                module.bias.copy_(0.3 * torch.randn(shape, generator=generator))
                module.running_mean.copy_(0.3 * torch.randn(shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
    return model


@pytest.fixture
def network() -> Callable[[str], tuple[nn.Module, tuple[int, int, int]]]:
    """`network(family)` gives a network with perturbed normalisation and the shape of its images."""

    def build(family: str) -> tuple[nn.Module, tuple[int, int, int]]:
        make, size = NETWORKS[family]
        return perturb(make()).eval(), (3, size, size)

    return build


@pytest.fixture
def mask() -> Callable[..., KDFSMaskedModel]:
    """`mask(model, shape, **settings)` masks a copy of a network; `random=True` draws its logits."""

    def build(model: nn.Module, shape: tuple[int, ...], random: bool = True, **settings: Any) -> KDFSMaskedModel:
        host = copy.deepcopy(host_network(model))
        config = KDFSConfig(**settings)
        structure = read_structure(host, shape, config.include_layers, config.exclude_layers)
        masked = KDFSMaskedModel(host, structure, config)
        if random:
            with torch.no_grad():
                for logits in masked.mask_logits:
                    logits.copy_(torch.randn(logits.shape))
        return masked.eval()

    return build


@pytest.fixture
def slice_randomly(mask: Callable[..., KDFSMaskedModel]) -> Callable[..., tuple[KDFSMaskedModel, nn.Module]]:
    """`slice_randomly(model, shape, **settings)` gives the masked network and the sliced one for random masks."""

    def build(model: nn.Module, shape: tuple[int, ...], **settings: Any) -> tuple[KDFSMaskedModel, nn.Module]:
        masked = mask(model, shape, **settings)
        masked.freeze_masks()
        return masked, slice_network(masked, model)

    return build


@pytest.fixture
def toy_data() -> Callable[..., list[dict[str, Any]]]:
    """`toy_data(count, size)`: images whose class is the brighter quarter, learnable in seconds."""

    def build(count: int = 32, size: int = 16, labels: int = 4) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(2)
        rows = []
        for index in range(count):
            image = 0.3 * torch.randn(3, size, size, generator=generator)
            label, half = index % labels, size // 2
            top, left = (label // 2) * half, (label % 2) * half
            image[:, top : top + half, left : left + half] += 1
            rows.append({"pixel_values": image, "labels": label})
        return rows

    return build


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    """`arguments(**changes)`: quiet training on the CPU in a temporary folder."""

    def build(**changes: Any) -> TrainingArguments:
        defaults = {
            "output_dir": str(tmp_path / "training"),
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "max_grad_norm": 0.0,
            "learning_rate": 1e-3,
            "dataloader_pin_memory": False,
        }
        return TrainingArguments(**{**defaults, **changes})

    return build


@pytest.fixture(scope="session")
def original() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Numbers computed by the authors' code, with the inputs they were computed on."""
    numbers = json.loads((FIXTURES / "kdfs.json").read_text(encoding="utf-8"))
    return numbers, load_file(FIXTURES / "kdfs.safetensors")
