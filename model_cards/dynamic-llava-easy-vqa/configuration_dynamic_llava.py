"""Settings of a sparse LLaVA: everything of `LlavaConfig` plus the numbers of the Dynamic-LLaVA paper."""

from collections.abc import Callable
from typing import Any

from transformers import LlavaConfig, PreTrainedConfig


SUPPORTED_TEXT_BACKBONES = ("llama", "mistral", "qwen2")

Rule = tuple[str, Callable[[object], bool]]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


RATE: Rule = ("a number in (0, 1]", lambda value: _is_number(value) and 0 < value <= 1)
SHARE: Rule = ("a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1)
COUNT: Rule = ("an integer of at least 1", lambda value: _is_int(value) and value >= 1)
LENGTH: Rule = ("an integer of at least 0", lambda value: _is_int(value) and value >= 0)
TEMPERATURE: Rule = ("a number above 0", lambda value: _is_number(value) and value > 0)
WEIGHT: Rule = ("a number of at least 0", lambda value: _is_number(value) and value >= 0)
SWITCH: Rule = ("True or False", lambda value: isinstance(value, bool))
BUDGET: Rule = ("None or an integer of at least 1", lambda value: value is None or (_is_int(value) and value >= 1))

RULES: dict[str, Rule] = {
    "sparse_layer": COUNT,
    "vision_keep_rate": RATE,
    "vision_keep_tokens": BUDGET,
    "output_text_keep_rate": RATE,
    "output_text_threshold": SHARE,
    "output_text_min_length": LENGTH,
    "instruct_keep_rate": RATE,
    "instruct_min_length": LENGTH,
    "predictor_hidden_size": COUNT,
    "predictor_num_heads": COUNT,
    "predictor_intermediate_size": COUNT,
    "predictor_num_layers": COUNT,
    "use_vision_predictor": SWITCH,
    "use_output_text_predictor": SWITCH,
    "use_instruct_predictor": SWITCH,
    "has_instruct_predictor": SWITCH,
    "mask_loss_weight": WEIGHT,
    "gumbel_start_temperature": TEMPERATURE,
    "gumbel_end_temperature": TEMPERATURE,
}


def check_setting(name: str, value: object) -> None:
    """Refuse a value outside the range of a sparsity setting.

    Args:
        name (`str`): Field of [`DynamicLlavaConfig`]; names without a rule pass.
        value (`object`): The value to be set.

    Raises:
        ValueError: If the value breaks the rule of the field.
    """
    if name not in RULES:
        return
    rule, holds = RULES[name]
    if not holds(value):
        raise ValueError(
            f"`{name}` must be {rule}, got {value!r}: pass another value or leave `{name}` at its default."
        )
    if name == "use_instruct_predictor" and value:
        raise ValueError(
            "`use_instruct_predictor` must be False, got True: this version keeps every instruction token; the "
            "weights of an instruct predictor are converted and kept, unused."
        )


class DynamicLlavaConfig(LlavaConfig):
    r"""Configuration of a LLaVA with dynamic vision-language sparsification (Dynamic-LLaVA, arXiv 2412.00876).

    All arguments of [`LlavaConfig`] apply. Every setting that is not the shape of a weight may be changed on a loaded
    model (`model.config.vision_keep_rate = 0.1`); a value outside its range raises a `ValueError` at once.

    Args:
        sparse_layer (`int`, defaults to 2):
            Decoder layer whose input the predictors read: layers below it see every token, layers from it on only kept
            ones (symbol l of the paper). At least 1 and below the number of decoder layers.
        vision_keep_rate (`float`, defaults to 0.2):
            Share of the tokens of each image that is kept, in (0, 1]; `int(n * rate)` tokens, at least 1. 1 keeps all.
        vision_keep_tokens (`int`, *optional*):
            Budget as a number of tokens an image; wins over `vision_keep_rate`.
        output_text_keep_rate (`float`, defaults to 0.5):
            Share of the generated tokens that training aims at, in (0, 1]. Not enforced at inference.
        output_text_threshold (`float`, defaults to 0.5):
            A generated token is written to the caches of the sparse layers if P(keep) is above it, in [0, 1].
        output_text_min_length (`int`, defaults to 50):
            Answers with fewer tokens keep all of them while training.
        predictor_hidden_size (`int`, defaults to 512): Width d of the predictors; a multiple of 4 and of the heads.
        predictor_num_heads (`int`, defaults to 8): Attention heads of the image predictor.
        predictor_intermediate_size (`int`, defaults to 2048): Width of its feed-forward layers.
        predictor_num_layers (`int`, defaults to 2): Number of its transformer blocks.
        use_vision_predictor (`bool`, defaults to `True`): Drop image tokens in the prefill.
        use_output_text_predictor (`bool`, defaults to `True`): Drop generated tokens from the sparse caches.
        use_instruct_predictor (`bool`, defaults to `False`): Must be False in this version.
        has_instruct_predictor (`bool`, defaults to `False`): Whether the checkpoint holds weights of that predictor.
        instruct_keep_rate (`float`, defaults to 0.7): Kept for converted checkpoints, unused.
        instruct_min_length (`int`, defaults to 25): Kept for converted checkpoints, unused.
        mask_loss_weight (`float`, defaults to 100.0): Weight of the two keep-rate losses (lambda of the paper).
        gumbel_start_temperature (`float`, defaults to 1.0): Gumbel-softmax temperature when training starts.
        gumbel_end_temperature (`float`, defaults to 0.1): Gumbel-softmax temperature when training ends.

    Raises:
        ValueError: If a setting is outside its range, `sparse_layer` is not below the number of decoder layers,
            `predictor_hidden_size` fits neither 4 nor the heads, or the text backbone is not supported.

    Example:
    ```python
    >>> from transformers import CLIPVisionConfig, LlamaConfig
    >>> from hf_efficient import DynamicLlavaConfig

    >>> config = DynamicLlavaConfig(vision_config=CLIPVisionConfig(), text_config=LlamaConfig(), vision_keep_rate=0.1)
    >>> config.vision_keep_rate
    0.1
    ```
    """

    model_type = "dynamic_llava"
    _auto_class = "AutoConfig"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "image_outputs",  # with them `compute_metrics` would get every image's features beside the logits
        "image_hidden_states",
        "sparsity",
        "language_loss",
        "keep_rate_losses",
    ]

    sparse_layer: int = 2
    vision_keep_rate: float = 0.2
    vision_keep_tokens: int | None = None
    output_text_keep_rate: float = 0.5
    output_text_threshold: float = 0.5
    output_text_min_length: int = 50
    predictor_hidden_size: int = 512
    predictor_num_heads: int = 8
    predictor_intermediate_size: int = 2048
    predictor_num_layers: int = 2
    use_vision_predictor: bool = True
    use_output_text_predictor: bool = True
    use_instruct_predictor: bool = False
    has_instruct_predictor: bool = False
    instruct_keep_rate: float = 0.7
    instruct_min_length: int = 25
    mask_loss_weight: float = 100.0
    gumbel_start_temperature: float = 1.0
    gumbel_end_temperature: float = 0.1

    def __setattr__(self, name: str, value: object) -> None:
        check_setting(name, value)
        if name == "sparse_layer" and isinstance(self.__dict__.get("text_config"), PreTrainedConfig):
            self._check_sparse_layer(value)
        super().__setattr__(name, value)

    def _check_sparse_layer(self, value: int) -> None:
        layers = self.text_config.num_hidden_layers
        if value >= layers:
            raise ValueError(
                f"`sparse_layer` must be below the number of decoder layers ({layers}), got {value}: choose a "
                "smaller `sparse_layer`."
            )

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        backbone = self.text_config.model_type
        if backbone not in SUPPORTED_TEXT_BACKBONES:
            raise ValueError(
                f"`text_config.model_type` must be one of {', '.join(SUPPORTED_TEXT_BACKBONES)}, got {backbone!r}: "
                "use a LLaVA-1.5 checkpoint with one of these language models."
            )
        self._check_sparse_layer(self.sparse_layer)
        width, heads = self.predictor_hidden_size, self.predictor_num_heads
        if width % 4 or width % heads:
            raise ValueError(
                f"`predictor_hidden_size` must be a multiple of 4 and of `predictor_num_heads` ({heads}), got {width}"
                ": change one of the two."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return every field, with the entries that let a checkpoint load where the package is not installed."""
        fields = super().to_dict()
        fields["auto_map"] = {
            "AutoConfig": "configuration_dynamic_llava.DynamicLlavaConfig",
            "AutoModel": "modeling_dynamic_llava.DynamicLlavaModel",
            "AutoModelForImageTextToText": "modeling_dynamic_llava.DynamicLlavaForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_dynamic_llava.DynamicLlavaForConditionalGeneration",
        }
        return fields


# fields that are not the host's, and those that a call may override
OWN_FIELDS = tuple(name for name in DynamicLlavaConfig.__annotations__ if name in RULES)
PER_CALL = ("vision_keep_rate", "vision_keep_tokens", "output_text_threshold")

__all__ = ["OWN_FIELDS", "PER_CALL", "SUPPORTED_TEXT_BACKBONES", "DynamicLlavaConfig", "check_setting"]
