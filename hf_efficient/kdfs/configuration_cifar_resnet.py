"""Configuration of the 6n+2-layer CIFAR ResNets."""

from typing import Any

from transformers import PreTrainedConfig


class CifarResNetConfig(PreTrainedConfig):
    """Configuration of a CIFAR ResNet (He et al., 2015, Sec. 4.2): three stages of `n` basic blocks, `6n + 2` layers.

    Args:
        depth (`int`, *optional*, defaults to 20): Number of weighted layers, `6n + 2`: 20, 32, 44, 56, 110.
        hidden_sizes (`list[int]`, *optional*, defaults to `[16, 32, 64]`): Channels of the three stages.
        num_channels (`int`, *optional*, defaults to 3): Channels of the images.
        image_size (`int`, *optional*, defaults to 32): Height and width of the images the network is made for.

    Raises:
        ValueError: If `depth` is not `6n + 2` or there are not three stages of growing width.
    """

    model_type = "cifar_resnet"

    depth: int = 20
    hidden_sizes: list[int] | None = None
    num_channels: int = 3
    image_size: int = 32

    def __post_init__(self, **kwargs: object):
        self.hidden_sizes = [16, 32, 64] if self.hidden_sizes is None else list(self.hidden_sizes)
        if self.id2label is None and "num_labels" not in kwargs:
            kwargs["num_labels"] = 10
        super().__post_init__(**kwargs)
        if self.label2id is None:  # the names were given one way
            self.label2id = {word: number for number, word in self.id2label.items()}
        if not isinstance(self.depth, int) or self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(f"`depth` must be 6n + 2 with n >= 1, but is {self.depth!r}; use 20, 32, 44, 56 or 110.")
        if len(self.hidden_sizes) != 3 or sorted(self.hidden_sizes) != self.hidden_sizes:
            raise ValueError(
                f"`hidden_sizes` must be three growing widths, but is {self.hidden_sizes}; use [16, 32, 64]."
            )

    def to_diff_dict(self) -> dict[str, Any]:
        """Modifications: labels are always written; two of them, transformers' default, would be read as ten. So is
        `auto_map`, so that `AutoModel` finds the network without its linear layer as well.

        Returns:
            `dict`: What `config.json` holds.
        """
        fields = {**super().to_diff_dict(), "id2label": dict(self.id2label), "label2id": dict(self.label2id)}
        fields["auto_map"] = {
            "AutoConfig": "configuration_cifar_resnet.CifarResNetConfig",
            "AutoModel": "modeling_cifar_resnet.CifarResNetModel",
            "AutoModelForImageClassification": "modeling_cifar_resnet.CifarResNetForImageClassification",
        }
        return fields

    @property
    def blocks_per_stage(self) -> int:
        """`n` of `6n + 2`."""
        return (self.depth - 2) // 6


CifarResNetConfig.register_for_auto_class()
