"""What `efficiency_report` measures of a LLaVA: image encoder, prefill, decoding with a cache and without one."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_efficient.dynamic_llava.decoder_dynamic_llava import CACHE
from hf_efficient.dynamic_llava.sparsity_dynamic_llava import prefill_flops

from .measure_report import Phase, Work, cache_bytes, compare, measure


UNCACHED_STEPS = 8  # their costs lie on a line: more of them would only take longer
_IMAGES = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")
_UNUSED = ("token_type_ids", "mm_token_type_ids")  # processors may return them; a LLaVA-1.5 does not read them
_MODES = ("vision_keep_rate", "vision_keep_tokens", "use_output_text_predictor")


def is_llava(model: nn.Module) -> bool:
    """Whether this is a LLaVA-1.5 with a head, stock or sparse, wrapped by peft or not."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    has_head = callable(getattr(model, "get_output_embeddings", None)) and model.get_output_embeddings() is not None
    return kind in ("llava", "dynamic_llava") and has_head


def is_sparse(model: nn.Module) -> bool:
    """Whether this LLaVA can drop tokens and is set to do so."""
    inner = _sparse_part(model)
    return inner is not None and inner.settings().active


def _sparse_part(model: nn.Module) -> nn.Module | None:
    """The `DynamicLlavaModel` inside; by its attributes, since its class may come with the checkpoint."""
    parts = (module for module in model.modules() if hasattr(module, "image_score_predictor"))
    return next((part for part in parts if hasattr(part, "settings")), None)


@contextmanager
def sparsity_off(model: nn.Module) -> Iterator[None]:
    """Keep everything inside the block: the host's own path and cache.

    Args:
        model (`nn.Module`): A sparse LLaVA.
    """
    config = _sparse_part(model).config
    before = {name: getattr(config, name) for name in _MODES}
    config.vision_keep_rate, config.vision_keep_tokens, config.use_output_text_predictor = 1.0, None, False
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def paper_flops(config: PreTrainedConfig, tokens: int, kept: int | None = None) -> int:
    """The paper's FLOPs of the image tokens of one sequence: `32 N C^2 + 4 N^2 C` a decoder layer (Sec. 4).

    Args:
        config (`PreTrainedConfig`): Configuration of the LLaVA.
        tokens (`int`): Image tokens N below the sparse layer.
        kept (`int`, *optional*): Image tokens from the sparse layer on; None keeps all.

    Returns:
        `int`
    """
    text = config.get_text_config(decoder=True)
    width, layers = text.hidden_size, text.num_hidden_layers
    if kept is None:
        return prefill_flops(tokens, width, layers)
    below = config.sparse_layer
    return prefill_flops(tokens, width, below) + prefill_flops(kept, width, layers - below)


class LlavaArm:
    """One LLaVA reading one prompt.

    Args:
        model (`nn.Module`): The model.
        inputs (`dict`): What the processor returns.
        new_tokens (`int`): Tokens of the answer.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any], new_tokens: int) -> None:
        self.model, self.new_tokens = model, new_tokens
        self.ids: Tensor = inputs["input_ids"]
        self.mask: Tensor | None = inputs.get("attention_mask")
        self.images = {name: inputs[name] for name in _IMAGES if name in inputs}
        self.prompt = self.ids.shape[1]
        self.features = self.encode() if self.images else None
        self.extra = {} if _sparse_part(model) is None else {"prompt_length": self.prompt}

    def encode(self, _: Any = None) -> Any:
        """Image features, as the language model reads them."""
        return self.model.get_image_features(**self.images, return_dict=True)

    def call(self, start: int, end: int, features: bool, **kwargs: Any) -> Any:
        """Run the language model on columns `start` to `end` of the sequence."""
        if features and self.features is not None:
            kwargs["mm_encoder_outputs"] = {"image": self.features}
        if self.mask is not None:
            ones = self.mask.new_ones(len(self.mask), max(end - self.prompt, 0))
            mask = torch.cat([self.mask, ones], dim=1)[:, :end]
            places = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
            kwargs |= {"attention_mask": mask, "position_ids": places[:, start:]}
        return self.model(input_ids=self.ids[:, start:end], logits_to_keep=1, **kwargs)

    def prefill(self, _: Any = None) -> Any:
        """Read the prompt; returns the cache."""
        return self.call(0, self.prompt, True, use_cache=True)[CACHE]

    def decode(self, cache: Any) -> tuple[int, Any]:
        """Read the answer token by token on a live cache; returns bytes of the cache and what was kept."""
        for end in range(self.prompt + 1, self.prompt + self.new_tokens):
            self.call(end - 1, end, False, use_cache=True, **{CACHE: cache})
        return cache_bytes(cache), getattr(cache, "sparsity", None)

    def read_anew(self, steps: list[int], _: Any = None) -> None:
        """Read prompt and answer so far for the next token, without a cache."""
        for generated in steps:
            self.call(0, self.prompt + generated, True, use_cache=False, **self.extra)

    def write_answer(self, forbidden: int) -> Tensor:
        """Greedy answer past its end, `(batch, new_tokens)`; the token `forbidden` never comes."""
        cache = None
        for end in range(self.prompt, self.prompt + self.new_tokens):
            start = 0 if cache is None else end - 1
            past = {} if cache is None else {CACHE: cache}
            output = self.call(start, end, cache is None, use_cache=True, **past)
            cache, logits = output[CACHE], output.logits[:, -1].clone()
            logits[:, forbidden] = -torch.inf
            self.ids = torch.cat([self.ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
        return self.ids[:, self.prompt :]


def check_llava_inputs(inputs: dict[str, Any]) -> None:
    """Refuse what is no prompt of a LLaVA.

    Raises:
        ValueError: With the name, the rule and the value.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        found = ", ".join(inputs)
        raise ValueError(
            f"`inputs` of a LLaVA must hold `input_ids` of shape (batch, tokens), got {found}: pass what its "
            "processor returns."
        )
    foreign = sorted(inputs.keys() - {"input_ids", "attention_mask", *_IMAGES, *_UNUSED})
    if foreign:
        raise ValueError(
            f"`inputs` of a LLaVA must be a prompt that is to be answered, got `{foreign[0]}` as well: leave it out."
        )
    if mask is not None and not bool((mask[:, -1] != 0).all()):
        raise ValueError("`attention_mask` must pad on the left, got padding in its last column: pad on the left.")


@torch.no_grad()
def measure_llava(
    model: nn.Module,
    baseline: nn.Module | None,
    inputs: dict[str, Any],
    rounds: int,
    new_tokens: int,
    device: torch.device,
) -> tuple[list[Phase], dict[str, Any], list[str]]:
    """Measure the phases of a LLaVA with sparsity on and off, or against another LLaVA, on the same answer.

    Args:
        model (`nn.Module`): Stock or sparse.
        baseline (`nn.Module`, *optional*): Another LLaVA; None takes the model with sparsity off where it is on.
        inputs (`dict`): What the processor returns.
        rounds (`int`): Timed runs.
        new_tokens (`int`): Tokens of the answer.
        device (`torch.device`): Where the models are.

    Returns:
        `tuple`: Phases, what was kept, and notes.
    """
    config = model.config
    own = baseline is None and is_sparse(model)
    arms = {"model": LlavaArm(model, inputs, new_tokens)}
    settings: dict[str, Any] = {"model": nullcontext}
    if own or baseline is not None:
        arms["baseline"] = LlavaArm(model if own else baseline, inputs, new_tokens)
        settings["baseline"] = partial(sparsity_off, model) if own else nullcontext
    first = "baseline" if "baseline" in arms else "model"
    with settings[first]():
        answer = arms[first].write_answer(config.image_token_id)
    for arm in arms.values():
        arm.ids = torch.cat([inputs["input_ids"], answer], dim=1)

    every = [round((number + 0.5) * new_tokens / UNCACHED_STEPS) for number in range(UNCACHED_STEPS)]
    steps = sorted({min(max(step, 1), new_tokens - 1) for step in every})

    def works(kind: str) -> dict[str, Work]:
        made = {
            "prefill": lambda arm: {"run": arm.prefill},
            "cached": lambda arm: {"run": arm.decode, "prepare": arm.prefill, "units": new_tokens - 1},
            "uncached": lambda arm: {"run": partial(arm.read_anew, steps), "units": len(steps)},
        }[kind]
        return {name: Work(**made(arm), setting=settings[name]) for name, arm in arms.items()}

    phases = []
    if arms["model"].images:
        encoders = {name: Work(arm.encode) for name, arm in arms.items() if name == "model" or not own}
        phases.append(compare("image encoder", "pass", measure(encoders, rounds, device, "image encoder"), device))
    prefill = measure(works("prefill"), rounds, device, "prefill")
    cached = measure(works("cached"), rounds, device, "decoding with cache")
    uncached = measure(works("uncached"), rounds, device, "decoding without cache")
    records = {name: result[1] for name, (_, result) in cached.items()}
    held = {name: cache_bytes(cache) for name, (_, cache) in prefill.items()}
    formula = {name: _formula(arm, records[name]) for name, arm in arms.items()}
    phases.append(compare("prefill", "pass", prefill, device, cache_bytes=held, paper_flops=formula))
    held = {name: result[0] for name, (_, result) in cached.items()}
    phases.append(compare("decoding with cache", "token", cached, device, cache_bytes=held))
    phases.append(compare("decoding without cache", "token", uncached, device))
    notes = [
        f"The language model reads given image features; both arms read the same greedy answer of {new_tokens} tokens "
        f"({'of the ' + first if len(arms) > 1 else 'its own'}, not stopped where it ends).",
        f"Decoding without a cache: mean of {len(steps)} of these tokens. Cache bytes: all keys and values at the end "
        "of a run, slack included.",
    ]
    if _sparse_part(model) is not None and not is_sparse(model):
        notes.append("Sparsity is switched off in the configuration of the model.")
    return phases, _kept(arms["model"], records["model"]), notes


def _image_tokens(arm: LlavaArm) -> list[int]:
    """Image tokens of every row of the prompt."""
    return (arm.ids[:, : arm.prompt] == arm.model.config.image_token_id).sum(dim=1).tolist()


def _formula(arm: LlavaArm, record: Any) -> int:
    config, tokens = arm.model.config, _image_tokens(arm)
    if record is None:
        return sum(paper_flops(config, count) for count in tokens)
    kept = [sum(len(index) for index in images) for images in record.image_index]
    return sum(paper_flops(config, *pair) for pair in zip(tokens, kept))


def _kept(arm: LlavaArm, record: Any) -> dict[str, Any]:
    """Tokens of all rows before and after, and cached tokens of each layer when the answer was read."""
    images, fed = sum(_image_tokens(arm)), len(arm.ids) * (arm.new_tokens - 1)
    if record is None:
        return {"image_tokens": [images, images], "answer_tokens": [fed, fed], "cached_tokens_of_layers": None}
    kept = sum(len(index) for row in record.image_index for index in row)
    text = sum(int(row.sum()) for row in record.text_keep)
    return {
        "image_tokens": [images, kept],
        "answer_tokens": [fed, text],
        "cached_tokens_of_layers": list(record.layer_tokens),
    }
