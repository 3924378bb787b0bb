"""Configuration of a Pix2Pix generator: everything that is needed to load a checkpoint again."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging


GENERATORS = {"unet": None, "resnet_6blocks": 6, "resnet_9blocks": 9}  # name -> residual blocks
NORMS = ("instance", "batch", "none")
INFERENCE_STATS = ("running", "batch")
logger = logging.get_logger(__name__)
_LIKENESS = 0.85  # of two names, by difflib: `num_level` is a misspelling, `num_labels` is not
_OTHER_NAMES = {"num_input_channels": "num_channels"}  # looks like `num_output_channels` but means its opposite


class _TaskHint(dict):
    """Names the task of a checkpoint to `pipeline(model=...)` but sends the look-up to the registry.

    `pipeline()` takes the task from a config's only custom pipeline and then asks `task in custom_pipelines` to decide
    whether code from the checkpoint must run. With the installed package it need not, so the answer is no.
    """

    def __contains__(self, key: object) -> bool:
        return False


def _custom_pipelines() -> dict[str, dict[str, Any]]:
    return {
        "image-to-image": {
            "impl": "pipeline_pix2pix.ImageToImagePipeline",
            "pt": ["AutoModelForImageToImage"],
            "type": "image",
        }
    }


@strict
class Pix2PixConfig(PreTrainedConfig):
    """Architecture and inference mode of a [`Pix2PixModel`] (Isola et al., CVPR 2017, Sec. 6.1).

    Args:
        generator (`str`, defaults to `"unet"`): `"unet"` (encoder-decoder with skip connections, the paper's),
            `"resnet_6blocks"` or `"resnet_9blocks"` (two halvings, residual blocks, two doublings).
        num_levels (`int`, defaults to 8): Times the U-Net halves its input, at least 1; 8 for 256 pixels, 7 for 128.
            `2**num_levels` may not exceed `image_size`. ResNet generators always halve twice and ignore it.
        base_channels (`int`, defaults to 64): Filters of the outermost level, at least 1; deeper levels have 2, 4 and
            at most 8 times as many.
        norm (`str`, defaults to `"instance"`): `"instance"` (statistics of each image alone, no weights: training at
            any batch size and inference compute the same), `"batch"` (the paper's, with weights) or `"none"`.
        dropout (`float`, defaults to 0.5): Drop probability in `[0, 1)` inside the network while training: in those of
            the U-Net's decoder levels that give 8 times `base_channels`, except the innermost, so in no U-Net of fewer
            than 6 levels; in every residual block of a ResNet.
        inference_stats (`str`, defaults to `"running"`): What batch norm uses at inference: `"running"` averages of
            the training, or `"batch"`: the statistics of the image itself, each image alone, so that an answer never
            depends on its batch mates (the paper's choice at batch size 1). Other norms ignore it.
        inference_dropout (`bool`, defaults to `False`): Keep dropout on at inference, as the paper does for noise.
        num_channels (`int`, defaults to 3): Channels of the source image, 1 or 3.
        num_output_channels (`int`, *optional*): Channels of the generated image; `num_channels` where left out.
        image_size (`int`, defaults to 256): Side in pixels of the training images, at least 2 (ResNets: 4). Inference
            takes any size.
        **kwargs: As in [`PreTrainedConfig`]; other names are kept as attributes.

    Raises:
        ValueError: If a field is outside its range, or an unknown name looks like a misspelt field of ours.
    """

    model_type = "pix2pix"
    _auto_class = "AutoConfig"

    generator: str = "unet"
    num_levels: int = 8
    base_channels: int = 64
    norm: str = "instance"
    dropout: float | int = 0.5
    inference_stats: str = "running"
    inference_dropout: bool = False
    num_channels: int = 3
    num_output_channels: int | None = None
    image_size: int = 256

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("custom_pipelines", None)  # derived, see the property
        self._refuse_misspelt(kwargs)
        if self.num_output_channels is None:
            self.num_output_channels = self.num_channels
        super().__post_init__(**kwargs)
        self._check_choices()
        self._check_ranges()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "Pix2PixConfig":
        """Build a configuration from the fields of a `config.json`.

        A name in the file that looks like a misspelt field is passed over with a warning, not refused: who loads a
        checkpoint did not write it.

        Args:
            config_dict (`dict`): Its fields.
            **kwargs: As in [`~PreTrainedConfig.from_dict`].

        Returns:
            [`Pix2PixConfig`]: The configuration.

        Raises:
            ValueError: If the file belongs to a model of another type, a field is outside its range, or a name in
                `kwargs` looks like a misspelt field.
        """
        cls._refuse_misspelt(kwargs)
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(f"A generator's `model_type` must be {cls.model_type!r}, this checkpoint has {found!r}.")
        misspelt = cls._misspelt(config_dict)
        for name, meant in misspelt.items():
            logger.warning(
                f"`{name}` in the checkpoint's configuration is no field of Pix2PixConfig and is passed over; where "
                f"`{meant}` is meant, spell it so in the file."
            )
        fields = {name: value for name, value in config_dict.items() if name not in misspelt}
        loaded = super().from_dict(fields, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config._check_choices()  # `kwargs` are set behind the checks of the constructor
        config._check_ranges()
        return loaded

    @classmethod
    def _misspelt(cls, names: Iterable[str]) -> dict[str, str]:
        """Names that the base class would keep without a word, and the field of ours that each seems to mean."""
        own = [name for name in Pix2PixConfig.__annotations__ if not name.startswith("_")]
        others = [name for name in names if name not in own and not hasattr(PreTrainedConfig, name)]
        meant = {name: get_close_matches(name.lower(), own, 1, _LIKENESS) for name in others}
        return {name: _OTHER_NAMES.get(name.lower(), found[0]) for name, found in meant.items() if found}

    @classmethod
    def _refuse_misspelt(cls, names: Iterable[str]) -> None:
        for name, meant in cls._misspelt(names).items():
            raise ValueError(
                f"`{name}` is no field of Pix2PixConfig; `{meant}` is: spell it so, or leave `{name}` out."
            )

    def _check_choices(self) -> None:
        for name, allowed in (
            ("generator", tuple(GENERATORS)),
            ("norm", NORMS),
            ("inference_stats", INFERENCE_STATS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")

    def _check_ranges(self) -> None:
        for name, least in (("num_levels", 1), ("base_channels", 1), ("image_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        for name in ("num_channels", "num_output_channels"):
            if getattr(self, name) not in (1, 3):
                raise ValueError(f"`{name}` must be 1 (grey) or 3 (RGB), got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must lie in [0, 1), got {self.dropout}.")
        if self.generator != "unet" and self.image_size < self.size_divisor:
            raise ValueError(f"`image_size` must be at least 4 for a ResNet generator, got {self.image_size}.")
        if self.size_divisor > self.image_size:
            deepest = self.image_size.bit_length() - 1
            raise ValueError(
                f"`num_levels={self.num_levels}` halves an image below one pixel: with `image_size={self.image_size}` "
                f"a U-Net has at most {deepest} levels; lower `num_levels` or raise `image_size`."
            )

    @property
    def size_divisor(self) -> int:
        """Height and width that the network takes are multiples of this number of pixels."""
        return 2**self.num_levels if self.generator == "unet" else 4

    @property
    def num_residual_blocks(self) -> int | None:
        """Residual blocks of a ResNet generator, `None` for the U-Net."""
        return GENERATORS[self.generator]

    @property
    def custom_pipelines(self) -> dict[str, dict[str, Any]]:
        """Where `pipeline()` finds the task: the checkpoint's code, or its name alone with the package installed."""
        if type(self).__module__.split(".")[0] == "transformers_modules":
            return _custom_pipelines()
        return _TaskHint(_custom_pipelines())

    @custom_pipelines.setter
    def custom_pipelines(self, value: Any) -> None:
        """Ignore what `Pipeline.save_pretrained` assigns: the entry is derived and always written."""

    def to_dict(self) -> dict[str, Any]:
        """Return every field, with the entries that let the checkpoint load where the package is not installed."""
        fields = super().to_dict()
        fields["custom_pipelines"] = _custom_pipelines()
        fields["auto_map"] = {
            "AutoConfig": "configuration_pix2pix.Pix2PixConfig",
            "AutoModel": "modeling_pix2pix.Pix2PixModel",
            "AutoModelForImageToImage": "modeling_pix2pix.Pix2PixModel",
            "AutoImageProcessor": "image_processing_pix2pix.Pix2PixImageProcessor",
        }
        return fields
