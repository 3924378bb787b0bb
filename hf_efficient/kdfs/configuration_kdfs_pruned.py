"""Configuration of a pruned network: the base network's configuration and the width of every changed layer."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from .configuration_cifar_resnet import CifarResNetConfig


def load_base_config(base_config: dict[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    """Build the base network's configuration.

    Args:
        base_config (`dict` or `PreTrainedConfig`): A configuration, or its dictionary with `model_type`.

    Returns:
        `PreTrainedConfig`: Of the base network.

    Raises:
        ValueError: If the dictionary names no known `model_type`.
    """
    if isinstance(base_config, PreTrainedConfig):
        return base_config
    settings = dict(base_config)
    model_type = settings.pop("model_type", None)
    settings.pop("auto_map", None)
    if model_type == CifarResNetConfig.model_type:
        return CifarResNetConfig.from_dict(settings)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`base_config` must name a `model_type` of transformers or 'cifar_resnet', but has {model_type!r}; "
            "the checkpoint may be corrupt."
        )
    return CONFIG_MAPPING[model_type].from_dict(settings)


class KDFSPrunedConfig(PreTrainedConfig):
    """Configuration of a network whose filters were pruned.

    Args:
        base_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the network before pruning; defaults to a CIFAR ResNet-20.
        widths (`dict[str, list[int]]`, *optional*):
            `[input channels, output channels]` of every layer that was made smaller, by its module name.
        scattered (`dict[str, int]`, *optional*):
            Modules whose output is put back to this number of channels, zeros elsewhere; which channel comes from
            where stands in the int64 buffer `filter_index` of that module.
        input_shape (`list[int]`, *optional*, defaults to `[3, 32, 32]`):
            Channels, height and width of the images the network was pruned with.

    Raises:
        ValueError: If a width is not a pair of positive integers.
    """

    model_type = "kdfs_pruned"

    base_config: Any = None
    widths: dict[str, list[int]] | None = None
    scattered: dict[str, int] | None = None
    input_shape: list[int] | None = None

    def __post_init__(self, **kwargs: object):
        self.base_config = load_base_config(self.base_config or {"model_type": CifarResNetConfig.model_type})
        self.widths = dict(self.widths or {})
        self.scattered = dict(self.scattered or {})
        self.input_shape = list(self.input_shape or (3, 32, 32))
        if self.id2label is None and "num_labels" not in kwargs:
            self.id2label = dict(self.base_config.id2label)
            self.label2id = dict(self.base_config.label2id or {})
        super().__post_init__(**kwargs)
        self.base_config.id2label = dict(self.id2label)
        self.base_config.label2id = dict(self.label2id or {})
        for name, pair in self.widths.items():
            if len(pair) != 2 or not all(isinstance(width, int) and width >= 1 for width in pair):
                raise ValueError(f"`widths[{name!r}]` must be two integers of at least 1, but is {pair}.")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values.

        Returns:
            `dict`: With the nested `base_config` as a dictionary that names its `model_type`, but no data type: the
            pruned network's own counts.
        """
        output = super().to_dict()
        base = self.base_config.to_dict()
        output["base_config"] = {**base, "model_type": self.base_config.model_type, "dtype": None}
        return output


KDFSPrunedConfig.register_for_auto_class()
