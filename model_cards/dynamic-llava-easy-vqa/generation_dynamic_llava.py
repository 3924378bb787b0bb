"""`generate()` of a sparse LLaVA: the host's loop on a sparse cache."""

import copy
import functools
from contextvars import ContextVar
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration
from transformers.generation import GenerationMixin

from .cache_dynamic_llava import SparseCache
from .configuration_dynamic_llava import PER_CALL
from .decoder_dynamic_llava import CACHE


# the caches of the innermost running `generate` of this thread; the model itself may serve several at once
_RUNNING: ContextVar[list | None] = ContextVar("running", default=None)
OFF = "`vision_keep_rate=1` and `use_output_text_predictor=False` in `model.config`"
REMEDY = f"leave it out, or switch sparsity off with {OFF}"


def _count_rows(inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> int | None:
    given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    return next((len(prompt) for prompt in given if prompt is not None), None)


class SparseGenerationMixin(GenerationMixin):
    """Gives `generate()` a [`SparseCache`] and tells the model where the prompt ends."""

    def generate(self, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """`generate` of the host on a [`SparseCache`]; afterwards `model.last_sparsity` tells what was kept.

        With beams it tells so of the prompt alone, since the cache ends with other beams than the returned ones.
        Threads that share the model find the record of their own request in `output.past_key_values.sparsity`
        (`return_dict_in_generate=True`).

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
        running: list[tuple[SparseCache, int, int]] = []
        outer = _RUNNING.set(running)
        try:
            return super().generate(inputs, generation_config, **kwargs)
        finally:
            _RUNNING.reset(outer)
            for used, beams, returned in running:
                prompts = range(0, len(used.image_index), beams)
                rows = [row for row in prompts for _ in range(returned)]
                self.model.last_sparsity = used.sparsity if beams == 1 else used.sparsity_of_prompt(rows)
                used.prompt_length = used.end_tokens = None  # a later forward pass has a prompt of its own

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
                f"sparsity on: use `generate`, or switch sparsity off with {OFF}."
            )

    @functools.wraps(LlavaForConditionalGeneration.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the host, and an assistant model is given the images too: it has no first iteration of its own."""
        prepared = super().prepare_inputs_for_generation(*args, **kwargs)
        features, cache = kwargs.get("mm_encoder_outputs"), prepared.get(CACHE)
        missing = features and not prepared.get("mm_encoder_outputs") and prepared.get("pixel_values") is None
        if missing and hasattr(cache, "sparse_layer") and not cache.get_seq_length():
            prepared["mm_encoder_outputs"] = features
        return prepared

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        active = self.model.settings(**{name: model_kwargs.get(name) for name in PER_CALL}).active
        if active and cache is not None and not hasattr(cache, "sparse_layer"):
            cache = model_kwargs[CACHE] = SparseCache(self.config)
        prompt_length = model_kwargs["position_ids"].shape[-1]
        if hasattr(cache, "sparse_layer"):  # told to the cache, so that no assistant model gets an unknown argument
            cache.prompt_length = prompt_length
            cache.end_tokens = getattr(generation_config, "_eos_token_tensor", None)
            if _RUNNING.get() is not None:
                beams, returned = generation_config.num_beams or 1, generation_config.num_return_sequences or 1
                _RUNNING.get().append((cache, beams, returned))
        elif active:
            model_kwargs["prompt_length"] = prompt_length


__all__ = ["SparseGenerationMixin"]
