"""What a sparse LLaVA does between the layers of the host's decoder: score, drop, or mask, at the sparse layer."""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import AttentionInterface
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_dynamic_llava import SparseCache, SparsityRecord
from .sparsity_dynamic_llava import (
    count_kept_tokens,
    decide_text,
    keep_rate_loss,
    masked_attention,
    right_align,
    sample_mask,
    select_tokens,
    visible_keys,
)


# transformers 5.24 renamed the argument `past_key_values`; the host gets the name it knows.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
MASKED_ATTENTION = "dynamic_llava"


@dataclass(frozen=True)
class Settings:
    """Sparsity of one call: the configuration with the call's own values on top."""

    vision_keep_rate: float
    vision_keep_tokens: int | None
    threshold: float
    drop_images: bool
    judge_text: bool

    @property
    def active(self) -> bool:
        """`bool`: whether anything can be dropped."""
        return self.drop_images or self.judge_text


@dataclass
class Images:
    """Where the images of a batch are: `rows[i]` and `columns[i]` (`(tokens,)`) of image i, in reading order."""

    rows: list[int] = field(default_factory=list)
    columns: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def find(cls, is_image: torch.Tensor, sizes: list[int]) -> "Images":
        """Split the image tokens of a batch into images.

        Args:
            is_image (`torch.BoolTensor` of shape `(batch, tokens)`): True = image token.
            sizes (`list[int]`): Tokens of each image, in reading order over the rows.

        Raises:
            ValueError: If an image would reach into the next row.
        """
        rows, columns = is_image.nonzero(as_tuple=True)
        found = cls()
        for number, (image_rows, image_columns) in enumerate(zip(rows.split(sizes), columns.split(sizes))):
            if not image_rows.numel():
                continue
            first, last = int(image_rows[0]), int(image_rows[-1])
            if first != last:
                raise ValueError(
                    f"`input_ids` must hold whole images, got image {number} of {len(image_rows)} tokens reaching "
                    f"from row {first} into row {last}: give every row as many image tokens as its images have."
                )
            found.rows.append(first)
            found.columns.append(image_columns)
        return found

    def by_size(self) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Yield `(images, rows (images, 1), columns (images, tokens))` for every image size."""
        groups: dict[int, list[int]] = {}
        for image, columns in enumerate(self.columns):
            groups.setdefault(len(columns), []).append(image)
        for images in groups.values():
            columns = torch.stack([self.columns[image] for image in images])
            rows = torch.tensor([self.rows[image] for image in images], device=columns.device)
            yield images, rows[:, None], columns

    def by_row(self, values: list, batch: int) -> list[list]:
        """Group one value an image by row."""
        grouped = [[] for _ in range(batch)]
        for row, value in zip(self.rows, values):
            grouped[row].append(value)
        return grouped


@dataclass
class Entered:
    """What the layers from the sparse layer on work with."""

    hidden_states: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    layer_kwargs: dict = field(default_factory=dict)


@merge_with_config_defaults
@capture_outputs
def run_decoder(
    self: nn.Module,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    sparse_cache: SparseCache | None,
    sparse_layer: int,
    enter: Callable[[torch.Tensor, torch.Tensor], Entered],
    **kwargs,
) -> BaseModelOutputWithPast:
    """Run the host's decoder layers once, with `enter` between layer `sparse_layer - 1` and layer `sparse_layer`.

    Args:
        self (`nn.Module`): The host's text model (Llama, Mistral or Qwen2), whose parts are called unchanged.
        inputs_embeds (`torch.FloatTensor` of shape `(batch, new, hidden_size)`): Embedded new tokens.
        attention_mask (`torch.Tensor` of shape `(batch, past + new)`, *optional*): 0 = padding.
        position_ids (`torch.LongTensor` of shape `(batch or 1, new)`): Positions of the new tokens.
        sparse_cache ([`SparseCache`], *optional*): Earlier tokens.
        sparse_layer (`int`): First layer that works on what `enter` returns.
        enter (`Callable`): Maps the states and positions that reach the sparse layer to [`Entered`].
        **kwargs: Handed to every layer.

    Returns:
        `BaseModelOutputWithPast` with `last_hidden_state` of shape `(batch, kept, hidden_size)`.
    """
    cache = {CACHE: sparse_cache}
    masks = create_masks_for_generate(
        config=self.config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **cache,
    )
    hidden_states = inputs_embeds
    position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
    for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
        if index == sparse_layer:
            entered = enter(hidden_states, position_ids)
            hidden_states, masks = entered.hidden_states, entered.attention_mask
            if entered.position_ids is not position_ids:
                position_ids = entered.position_ids
                position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
            kwargs = {**kwargs, **entered.layer_kwargs}
        hidden_states = layer(
            hidden_states,
            attention_mask=masks[self.config.layer_types[index]] if isinstance(masks, dict) else masks,
            # rotary angles are made; flash attention takes positions with gaps for several packed sequences
            position_ids=position_ids if index < sparse_layer else None,
            position_embeddings=position_embeddings,
            **cache,
            **kwargs,
        )
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **cache)


def _follow(step: "DropStep | MaskStep", device: torch.device, position_ids: torch.Tensor) -> torch.Tensor:
    """Bring what a step knows of its input, and the positions, to the device of the sparse layer."""
    step.images.columns = [columns.to(device) for columns in step.images.columns]
    step.attended = step.attended if step.attended is None else step.attended.to(device)
    return position_ids.to(device)


@dataclass
class DropStep:
    """Inference: what is dropped at the sparse layer leaves the computation, and the caches from there on.

    Args:
        model (`nn.Module`): Holds the two predictors and the text model.
        settings ([`Settings`]): Sparsity of the call.
        images ([`Images`]): Images among the new tokens.
        attended (`torch.BoolTensor` of shape `(batch, new)`, *optional*): False = padding; None = no padding.
        cache ([`SparseCache`], *optional*): Earlier tokens.
        generated (`int`): How many of the new columns, from the last one back, are generated text.
        decisions (`torch.BoolTensor` of shape `(batch or 1, generated)`, *optional*): Replaces the text decisions.
        seen (`torch.BoolTensor` of shape `(batch, slots)`, *optional*): Cached slots that the mask leaves visible.
        ended (`torch.LongTensor` of shape `(batch, generated)`, *optional*): 1 = ends its row, 2 = comes after that.
    """

    model: nn.Module
    settings: Settings
    images: Images
    attended: torch.Tensor | None
    cache: SparseCache | None
    generated: int
    decisions: torch.Tensor | None
    seen: torch.Tensor | None = None
    ended: torch.Tensor | None = None

    def enter(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> Entered:
        """Decide, drop, and prepare positions and mask of the sparse layers."""
        batch, new = hidden_states.shape[:2]
        position_ids = _follow(self, hidden_states.device, position_ids)
        self.kept_now: list[int] | None = None
        self.positions = position_ids.expand(batch, -1)
        self.image_index: list[torch.Tensor] = [columns.new_empty(0) for columns in self.images.columns]
        self.stored = torch.ones(batch, new, dtype=torch.bool, device=hidden_states.device)
        if self.attended is not None:
            self.stored = self.stored & self.attended
        self._judge_text(hidden_states)
        if self.ended is not None:
            self.ended = self.ended.to(self.stored.device)
            self.stored[:, -self.generated :] |= self.ended == 1
            self.stored[:, -self.generated :] &= self.ended < 2
        if new == 1 and self.cache is not None and self.cache.table.longest and not self.images.rows:
            return self._enter_one(hidden_states, position_ids)
        self._select_images(hidden_states)
        return self._enter_many(hidden_states, position_ids)

    def _judge_text(self, hidden_states: torch.Tensor) -> None:
        if not (self.generated and self.settings.judge_text):
            return
        logits = self.model.output_text_score_predictor(hidden_states[:, -self.generated :])
        logits = logits.to(hidden_states.device)  # (batch, generated, 2); layers may be spread over devices
        keep = decide_text(logits, self.settings.threshold)
        if self.decisions is not None:
            keep = self.decisions.to(keep.device).expand_as(keep)
        self.stored[:, -self.generated :] &= keep

    def _select_images(self, hidden_states: torch.Tensor) -> None:
        for images, rows, columns in self.images.by_size():
            kept = columns.shape[1]
            index = torch.arange(kept, device=columns.device).expand(len(images), -1)
            if self.settings.drop_images:
                kept = count_kept_tokens(kept, self.settings.vision_keep_rate, self.settings.vision_keep_tokens)
                logits = self.model.image_score_predictor(hidden_states[rows, columns]).to(hidden_states.device)
                index = select_tokens(logits, kept)  # (images, kept)
                chosen = torch.zeros_like(columns, dtype=torch.bool).scatter(1, index, True)
                self.stored[rows, columns] = self.stored[rows, columns] & chosen
            for image, kept_tokens in zip(images, index):
                self.image_index[image] = kept_tokens

    def _enter_one(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> Entered:
        """One generated token on a live cache: nothing is gathered, the token sees the cache and itself."""
        self.kept_now = [int(kept) for kept in self.stored[:, 0].tolist()]
        mask = None
        if self.seen is not None or not self.cache.table.uniform:
            filled = self.cache.table.filled(extra=1)
            if self.seen is not None:
                filled[:, :-1] &= self.seen
            mask = self._causal_mask(hidden_states, filled)
        self.cache.stage(self.stored, self.positions, all_stored=all(self.kept_now))
        return Entered(hidden_states, position_ids, mask)

    def _enter_many(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> Entered:
        """Gather what goes on, right-aligned, and let each query see the stored tokens before it and itself."""
        going_on = self.stored.clone()
        if self.generated and self.cache is not None:  # a candidate's logits are needed even if its key is dropped
            going_on[:, -self.generated :] = True if self.attended is None else self.attended[:, -self.generated :]
        elif self.generated:  # without a cache only the newest token still asks for logits
            going_on[:, -1] = True if self.attended is None else self.attended[:, -1]
        stored, positions, valid = self.stored, self.positions, None
        if not bool(going_on.all()):
            index, valid = right_align(going_on)
            stored = stored.gather(1, index) & valid
            positions = position_ids = positions.gather(1, index)
            hidden_states = hidden_states.gather(1, index[..., None].expand(-1, -1, hidden_states.shape[-1]))
            valid = None if bool(valid.all()) else valid
        all_stored = bool(stored.all())
        mask = self._mask_many(hidden_states, stored, valid, all_stored)
        if self.cache is not None:
            self.cache.stage(stored, positions, all_stored)
        return Entered(hidden_states, position_ids, mask)

    def _mask_many(
        self, hidden_states: torch.Tensor, stored: torch.Tensor, valid: torch.Tensor | None, all_stored: bool
    ) -> torch.Tensor | None:
        past = self.cache.table.longest if self.cache is not None else 0
        filled = None
        if valid is not None or self.seen is not None or (past and not self.cache.table.uniform):
            valid = torch.ones_like(stored) if valid is None else valid
            cached = self.cache.table.filled() if past else valid[:, :0]
            cached = cached if self.seen is None else cached & self.seen
            filled = torch.cat([cached, valid], dim=1)
        visible = None
        if not all_stored and self.generated and self.cache is not None:
            if "flash" in self.model.language_model.config._attn_implementation:
                raise ValueError(
                    "`attn_implementation` must be sdpa or eager where several generated tokens are fed at once "
                    "(assisted decoding), got flash attention: load the model with `attn_implementation='sdpa'`."
                )
            seen = torch.cat([stored.new_ones(stored.shape[0], past), stored], dim=1)
            visible = lambda row, head, query, key: seen[row, key] | (query == key)  # noqa: E731
        return self._causal_mask(hidden_states, filled, visible)

    def _causal_mask(
        self, hidden_states: torch.Tensor, filled: torch.Tensor | None, visible: Callable | None = None
    ) -> torch.Tensor | None:
        # position ids are left out on purpose: the host takes their gaps for packed sequences
        return create_causal_mask(
            config=self.model.language_model.config,
            inputs_embeds=hidden_states,
            attention_mask=filled,
            position_ids=None,
            layer_idx=self.model.config.sparse_layer,
            and_mask_function=visible,
            **{CACHE: self.cache},
        )

    def finish(self) -> SparsityRecord:
        """Close the step after the last layer and tell what was kept."""
        batch, new = self.stored.shape
        images = None
        if self.images.rows:
            sizes = [len(columns) for columns in self.images.columns]
            images = (self.images.by_row(self.image_index, batch), self.images.by_row(sizes, batch))
        if self.cache is not None:
            if images is not None:
                ends = [int(columns[-1]) for columns in self.images.columns]
                images = (*images, self.images.by_row(ends, batch))
            ended = None if self.ended is None else self.ended > 0
            self.cache.commit(self.stored, self.generated, self.kept_now, images, ended)
            return self.cache.sparsity
        generated = torch.zeros(new, dtype=torch.bool, device=self.stored.device)
        generated[new - self.generated :] = True
        return record_without_cache(self.model, self.stored, generated, self.positions, images)


@dataclass
class MaskStep:
    """Training and evaluation with labels: nothing leaves, dropped tokens are masked from all others.

    Args:
        model (`nn.Module`): Holds the two predictors and the text model.
        settings ([`Settings`]): Sparsity of the call.
        images ([`Images`]): Images of the batch.
        attended (`torch.BoolTensor` of shape `(batch, tokens)`, *optional*): False = padding; None = no padding.
        answers (`torch.BoolTensor` of shape `(batch, tokens)`): True = answer token.
        decisions (`torch.BoolTensor` of shape `(batch or 1, answer tokens)`, *optional*): Replaces the text decisions.
    """

    model: nn.Module
    settings: Settings
    images: Images
    attended: torch.Tensor | None
    answers: torch.Tensor
    decisions: torch.Tensor | None

    def enter(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> Entered:
        """Decide and hand the decisions to the attention of the sparse layers."""
        batch, tokens = hidden_states.shape[:2]
        position_ids = _follow(self, hidden_states.device, position_ids)
        self.answers = self.answers.to(hidden_states.device)
        self.positions = position_ids.expand(batch, -1)
        self.losses: dict[str, torch.Tensor] = {}
        self.image_index: list[torch.Tensor] = [columns.new_empty(0) for columns in self.images.columns]
        self.policy = torch.ones(batch, tokens, dtype=torch.float32, device=hidden_states.device)
        self._mask_images(hidden_states)
        self._mask_text(hidden_states)
        return Entered(hidden_states, position_ids, None, {"token_policy": self.policy, "token_valid": self.attended})

    def _mask_images(self, hidden_states: torch.Tensor) -> None:
        shares, targets = [], []
        for images, rows, columns in self.images.by_size():
            mask = torch.ones_like(columns, dtype=torch.float32)
            if self.settings.drop_images:
                kept = count_kept_tokens(
                    columns.shape[1], self.settings.vision_keep_rate, self.settings.vision_keep_tokens
                )
                logits = self.model.image_score_predictor(hidden_states[rows, columns]).to(hidden_states.device)
                if self.model.training:
                    mask = sample_mask(logits, self.model.gumbel_temperature)  # (images, tokens)
                    rate = self.settings.vision_keep_rate
                    target = rate if self.settings.vision_keep_tokens is None else kept / columns.shape[1]
                    shares.append(mask.mean(dim=1))
                    targets.append(torch.full_like(shares[-1], target))
                else:
                    mask = torch.zeros_like(mask).scatter(1, select_tokens(logits, kept), 1.0)
                self.policy = self.policy.index_put((rows, columns), mask)
            for image, chosen in zip(images, mask.detach() > 0.5):
                self.image_index[image] = chosen.nonzero()[:, 0]
        if self.model.training and self.settings.drop_images:
            self.losses["vision"] = (
                keep_rate_loss(torch.cat(shares), torch.cat(targets)) if shares else self.policy.new_zeros(())
            )

    def _mask_text(self, hidden_states: torch.Tensor) -> None:
        if not self.settings.judge_text:
            return
        training, config = self.model.training, self.model.config
        rows, columns = self.answers.nonzero(as_tuple=True)
        length = self.answers.sum(dim=1)  # (batch,)
        logits = self.model.output_text_score_predictor(hidden_states[rows, columns])  # (answer tokens, 2)
        if training:
            keep = sample_mask(logits, self.model.gumbel_temperature)
        else:
            keep = decide_text(logits, self.settings.threshold).float()
        if self.decisions is not None:
            order = self.answers.long().cumsum(dim=1)[rows, columns] - 1
            chosen = self.decisions.to(keep.device).expand(len(length), -1)
            keep = chosen[rows, order].to(keep.dtype)
        short = length < config.output_text_min_length
        if training:
            keep = torch.where(short[rows], torch.ones_like(keep), keep)
        self.policy = self.policy.index_put((rows, columns), keep)
        if training:
            share = torch.zeros_like(self.policy[:, 0]).index_add(0, rows, keep) / length.clamp(min=1)
            target = torch.where(
                short | (length == 0), share.detach(), torch.full_like(share, config.output_text_keep_rate)
            )
            self.losses["text"] = keep_rate_loss(share, target)

    def finish(self) -> SparsityRecord:
        """Tell what was kept, and the detached losses."""
        stored = self.policy.detach() > 0.5
        if self.attended is not None:
            stored = stored & self.attended
        sizes = [len(columns) for columns in self.images.columns]
        batch = len(stored)
        images = (self.images.by_row(self.image_index, batch), self.images.by_row(sizes, batch))
        record = record_without_cache(self.model, stored, self.answers, self.positions, images)
        record.losses = {name: loss.detach() for name, loss in self.losses.items()}
        return record


def record_without_cache(
    model: nn.Module,
    stored: torch.Tensor,
    generated: torch.Tensor,
    positions: torch.Tensor,
    images: tuple[list[list[torch.Tensor]], list[list[int]]] | None,
) -> SparsityRecord:
    """Record of a forward pass without cache, as a cache would have counted it."""
    batch, tokens = stored.shape
    below = model.config.sparse_layer
    above = model.language_model.config.num_hidden_layers - below
    index, sizes = images if images is not None else ([[] for _ in range(batch)], [[] for _ in range(batch)])
    return SparsityRecord(
        image_index=index,
        image_sizes=sizes,
        kept=stored,
        generated=generated,
        positions=positions,
        filled=stored,
        layer_tokens=[tokens] * below + [int(stored.sum(dim=1).max())] * above,
    )


def attend_with_policy(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    token_policy: torch.Tensor | None = None,
    token_valid: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention function `dynamic_llava` of the training path; see [`masked_attention`].

    Raises:
        ValueError: If the language model wants attention dropout.
    """
    if dropout:
        raise ValueError(
            f"`text_config.attention_dropout` must be 0 to train a sparse LLaVA, got {dropout}: set it to 0."
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = masked_attention(query, key, value, token_policy, token_valid, scaling)
    weights = None
    if kwargs.get("output_attentions"):
        visible = token_policy > 0.5 if token_valid is None else (token_policy > 0.5) & token_valid
        scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
        weights = scores.masked_fill(~visible_keys(visible), float("-inf")).softmax(dim=-1)
    return output.transpose(1, 2).contiguous(), weights


AttentionInterface.register(MASKED_ATTENTION, attend_with_policy)


def _use_policy(module: nn.Module, args: tuple, kwargs: dict) -> None:
    if kwargs.get("token_policy") is not None:
        module.host_config = module.config
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = MASKED_ATTENTION


def _use_host(module: nn.Module, args: tuple, output: object) -> None:
    if "host_config" in module.__dict__:
        module.config = module.__dict__.pop("host_config")


def hook_attention(language_model: nn.Module) -> None:
    """Let a layer that is given a `token_policy` use it, without touching the implementation the user chose.

    The attention of the host reads the name of its function from its configuration when it is called. Two hooks around
    that call swap the name, so it also holds when activation checkpointing recomputes a layer after the forward pass.
    """
    for layer in language_model.layers:
        if not getattr(layer.self_attn, "_reads_token_policy", False):
            layer.self_attn.register_forward_pre_hook(_use_policy, with_kwargs=True)
            layer.self_attn.register_forward_hook(_use_host, always_call=True)
            layer.self_attn._reads_token_policy = True


__all__ = ["CACHE", "DropStep", "Images", "MaskStep", "Settings", "hook_attention", "run_decoder"]
