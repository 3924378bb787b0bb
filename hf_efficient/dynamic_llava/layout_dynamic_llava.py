"""The layout of the Dynamic-LLaVA authors' checkpoints: where every tensor and every setting goes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.utils import logging

from .configuration_dynamic_llava import OWN_FIELDS, DynamicLlavaConfig
from .loading_dynamic_llava import PREDICTORS
from .modeling_dynamic_llava import DynamicLlavaForConditionalGeneration
from .weights_dynamic_llava import Weights


logger = logging.get_logger(__name__)

VOCABULARY_MULTIPLE = 64
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
TOWER = "vision_tower.vision_model."

# authors' name -> name in a LLaVA checkpoint of transformers, which every version of it loads
_RENAMES = (
    (r"model\.((?:embed_tokens|layers|norm)\..+)", r"language_model.model.\1"),
    (r"lm_head\.(.+)", r"language_model.lm_head.\1"),
    (r"model\.mm_projector\.0\.(.+)", r"multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(.+)", r"multi_modal_projector.linear_2.\1"),
    (r"model\.mm_projector\.(weight|bias)", r"multi_modal_projector.linear_1.\1"),
    (r"model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)", rf"{TOWER}\1"),
    (r"(model\.(?:image|output_text|instruct)_score_predictor\..+)", r"\1"),
)
# our module's name -> the same
_OWN_NAMES = (
    (r"model\.language_model\.(.+)", r"language_model.model.\1"),
    (r"lm_head\.(.+)", r"language_model.lm_head.\1"),
    (r"model\.(multi_modal_projector\..+)", r"\1"),
    (r"model\.vision_tower\.(?:vision_model\.)?(.+)", rf"{TOWER}\1"),
    (r"(model\..+_score_predictor\..+)", r"\1"),
)
# buffers that old files hold and no model reads
COMPUTED = re.compile(r".*(?:rotary_emb\.inv_freq|embeddings\.position_ids)")


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, replacement in rules:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return None


@dataclass
class Layout:
    """Where every tensor of an authors' checkpoint goes.

    Args:
        names (`dict[str, str]`): Their name -> name in the new checkpoint.
        shapes (`dict[str, tuple[int, ...]]`): New name -> shape in the new checkpoint.
        unknown (`list[str]`): Names without a place.
        fresh (`list[str]`): Predictors that the checkpoint lacks and does not need.
        has_tower (`bool`): Whether the shards hold the vision tower.
        identity (`int`, *optional*): Width of the second projector layer that stands in for none.
    """

    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    unknown: list[str]
    fresh: list[str]
    has_tower: bool
    identity: int | None

    @classmethod
    def read(cls, weights: Weights, config: DynamicLlavaConfig, vocabulary: int, trained: bool) -> "Layout":
        """Map the names of `weights`.

        Args:
            weights ([`Weights`]): The authors' tensors.
            config ([`DynamicLlavaConfig`]): The new configuration.
            vocabulary (`int`): Their vocabulary size.
            trained (`bool`): Whether predictors belong to the checkpoint.

        Raises:
            ValueError: If the vocabulary has another size.
        """
        names, shapes, unknown = {}, {}, []
        tied = config.tie_word_embeddings
        for name, shape in weights.shapes.items():
            new = _rename(name, _RENAMES)
            if COMPUTED.fullmatch(name) or (tied and new == HEAD):
                continue
            if new is None:
                unknown.append(name)
                continue
            names[name] = new
            shapes[new] = shape
            if new in (EMBEDDING, HEAD):
                if shape[:1] != (vocabulary,):
                    raise ValueError(
                        f"`source` must hold one row a token in {name!r}, got {shape[0]} rows for a `vocab_size` of "
                        f"{vocabulary}: check that config.json and weights belong together."
                    )
                shapes[new] = (config.text_config.vocab_size, *shape[1:])
        identity = config.text_config.hidden_size if config.projector_hidden_act == "linear" else None
        if identity is not None:
            shapes["multi_modal_projector.linear_2.weight"] = (identity, identity)
            shapes["multi_modal_projector.linear_2.bias"] = (identity,)
        switches = (config.use_vision_predictor, config.use_output_text_predictor)
        fresh = [
            predictor
            for predictor, used in zip(PREDICTORS, switches)
            if not (trained and used) and not any(name.startswith(f"model.{predictor}.") for name in shapes)
        ]
        return cls(names, shapes, unknown, fresh, any(name.startswith(TOWER) for name in shapes), identity)

    def check(self, model: DynamicLlavaForConditionalGeneration) -> None:
        """Compare with the tensors of `model`.

        Raises:
            ValueError: If a tensor is missing, has no place or another shape.
        """
        wanted = {_rename(name, _OWN_NAMES): tuple(value.shape) for name, value in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            wanted.pop(HEAD, None)
        elsewhere = tuple(f"model.{name}." for name in self.fresh) + (() if self.has_tower else (TOWER,))
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith(elsewhere)}
        original = {new: name for name, new in self.names.items()}
        missing, extra = sorted(wanted.keys() - self.shapes.keys()), sorted(self.shapes.keys() - wanted.keys())
        extra = self.unknown + [original.get(name, name) for name in extra]
        wrong = [name for name in sorted(wanted.keys() & self.shapes.keys()) if wanted[name] != self.shapes[name]]
        if missing:
            problem = f"without {len(missing)} tensors, in our names first {missing[0]!r}"
        elif extra:
            problem = f"with {len(extra)} tensors that have no place in it, first {extra[0]!r}"
        elif wrong:
            name = wrong[0]
            problem = f"with {original.get(name, name)!r} of shape {self.shapes[name]} instead of {wanted[name]}"
        else:
            return
        raise ValueError(
            f"`source` must hold the tensors of a Dynamic-LLaVA or LLaVA-1.5 as its config.json describes it, got one "
            f"{problem}: check that config.json and weights belong together."
        )

    def tensors(self, weights: Weights, vocabulary: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors under their new names, vocabulary rows filled up to `vocabulary`."""
        for name, tensor in weights.read(self.names):
            new = self.names[name]
            yield new, _fill_rows(tensor, vocabulary) if new in (EMBEDDING, HEAD) else tensor
            dtype = tensor.dtype
        if self.identity is not None:
            yield "multi_modal_projector.linear_2.weight", torch.eye(self.identity, dtype=dtype)
            yield "multi_modal_projector.linear_2.bias", torch.zeros(self.identity, dtype=dtype)


def _fill_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Append the mean row until there are `rows`: the mean of all logits is never above the highest one."""
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


MODEL_TYPES = ("llava_llama", "dynamic_llava_llama")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LLAMA_FIELDS = (
    *_REQUIRED,
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)
# authors' name -> ours; the other settings have one name
_SETTINGS = {
    "output_text_len_for_training": "output_text_min_length",
    "instruct_len_for_training": "instruct_min_length",
    "d_model": "predictor_hidden_size",
    "nhead": "predictor_num_heads",
    "dim_feedforward": "predictor_intermediate_size",
    "num_layers": "predictor_num_layers",
}
_ACTIVATIONS = {"mlp2x_gelu": "gelu", "linear": "linear"}
_STRATEGIES = {"patch": "default", "cls_patch": "full"}


def _choose(original: dict[str, Any], field: str, default: str, choices: dict[str, str]) -> str:
    value = original.get(field, default)
    if value not in choices:
        raise ValueError(f"`{field}` in config.json must be {' or '.join(choices)}, got {value!r}.")
    return choices[value]


def check_model_type(original: dict[str, Any]) -> None:
    """Refuse a checkpoint of another kind, with a hint for a LLaVA in transformers' layout."""
    kind = original.get("model_type")
    if kind not in MODEL_TYPES:
        other = "; for a LLaVA in transformers' layout use `from_llava`, or `hf-efficient convert-llava`"
        hint = other if kind == "llava" else ""
        raise ValueError(f"`model_type` in config.json must be {' or '.join(MODEL_TYPES)}, got {kind!r}{hint}.")


def convert_config(original: dict[str, Any], weights: Weights, tower: str | Path) -> DynamicLlavaConfig:
    """Translate the authors' `config.json`.

    Args:
        original (`dict`): Its contents.
        weights ([`Weights`]): Tensors of the checkpoint, for the dtype and the predictors that are there.
        tower (`str` or `Path`): Where the configuration of the vision tower is.

    Raises:
        ValueError: If a field is missing or names something that is not supported.
    """
    check_model_type(original)
    for field in _REQUIRED:
        if not isinstance(original.get(field), int):
            raise ValueError(f"`{field}` in config.json must be an integer, got {original.get(field)!r}.")
    dtype = weights.dtype("model.embed_tokens.weight")
    vocabulary = original["vocab_size"]
    text = {name: original[name] for name in _LLAMA_FIELDS if original.get(name) is not None}
    text |= {name: original[name] for name in TOKEN_IDS if name in original}
    text["vocab_size"] = -(-(vocabulary + 1) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    tied = bool(original.get("tie_word_embeddings", False))
    vision = CLIPVisionConfig.from_pretrained(tower)
    vision.dtype = dtype
    strategy = _choose(original, "mm_vision_select_feature", "patch", _STRATEGIES)
    patches = (vision.image_size // vision.patch_size) ** 2
    instruct = any(name.startswith(f"model.{PREDICTORS[2]}.") for name in weights.shapes)
    return DynamicLlavaConfig(
        text_config=LlamaConfig(**text, tie_word_embeddings=tied, dtype=dtype),
        vision_config=vision,
        image_token_index=vocabulary,
        image_seq_length=patches + (strategy == "full"),
        projector_hidden_act=_choose(original, "mm_projector_type", "linear", _ACTIVATIONS),
        vision_feature_layer=original.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
        dtype=dtype,
        has_instruct_predictor=instruct,
        **_convert_settings(original.get("sparse_config") or {}),
    )


def _convert_settings(sparse: dict[str, Any]) -> dict[str, Any]:
    """Translate the authors' `sparse_config`."""
    settings = {_SETTINGS.get(name, name): value for name, value in sparse.items() if name != "use_text_predictor"}
    for name in sorted(settings.keys() - set(OWN_FIELDS)):
        logger.warning("`sparse_config` has the setting %r, which this package does not know: left out.", name)
        del settings[name]
    if not sparse.get("use_text_predictor", True):
        settings["use_output_text_predictor"] = settings["use_instruct_predictor"] = False
    if settings.get("use_instruct_predictor"):
        logger.warning(
            "`use_instruct_predictor` is switched off: this version keeps every instruction token; the weights of the "
            "instruct predictor are converted and kept, unused."
        )
        settings["use_instruct_predictor"] = False
    return settings


__all__ = ["COMPUTED", "TOKEN_IDS", "TOWER", "Layout", "check_model_type", "convert_config"]
