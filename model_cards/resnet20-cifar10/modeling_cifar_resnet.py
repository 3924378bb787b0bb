"""The CIFAR ResNets of the KDFS paper (20, 32, 56 and 110 layers) with parameter-free shortcuts."""

import os

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)

from .configuration_cifar_resnet import CifarResNetConfig


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None = None) -> Tensor:
    """Cross entropy in single precision, the loss of networks that choose one class per image.

    Args:
        logits (`torch.FloatTensor` of shape `(batch, num_labels)`): Logits.
        labels (`torch.LongTensor` of shape `(batch,)`): Classes.
        problem_type (`str`, *optional*): As in the configuration.

    Returns:
        `torch.FloatTensor` without axes.

    Raises:
        ValueError: If `problem_type` names another problem.
    """
    if problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"`problem_type` must be 'single_label_classification', but is {problem_type!r}; leave `labels` out and "
            "take the loss of the logits yourself."
        )
    return F.cross_entropy(logits.float(), labels)


class CifarResNetBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (every second pixel, zero-padded channels).

    Args:
        in_channels (`int`): Channels of the input.
        out_channels (`int`): Channels of the output, at least as many.
        stride (`int`): 1, or 2 at the start of a stage.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        missing = out_channels - in_channels
        self.padding = (missing // 2, missing - missing // 2)

    def forward(self, hidden_state: Tensor) -> Tensor:
        """One residual block.

        Args:
            hidden_state (`torch.FloatTensor` of shape `(batch, in_channels, height, width)`): Input.

        Returns:
            `torch.FloatTensor` of shape `(batch, out_channels, height / stride, width / stride)`.
        """
        shortcut = hidden_state[:, :, :: self.stride, :: self.stride] if self.stride > 1 else hidden_state
        if any(self.padding):
            shortcut = F.pad(shortcut, (0, 0, 0, 0, *self.padding))
        hidden_state = F.relu(self.bn1(self.conv1(hidden_state)))
        return F.relu(self.bn2(self.conv2(hidden_state)) + shortcut)


class CifarResNetPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading of both CIFAR ResNet classes."""

    config_class = CifarResNetConfig
    base_model_prefix = "cifar_resnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["CifarResNetBlock"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class CifarResNetModel(CifarResNetPreTrainedModel):
    """A CIFAR ResNet without its linear layer.

    Args:
        config ([`CifarResNetConfig`]): Depth and widths.
    """

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        widths = config.hidden_sizes
        self.conv1 = nn.Conv2d(config.num_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        sources = [widths[0], *widths[:-1]]
        for stage, (source, width) in enumerate(zip(sources, widths), start=1):
            blocks = [
                CifarResNetBlock(width if index else source, width, 2 if stage > 1 and index == 0 else 1)
                for index in range(config.blocks_per_stage)
            ]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: object) -> BaseModelOutputWithPoolingAndNoAttention:
        """Feature map and pooled features.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Images.
            kwargs (`object`, *optional*): Ignored; lets callers hand through what other backbones take.

        Returns:
            [`BaseModelOutputWithPoolingAndNoAttention`]: `last_hidden_state` of shape `(batch, width, height / 4,
            width / 4)` and `pooler_output` of shape `(batch, width)`.
        """
        hidden_state = F.relu(self.bn1(self.conv1(pixel_values)))
        hidden_state = self.layer3(self.layer2(self.layer1(hidden_state)))
        pooled = hidden_state.mean(dim=(2, 3))  # (batch, width)
        return BaseModelOutputWithPoolingAndNoAttention(last_hidden_state=hidden_state, pooler_output=pooled)


class CifarResNetForImageClassification(CifarResNetPreTrainedModel):
    """A CIFAR ResNet with its linear layer.

    Args:
        config ([`CifarResNetConfig`]): Depth, widths and labels.
    """

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.cifar_resnet = CifarResNetModel(config)
        self.linear = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: object
    ) -> ImageClassifierOutputWithNoAttention:
        """Classify images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Images.
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*): Classes, for the loss.
            kwargs (`object`, *optional*): Ignored; see [`CifarResNetModel.forward`].

        Returns:
            [`ImageClassifierOutputWithNoAttention`]: `logits` of shape `(batch, num_labels)` and the loss.

        Raises:
            ValueError: If labels are given and the configuration's `problem_type` is another than one class per image.
        """
        logits = self.linear(self.cifar_resnet(pixel_values).pooler_output)
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)

    @classmethod
    def from_original(cls, file: str | os.PathLike, **kwargs: object) -> "CifarResNetForImageClassification":
        """Load weights in the layout of the widespread `pytorch_resnet_cifar10` checkpoints.

        The prefix `module.` is stripped; depth, widths and number of labels are read from the keys.

        Args:
            file (`str` or `os.PathLike`): A `.safetensors` file, or a `.pt`/`.pth`/`.th` file with tensors.
            kwargs (`object`, *optional*): Further fields of [`CifarResNetConfig`], such as `id2label`.

        Returns:
            [`CifarResNetForImageClassification`]: In evaluation mode.

        Raises:
            ValueError: If the file does not hold a CIFAR ResNet.
        """
        if str(file).endswith(".safetensors"):
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        stages = [{key.split(".")[1] for key in state if key.startswith(f"layer{i}.")} for i in (1, 2, 3)]
        if not all(stages) or len({len(blocks) for blocks in stages}) != 1 or "linear.weight" not in state:
            raise ValueError(
                f"`file` must hold a CIFAR ResNet (conv1, layer1 to layer3, linear), but {file} does not."
            )
        config = CifarResNetConfig(
            depth=6 * len(stages[0]) + 2,
            hidden_sizes=[state[f"layer{i}.0.conv1.weight"].shape[0] for i in (1, 2, 3)],
            num_channels=state["conv1.weight"].shape[1],
            **{"num_labels": state["linear.weight"].shape[0], **kwargs},
        )
        model = cls(config)
        renamed = {key if key.startswith("linear.") else f"cifar_resnet.{key}": value for key, value in state.items()}
        counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
        model.load_state_dict({**counters, **renamed})
        return model.eval()


CifarResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
