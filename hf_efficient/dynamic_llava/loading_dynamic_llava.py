"""Making a sparse LLaVA from a dense one, and keeping its predictors apart from it."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import load_state_dict_from_file, save_torch_state_dict
from transformers import LlavaForConditionalGeneration, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import logging

from .configuration_dynamic_llava import OWN_FIELDS, SUPPORTED_TEXT_BACKBONES, DynamicLlavaConfig, check_setting
from .decoder_dynamic_llava import hook_attention


logger = logging.get_logger(__name__)

PREDICTORS = ("image_score_predictor", "output_text_score_predictor", "instruct_score_predictor")
WEIGHTS_FILE, SETTINGS_FILE = "predictors.safetensors", "predictors_config.json"


def _check_llava(config: Any) -> None:
    if config.model_type == "dynamic_llava":
        raise ValueError(
            "`model` must be a LLaVA-1.5 (`model_type` 'llava'), got 'dynamic_llava', which is sparse already: load "
            "it with `from_pretrained`, and set its rates in its config."
        )
    if config.model_type != "llava":
        raise ValueError(
            f"`model` must be a LLaVA-1.5 (`model_type` 'llava'), got {config.model_type!r}: NeXT, OneVision and "
            "other architectures are not supported."
        )
    if config.text_config.model_type not in SUPPORTED_TEXT_BACKBONES:
        raise ValueError(
            f"`text_config.model_type` must be one of {', '.join(SUPPORTED_TEXT_BACKBONES)}, got "
            f"{config.text_config.model_type!r}: use a LLaVA-1.5 checkpoint with one of these language models."
        )


def _load_llava(source: str | os.PathLike, kwargs: dict[str, Any]) -> LlavaForConditionalGeneration:
    """Load a LLaVA checkpoint, its architecture looked at before its weights."""
    from transformers import AutoConfig

    names = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "trust_remote_code")
    _check_llava(AutoConfig.from_pretrained(source, **{name: kwargs[name] for name in names if name in kwargs}))
    return LlavaForConditionalGeneration.from_pretrained(source, **kwargs)


class SparseLoadingMixin:
    """`from_llava`, `save_predictors` and `load_predictors` of a sparse LLaVA."""

    @classmethod
    def from_llava(cls, model: str | os.PathLike | PreTrainedModel, **kwargs: Any) -> Self:
        """Turn a LLaVA-1.5 into a sparse one with fresh predictors.

        Args:
            model (`str`, `os.PathLike` or `LlavaForConditionalGeneration`): Hub id or folder of a checkpoint, or a
                model, whose modules are shared, not copied.
            **kwargs: Fields of [`DynamicLlavaConfig`] go to the configuration, all others to `from_pretrained`
                (`dtype`, `device_map`, `revision`, `token`, `quantization_config`, ...).

        Returns:
            [`DynamicLlavaForConditionalGeneration`] in `eval()` mode unless a given model is in `train()` mode.

        Raises:
            ValueError: If the model is no LLaVA-1.5 (`model_type` "llava"), its language model is not supported, or it
                is wrapped by `peft`.
        """
        settings = {name: kwargs.pop(name) for name in OWN_FIELDS if name in kwargs}
        for name, value in settings.items():
            check_setting(name, value)
        if isinstance(model, (str, os.PathLike)):
            model = _load_llava(model, kwargs)
        elif kwargs:
            raise ValueError(
                f"`{next(iter(kwargs))}` only applies where a checkpoint is loaded, got a model: leave it out."
            )
        if hasattr(model, "peft_config") or type(model).__name__.startswith("PeftModel"):
            raise ValueError(
                f"`model` must be a plain LLaVA, got {type(model).__name__}: call `merge_and_unload()` first, or "
                "apply `peft` after `from_llava`."
            )
        _check_llava(model.config)
        base = {
            name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "auto_map")
        }
        config = DynamicLlavaConfig(**{**base, **settings})
        with torch.device("meta"):
            sparse = cls(config)
        sparse._share(model)
        logger.warning(
            "The predictors of this sparse LLaVA are untrained: it will drop tokens by chance and answer poorly until "
            "it is trained, for example with `DynamicLlavaTrainer`."
        )
        return sparse

    def _share(self, llava: LlavaForConditionalGeneration) -> None:
        """Take over the modules and settings of a LLaVA and make fresh predictors beside them."""
        inner, host = self.model, llava.model
        inner.vision_tower, inner.multi_modal_projector = host.vision_tower, host.multi_modal_projector
        inner.language_model, self.lm_head = host.language_model, llava.lm_head
        self.config.text_config, self.config.vision_config = host.language_model.config, host.vision_tower.config
        hook_attention(inner.language_model)
        device = next(inner.language_model.layers[self.config.sparse_layer - 1].parameters()).device
        device = inner.language_model.get_input_embeddings().weight.device if device.type == "meta" else device
        for name in PREDICTORS:
            if hasattr(inner, name):
                predictor = getattr(inner, name).to_empty(device=device)
                predictor.apply(inner._init_weights)
        self.generation_config = copy.deepcopy(llava.generation_config)
        for name in ("hf_device_map", "hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit"):
            if hasattr(llava, name):
                setattr(self, name, getattr(llava, name))
        self.train(llava.training)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`load_state_dict` of the host that also takes the names of a checkpoint's file.

        The host writes its files with the names of older LLaVA checkpoints, and a `Trainer` that resumes or returns to
        its best step hands them over as they are: without this hardly a weight would be loaded, with a mere warning.

        Args:
            state_dict (`dict[str, torch.Tensor]`): Weights, named as in the model or as in its checkpoint.
            *args: As in the host.
            **kwargs: As in the host.
        """
        own = self.state_dict()
        if any(key not in own for key in state_dict):
            names = [change for change in get_model_conversion_mapping(self) if isinstance(change, WeightRenaming)]
            state_dict = {
                key if key in own else rename_source_key(key, names, [], self.base_model_prefix, own)[0]: value
                for key, value in state_dict.items()
            }
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _predictor_weights(self) -> dict[str, torch.Tensor]:
        weights = {}
        for name in PREDICTORS:
            predictor = getattr(self.model, name, None)
            if hasattr(predictor, "modules_to_save"):  # peft keeps a trained copy beside the original
                used = predictor.active_adapters
                predictor = predictor.modules_to_save[used[0]] if used else predictor.original_module
            if predictor is not None:
                weights.update({f"{name}.{key}": value for key, value in predictor.state_dict().items()})
        return weights

    def save_predictors(self, folder: str | os.PathLike) -> Path:
        """Write the predictors and the sparsity settings alone, each file whole or not at all.

        Args:
            folder (`str` or `os.PathLike`): Made if absent; gets `predictors.safetensors`
                and `predictors_config.json`.

        Returns:
            `Path`: The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {key: value.detach().cpu().contiguous() for key, value in self._predictor_weights().items()}
        settings = {name: getattr(self.config, name) for name in OWN_FIELDS}
        temporary = Path(tempfile.mkdtemp(prefix=".predictors_", dir=folder))
        try:
            save_torch_state_dict(weights, temporary, filename_pattern="predictors{suffix}.safetensors")
            (temporary / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
            for name in (WEIGHTS_FILE, SETTINGS_FILE):
                os.replace(temporary / name, folder / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def load_predictors(self, folder: str | os.PathLike) -> None:
        """Load what [`save_predictors`] wrote, weights and settings.

        Args:
            folder (`str` or `os.PathLike`): Folder with `predictors.safetensors` and `predictors_config.json`.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If the predictors do not fit this model.
        """
        folder = Path(folder)
        for name in (WEIGHTS_FILE, SETTINGS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"`folder` must hold {WEIGHTS_FILE} and {SETTINGS_FILE}, got {folder} without {name}: pass a "
                    "folder that `save_predictors` wrote."
                )
        settings = json.loads((folder / SETTINGS_FILE).read_text())
        weights = load_state_dict_from_file(folder / WEIGHTS_FILE)
        own = self._predictor_weights()
        wrong = sorted(
            key
            for key in own.keys() | weights.keys()
            if key not in own or key not in weights or own[key].shape != weights[key].shape
        )
        if wrong:
            raise ValueError(
                f"`folder` must hold predictors of this model's sizes, got {len(wrong)} tensors that do not fit, "
                f"first {wrong[0]!r}: build the model with the `predictor_*` settings in {folder / SETTINGS_FILE}."
            )
        heads, found = self.config.predictor_num_heads, settings.get("predictor_num_heads")
        if found not in (None, heads):  # no shape tells it
            raise ValueError(
                f"`folder` must hold predictors of {heads} attention heads, as this model has, got {found}: build the "
                f"model with the `predictor_*` settings in {folder / SETTINGS_FILE}."
            )
        with torch.no_grad():
            for key, value in weights.items():
                own[key].copy_(value)
        for name, value in settings.items():
            if name in OWN_FIELDS:
                setattr(self.config, name, value)


__all__ = ["PREDICTORS", "SparseLoadingMixin"]
