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

from .measure_report import Phase, Work, compare, measure


UNCACHED_STEPS = 8  # their costs lie on a line: more of them would only take longer
_IMAGES = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")
_UNUSED = ("token_type_ids", "mm_token_type_ids")  # processors may return them; a LLaVA-1.5 does not read them
_OFF = {"vision_keep_rate": 1.0, "vision_keep_tokens": None, "use_output_text_predictor": False}


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
    """Keep everything inside the block: the host's own path and cache of a sparse LLaVA.

    Twin: `_sparsity_off` of `quickstart_dynamic_llava.py`, which must not know this folder.
    """
    config = _sparse_part(model).config
    before = {name: getattr(config, name) for name in _OFF}
    try:
        for name, value in _OFF.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def paper_flops(config: PreTrainedConfig, tokens: int, kept: int | None = None) -> int:
    """The paper's FLOPs of `tokens` image tokens: `32 N C^2 + 4 N^2 C` a decoder layer (Sec. 4).

    `kept` of them are there from the sparse layer on; None keeps all.
    """
    text = config.get_text_config(decoder=True)
    width, layers = text.hidden_size, text.num_hidden_layers
    below = layers if kept is None else config.sparse_layer
    return prefill_flops(tokens, width, below) + prefill_flops(kept or 0, width, layers - below)


class LlavaArm:
    """One LLaVA reading one prompt, as its processor returns it, and an answer of `new_tokens` tokens."""

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

    def write_answer(self) -> Tensor:
        """Greedy answer past its end, `(batch, new_tokens)`, without image tokens."""
        past: dict[str, Any] = {}
        for end in range(self.prompt, self.prompt + self.new_tokens):
            output = self.call(end - 1 if past else 0, end, not past, use_cache=True, **past)
            past, logits = {CACHE: output[CACHE]}, output.logits[:, -1].clone()
            logits[:, self.model.config.image_token_id] = -torch.inf
            self.ids = torch.cat([self.ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
        return self.ids[:, self.prompt :]

    def image_tokens(self, record: Any) -> tuple[list[int], list[int] | None]:
        """Image tokens of every row of the prompt, and how many a sparse LLaVA kept."""
        tokens = (self.ids[:, : self.prompt] == self.model.config.image_token_id).sum(dim=1).tolist()
        return tokens, record and [sum(len(index) for index in images) for images in record.image_index]


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values of a cache, each storage once, slack included."""
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    storages = [tensor.untyped_storage() for layer in layers for tensor in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def check_llava_inputs(inputs: dict[str, Any]) -> None:
    """Refuse what is no prompt of a LLaVA with a `ValueError`: the name, the rule and the value."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(
            "`inputs` of a LLaVA must hold `input_ids` of shape (batch, tokens), got "
            f"{', '.join(inputs)}: pass what its processor returns."
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
    """Measure the phases of a LLaVA, stock or sparse, and return them, what was kept, and notes.

    It is compared with `baseline`, or with itself with sparsity off where it is on; all arms read the same answer.
    """
    own = baseline is None and is_sparse(model)
    arms = {"model": LlavaArm(model, inputs, new_tokens)}
    settings: dict[str, Any] = {"model": nullcontext, "baseline": partial(sparsity_off, model) if own else nullcontext}
    if own or baseline is not None:
        arms["baseline"] = LlavaArm(model if own else baseline, inputs, new_tokens)
    first = list(arms)[-1]
    with settings[first]():
        answer = arms[first].write_answer()
    for arm in arms.values():
        arm.ids = torch.cat([inputs["input_ids"], answer], dim=1)
    every = [round((number + 0.5) * new_tokens / UNCACHED_STEPS) for number in range(UNCACHED_STEPS)]
    steps = sorted({min(max(step, 1), new_tokens - 1) for step in every})

    def take(title: str, run: Any, prepare: Any = lambda arm: lambda: None, units: int = 1) -> dict[str, Any]:
        works = {name: Work(run(arm), prepare(arm), units, settings[name]) for name, arm in arms.items()}
        return measure(works, rounds, device, title)

    phases = []
    if arms["model"].images:
        encoders = {name: Work(arm.encode) for name, arm in arms.items() if name == "model" or not own}
        phases.append(compare("image encoder", "pass", measure(encoders, rounds, device, "image encoder"), device))
    prefill = take("prefill", lambda arm: arm.prefill)
    cached = take("decoding with cache", lambda arm: arm.decode, lambda arm: arm.prefill, new_tokens - 1)
    uncached = take("decoding without cache", lambda arm: partial(arm.read_anew, steps), units=len(steps))
    records = {name: record for name, (_, (_, record)) in cached.items()}
    tokens = {name: arm.image_tokens(records[name]) for name, arm in arms.items()}
    formula = {
        name: sum(paper_flops(arms[name].model.config, *pair) for pair in zip(before, after or [None] * len(before)))
        for name, (before, after) in tokens.items()
    }
    held = {name: cache_bytes(cache) for name, (_, cache) in prefill.items()}
    phases.append(compare("prefill", "pass", prefill, device, cache_bytes=held, paper_flops=formula))
    held = {name: size for name, (_, (size, _)) in cached.items()}
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
    record, (before, after) = records["model"], tokens["model"]
    images, fed = sum(before), len(answer) * (new_tokens - 1)
    kept = {
        "image_tokens": [images, images if after is None else sum(after)],
        "answer_tokens": [fed, sum(int(row.sum()) for row in record.text_keep) if record else fed],
        "cached_tokens_of_layers": list(record.layer_tokens) if record else None,
    }
    return phases, kept, notes
