"""The physically smaller network: the host's own modules, resized after construction.

No structure is read here and no pruning library is needed: widths come from the configuration, index sets from the
checkpoint.
"""

import contextlib
import copy
import os
import uuid
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)

from .configuration_cifar_resnet import CifarResNetConfig
from .configuration_kdfs_pruned import KDFSPrunedConfig
from .modeling_cifar_resnet import CifarResNetForImageClassification, classification_loss


def scatter_channels(features: Tensor, filter_index: Tensor) -> Tensor:
    """Put the channels of a pruned layer back to their places, zeros elsewhere.

    One gather for the whole batch, which is about twice as fast as `index_copy` or `index_add`. The memory format of
    the features stays, else the sum after it runs in the other format and the next convolution converts it back.

    Args:
        features (`torch.FloatTensor` of shape `(batch, kept, height, width)`): Output of the smaller layer.
        filter_index (`torch.LongTensor` of shape `(channels,)`): Which kept channel stands there; `kept` for none.

    Returns:
        `torch.FloatTensor` of shape `(batch, channels, height, width)`.
    """
    if not features.is_contiguous() and features.is_contiguous(memory_format=torch.channels_last):
        pixels = features.permute(0, 2, 3, 1).flatten(0, 2)  # (batch * height * width, kept)
        pixels = nn.functional.pad(pixels, (0, 1)).index_select(1, filter_index)
        return pixels.unflatten(0, (features.shape[0], *features.shape[2:])).permute(0, 3, 1, 2)
    zeros = features.new_zeros(features.shape[0], 1, *features.shape[2:])
    return torch.cat([features, zeros], dim=1).index_select(1, filter_index)


def _scatter_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return scatter_channels(output, module.filter_index)


def _resized(parameter: Tensor | None, *shape: int) -> Tensor | None:
    if parameter is None:
        return None
    smaller = parameter.new_empty(*shape, *parameter.shape[len(shape) :])
    return (
        nn.Parameter(smaller, requires_grad=parameter.requires_grad)
        if isinstance(parameter, nn.Parameter)
        else smaller
    )


def resize_layer(module: nn.Module, in_channels: int, out_channels: int) -> None:
    """Give a layer another width in place; its weights are empty afterwards.

    Args:
        module (`nn.Module`): A convolution (ordinary or depthwise), a batch normalisation or a linear layer.
        in_channels (`int`): New number of input channels.
        out_channels (`int`): New number of output channels.

    Raises:
        ValueError: If the module is of another kind.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        depthwise = module.groups > 1
        module.in_channels, module.out_channels = in_channels, out_channels
        module.groups = in_channels if depthwise else 1
        module.weight = _resized(module.weight, out_channels, 1 if depthwise else in_channels)
        module.bias = _resized(module.bias, out_channels)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = out_channels
        for name in ("weight", "bias", "running_mean", "running_var"):
            setattr(module, name, _resized(getattr(module, name), out_channels))
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = in_channels, out_channels
        module.weight = _resized(module.weight, out_channels, in_channels)
        module.bias = _resized(module.bias, out_channels)
    else:
        raise ValueError(
            f"`widths` must name convolutions, normalisations and linear layers, but names a {type(module).__name__}; "
            "the checkpoint does not fit its base network."
        )


def scatter_layer(module: nn.Module, channels: int) -> None:
    """Let a layer put its output back to full width; calling it again only renews the index.

    Args:
        module (`nn.Module`): The layer.
        channels (`int`): Full width; the buffer `filter_index` of this length is registered. Until a checkpoint says
            otherwise the layer's channels come first.
    """
    hooked = hasattr(module, "filter_index")
    reference = next(iter(module.parameters()), torch.zeros(()))
    width = module.num_features if hasattr(module, "num_features") else module.out_channels
    index = torch.arange(channels, dtype=torch.int64, device=reference.device).clamp(max=width)
    module.register_buffer("filter_index", index)
    if not hooked:
        module.register_forward_hook(_scatter_output)


def apply_widths(network: nn.Module, widths: dict[str, list[int]], scattered: dict[str, int]) -> None:
    """Give the layers of a freshly built network their pruned widths.

    Args:
        network (`nn.Module`): The base network.
        widths (`dict[str, list[int]]`): `[input channels, output channels]` by module name.
        scattered (`dict[str, int]`): Full width by module name.

    Raises:
        ValueError: If a name does not exist in the network.
    """
    modules = dict(network.named_modules())
    for name in [*widths, *scattered]:
        if name not in modules:
            raise ValueError(
                f"`widths` and `scattered` must name modules of {type(network).__name__}, but name {name!r}; "
                "the checkpoint does not fit its base network."
            )
    for name, (in_channels, out_channels) in widths.items():
        if isinstance(modules[name], nn.Linear):  # never loses an output, but may have got a head for other labels
            out_channels = modules[name].out_features
        resize_layer(modules[name], in_channels, out_channels)
    for name, channels in scattered.items():
        scatter_layer(modules[name], channels)


def build_network(base_config: PreTrainedConfig) -> PreTrainedModel:
    """The base network before pruning, with fresh weights.

    Args:
        base_config (`PreTrainedConfig`): Its configuration.

    Returns:
        `PreTrainedModel`: An image classifier of transformers, of timm's wrapper or of the CIFAR ResNets.
    """
    if base_config.model_type == CifarResNetConfig.model_type:
        return CifarResNetForImageClassification(CifarResNetConfig.from_dict(base_config.to_dict()))
    base_config = copy.deepcopy(base_config)
    base_config.dtype = None  # that of the whole checkpoint counts, which may be loaded in another
    return AutoModelForImageClassification.from_config(base_config)


class KDFSPrunedModel(PreTrainedModel):
    """A pruned network that returns features.

    Args:
        config ([`KDFSPrunedConfig`]): Base configuration and widths.
    """

    config_class = KDFSPrunedConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = False

    def __init__(self, config: KDFSPrunedConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.network = build_network(config.base_config)
        apply_widths(self.network, config.widths, config.scattered)
        for name in config.widths:  # their weights are new and empty
            module = self.network.get_submodule(name)
            module.reset_parameters()
            self.network._init_weights(module)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        self.network._init_weights(module)

    def forward(self, pixel_values: Tensor, **kwargs: object) -> BaseModelOutputWithPoolingAndNoAttention:
        """Feature map and pooled features of the pruned network.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Images.
            kwargs (`object`, *optional*): Handed to the base network.

        Returns:
            [`BaseModelOutputWithPoolingAndNoAttention`]: `last_hidden_state` of shape `(batch, channels, height,
            width)` and `pooler_output`.
        """
        backbone = self.network.base_model
        if not hasattr(backbone, "forward_features"):
            return backbone(pixel_values, **kwargs)
        features = backbone.forward_features(pixel_values.to(self.dtype))
        pooled = backbone.forward_head(features, pre_logits=True)
        return BaseModelOutputWithPoolingAndNoAttention(last_hidden_state=features, pooler_output=pooled)


class KDFSPrunedModelForImageClassification(KDFSPrunedModel):
    """A pruned image classifier.

    Example:
    ```python
    >>> from transformers import AutoModelForImageClassification

    >>> model = AutoModelForImageClassification.from_pretrained("resnet20-kdfs", trust_remote_code=True)
    ```
    """

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: object
    ) -> ImageClassifierOutputWithNoAttention:
        """Classify images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Images.
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*): Classes, for the loss.
            kwargs (`object`, *optional*): Handed to the base network.

        Returns:
            [`ImageClassifierOutputWithNoAttention`]: `logits` of shape `(batch, num_labels)`, the loss and the base
            network's hidden states if it was asked for them.

        Raises:
            ValueError: If labels are given and the configuration's `problem_type` is another than one class per image.
        """
        kwargs.pop("return_dict", None)
        output = self.network(pixel_values, **kwargs)
        loss = None if labels is None else classification_loss(output.logits, labels, self.config.problem_type)
        return ImageClassifierOutputWithNoAttention(
            loss=loss, logits=output.logits, hidden_states=getattr(output, "hidden_states", None)
        )

    def export_onnx(self, save_directory: str | os.PathLike, file_name: str = "model.onnx") -> Path:
        """Write the network as one ONNX file with a free batch size.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, made if missing.
            file_name (`str`, *optional*, defaults to `"model.onnx"`): Name of the file.

        Returns:
            `Path`: The file; input `pixel_values`, output `logits`.
        """
        return export_onnx(self, save_directory, tuple(self.config.input_shape), file_name)


def _conv_before(network: nn.Module, images: Tensor) -> dict[nn.Module, nn.Conv2d]:
    """The convolution whose output a scattered layer reads, or itself, where there is one."""
    made: list[tuple[Tensor, nn.Conv2d]] = []  # tensors stay alive, so that none takes another's place
    found: dict[nn.Module, nn.Conv2d] = {}

    def keep(conv: nn.Module, args: tuple, output: Tensor) -> None:
        made.append((output, conv))

    def look(module: nn.Module, args: tuple) -> None:
        for output, conv in made:
            if output is args[0]:
                found[module] = conv

    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    scattered = [module for module in network.modules() if hasattr(module, "filter_index")]
    handles = [module.register_forward_hook(keep, prepend=True) for module in convs]
    handles += [module.register_forward_pre_hook(look) for module in scattered]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    found.update({module: module for module in scattered if isinstance(module, nn.Conv2d)})
    return found


def _fill_rows(module: nn.Module, name: str, value: float, index: Tensor) -> None:
    """Put the rows of a parameter or buffer to their places, `value` elsewhere."""
    old = getattr(module, name, None)
    if old is None:
        return
    kept = index < len(old)
    new = old.detach().new_full((len(index), *old.shape[1:]), value)
    new[kept] = old.detach()[index[kept]]
    setattr(module, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


def fold_scatters(network: nn.Module, images: Tensor) -> int:
    """Replace scatters by filters that are zero, in place, where that is faster in an inference engine.

    Engines add a residual branch inside the 1x1 convolution that ends it, but not across a gather. So where such a
    convolution reads a multiple of 8 channels, which their fast kernels need, it is made as wide as the sum again; the
    answers stay the same to the bit. Larger kernels would pay more for it than the gather costs.

    Args:
        network (`nn.Module`): In evaluation mode.
        images (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Any.

    Returns:
        `int`: Number of scatters that are gone.
    """
    count = 0
    for module, conv in _conv_before(network, images).items():
        hooks = [key for key, hook in module._forward_hooks.items() if hook is _scatter_output]
        if conv.kernel_size != (1, 1) or conv.groups > 1 or conv.in_channels % 8 or not hooks:
            continue
        index = module.filter_index
        for name in ("weight", "bias"):
            _fill_rows(conv, name, 0.0, index)
        conv.out_channels = len(index)
        if module is not conv:
            for name, value in (("weight", 0.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                _fill_rows(module, name, value, index)
            module.num_features = len(index)
        for key in hooks:
            del module._forward_hooks[key]
        del module.filter_index
        count += 1
    return count


class _LogitsOnly(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).logits


def export_onnx(
    model: nn.Module,
    save_directory: str | os.PathLike,
    input_shape: tuple[int, int, int],
    file_name: str = "model.onnx",
) -> Path:
    """Write an image classifier, pruned or not, as one ONNX file with a free batch size.

    Args:
        model (`nn.Module`): Returns an output with `.logits`; it is left as it is. In the file some scatters of a
            pruned network are zero filters, see [`fold_scatters`].
        save_directory (`str` or `os.PathLike`): Folder, made if missing.
        input_shape (`tuple[int, int, int]`): Channels, height and width of the images.
        file_name (`str`, *optional*, defaults to `"model.onnx"`): Name of the file.

    Returns:
        `Path`: The file. It appears whole or not at all.

    Raises:
        ImportError: If the ONNX exporter of torch lacks its packages.
    """
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / file_name
    unfinished = folder / f".{uuid.uuid4().hex}.onnx"
    reference = next(model.parameters())
    images = torch.zeros(2, *input_shape, dtype=reference.dtype, device=reference.device)
    wrapper = _LogitsOnly(copy.deepcopy(model)).eval()
    fold_scatters(wrapper, images)
    try:
        torch.onnx.export(
            wrapper,
            (images,),
            str(unfinished),
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1, max=4096)}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        os.replace(unfinished, target)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"The ONNX export needs onnx and onnxscript, but {error.name} is missing; install `hf-efficient[onnx]`."
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
    return target


KDFSPrunedModelForImageClassification.register_for_auto_class("AutoModelForImageClassification")
