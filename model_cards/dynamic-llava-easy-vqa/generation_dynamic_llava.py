"""`generate()` of a sparse LLaVA: the host's loop on a sparse cache."""

import copy
from typing import Any

import torch
from transformers.generation import GenerationMixin

from .cache_dynamic_llava import SparseCache
from .configuration_dynamic_llava import PER_CALL
from .decoder_dynamic_llava import CACHE


REMEDY = "leave it out, or switch sparsity off with `vision_keep_rate=1` and `use_output_text_predictor=False`"


def _count_rows(inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> int | None:
    given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    return next((len(prompt) for prompt in given if prompt is not None), None)


class SparseGenerationMixin(GenerationMixin):
    """Gives `generate()` a [`SparseCache`] and tells the model where the prompt ends."""

    def generate(self, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """`generate` of the host on a [`SparseCache`]; afterwards `model.last_sparsity` tells what was kept.

        Args:
            inputs (`torch.Tensor`, *optional*): As in the host.
            generation_config (`GenerationConfig`, *optional*): As in the host.
            **kwargs: As in the host, plus the per-call arguments of [`forward`]: `vision_keep_rate`,
                `vision_keep_tokens`, `output_text_threshold`, `text_decisions`.

        Raises:
            ValueError: If sparsity is on and the cache or the generation mode cannot drop tokens.
        """
        for old in ("past_key_values", "cache"):
            if old != CACHE and old in kwargs:
                kwargs[CACHE] = kwargs.pop(old)
        settings = self.model.settings(**{name: kwargs.get(name) for name in PER_CALL})
        if settings.active:
            self._refuse_generation(generation_config, kwargs)
        features = kwargs.get("mm_encoder_outputs")
        if features is not None:  # the host repeats them in place for beams
            kwargs["mm_encoder_outputs"] = {name: copy.copy(output) for name, output in features.items()}
        decisions, rows = kwargs.get("text_decisions"), _count_rows(inputs, kwargs)
        if decisions is not None and rows is not None and len(decisions) == 1:  # the host repeats rows for beams
            kwargs["text_decisions"] = decisions.expand(rows, *decisions.shape[1:])
        try:
            return super().generate(inputs, generation_config, **kwargs)
        finally:
            used = self.__dict__.pop("_generation_cache", None)
            if used is not None:
                self.model.last_sparsity = used.sparsity
                used.prompt_length = None  # a later forward pass on this cache has a prompt of its own

    def _refuse_generation(self, generation_config: Any, kwargs: dict[str, Any]) -> None:
        def setting(name: str) -> Any:
            for source in (kwargs, vars(generation_config or object), vars(self.generation_config)):
                if source.get(name) is not None:
                    return source[name]
            return None

        implementation = setting("cache_implementation")
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation` must be 'dynamic' where sparsity is on, got {implementation!r}: {REMEDY}."
            )
        if setting("prefill_chunk_size") is not None:
            raise ValueError(
                "`prefill_chunk_size` must be None where sparsity is on (an image is scored as a whole), got "
                f"{setting('prefill_chunk_size')}: {REMEDY}."
            )
        cache = kwargs.get(CACHE)
        if cache is not None and not hasattr(cache, "sparse_layer"):
            raise ValueError(
                f"`past_key_values` must be a SparseCache where sparsity is on, got {type(cache).__name__}: pass a "
                f"cache that the model returned, {REMEDY}."
            )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching of the host; with sparsity on it raises a `ValueError`."""
        self._refuse_continuous_batching("init_continuous_batching")
        return super().init_continuous_batching(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching of the host; with sparsity on it raises a `ValueError`."""
        self._refuse_continuous_batching("generate_batch")
        return super().generate_batch(*args, **kwargs)

    def _refuse_continuous_batching(self, name: str) -> None:
        if self.model.settings().active:
            raise ValueError(
                f"`{name}` (continuous batching) needs a paged cache and cannot drop tokens, got a model with "
                "sparsity on: use `generate`, or switch sparsity off with `vision_keep_rate=1` and "
                "`use_output_text_predictor=False`."
            )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        active = self.model.settings(**{name: model_kwargs.get(name) for name in PER_CALL}).active
        if active and cache is not None and not hasattr(cache, "sparse_layer"):
            cache = model_kwargs[CACHE] = SparseCache(self.config)
        prompt_length = model_kwargs["position_ids"].shape[-1]
        if hasattr(
            cache, "sparse_layer"
        ):  # told to the cache, so that no assistant model is handed an unknown argument
            self._generation_cache = cache
            cache.prompt_length = prompt_length
        elif active:
            model_kwargs["prompt_length"] = prompt_length


__all__ = ["SparseGenerationMixin"]
