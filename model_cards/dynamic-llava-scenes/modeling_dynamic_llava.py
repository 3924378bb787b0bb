"""Sparse LLaVA (Dynamic-LLaVA, arXiv 2412.00876): the host's classes with predictors and a sparse cache."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation import GenerationMixin
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from .cache_dynamic_llava import SparseCache, SparsityRecord
from .configuration_dynamic_llava import DynamicLlavaConfig, check_setting
from .decoder_dynamic_llava import CACHE, DropStep, Images, MaskStep, Settings, hook_attention, run_decoder
from .generation_dynamic_llava import SparseGenerationMixin
from .loading_dynamic_llava import PREDICTORS, SparseLoadingMixin
from .predictors_dynamic_llava import ImageScorePredictor, TextScorePredictor
from .sparsity_dynamic_llava import find_answers


@dataclass
class DynamicLlavaModelOutputWithPast(LlavaModelOutputWithPast):
    """Output of [`DynamicLlavaModel`]: that of `LlavaModel` plus what was kept.

    Args:
        sparsity ([`SparsityRecord`], *optional*): What this call kept; None with the method off.
    """

    sparsity: SparsityRecord | None = None


@dataclass
class DynamicLlavaCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """Output of [`DynamicLlavaForConditionalGeneration`]: that of the host plus what was kept and how it was learned.

    Args:
        sparsity ([`SparsityRecord`], *optional*): What this call kept; None with the method off.
        language_loss (`torch.FloatTensor` of shape `()`, *optional*): Part of `loss` that the host computes.
        keep_rate_losses (`dict[str, torch.FloatTensor]`, *optional*): Unweighted losses `vision` and `text`, detached.
    """

    sparsity: SparsityRecord | None = None
    language_loss: torch.Tensor | None = None
    keep_rate_losses: dict[str, torch.Tensor] | None = None


@cache
def _register_weight_names() -> None:
    """Give our classes the host's renaming of weights, which a subclass does not inherit: stock checkpoints need it.

    Called where a model is made, since the table costs a tenth of a second that an import should not.
    """
    for name, host in (("DynamicLlavaForConditionalGeneration", "llava"), ("DynamicLlavaModel", "LlavaModel")):
        register_checkpoint_conversion_mapping(name, get_checkpoint_conversion_mapping(host), overwrite=True)


class DynamicLlavaModel(LlavaModel):
    """`LlavaModel` that reads its hidden states at layer `sparse_layer` and goes on with the tokens worth keeping.

    Modifications: two score predictors; an own forward pass where sparsity is on (see [`forward`]); with
    `vision_keep_rate=1` and the text predictor off the host's forward runs unchanged.

    Args:
        config ([`DynamicLlavaConfig`]): Configuration of the model.
    """

    config_class = DynamicLlavaConfig
    config: DynamicLlavaConfig
    _can_compile_fullgraph = False
    _keep_in_fp32_modules = PREDICTORS  # decisions near the threshold survive half precision
    _keep_in_fp32_modules_strict = PREDICTORS
    _auto_class = "AutoModel"

    def __init__(self, config: DynamicLlavaConfig) -> None:
        _register_weight_names()
        super().__init__(config)
        width = config.text_config.hidden_size
        self.image_score_predictor = ImageScorePredictor(
            width,
            config.predictor_hidden_size,
            config.predictor_num_heads,
            config.predictor_intermediate_size,
            config.predictor_num_layers,
        )
        self.output_text_score_predictor = TextScorePredictor(width, config.predictor_hidden_size)
        if config.has_instruct_predictor:
            self.instruct_score_predictor = TextScorePredictor(width, config.predictor_hidden_size)
        self.gumbel_temperature = config.gumbel_start_temperature
        self.last_sparsity: SparsityRecord | None = None
        self.keep_rate_losses: dict[str, torch.Tensor] | None = None
        hook_attention(self.language_model)
        self.post_init()

    def settings(self, **overrides: Any) -> Settings:
        """Sparsity of one call.

        Args:
            **overrides: `vision_keep_rate`, `vision_keep_tokens` and `output_text_threshold` of the call; None takes
                the value of the configuration. A rate without a budget switches off the configuration's budget.

        Raises:
            ValueError: If a value is outside its range.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        for name, value in given.items():
            check_setting(name, value)
        config = self.config
        budget = None if "vision_keep_rate" in given else config.vision_keep_tokens
        rate = given.get("vision_keep_rate", config.vision_keep_rate)
        budget = given.get("vision_keep_tokens", budget)
        return Settings(
            vision_keep_rate=rate,
            vision_keep_tokens=budget,
            threshold=given.get("output_text_threshold", config.output_text_threshold),
            drop_images=config.use_vision_predictor and not (budget is None and rate == 1),
            judge_text=config.use_output_text_predictor,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: SparseCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        cache: SparseCache | None = None,
        answer_labels: torch.LongTensor | None = None,
        drop_tokens: bool = True,
        prompt_length: int | None = None,
        vision_keep_rate: float | None = None,
        vision_keep_tokens: int | None = None,
        output_text_threshold: float | None = None,
        text_decisions: torch.BoolTensor | None = None,
        **kwargs: Any,
    ) -> tuple | DynamicLlavaModelOutputWithPast:
        """Run the sparse decoder; arguments of the host keep their meaning.

        In `eval()` mode without labels dropped tokens leave the computation: the output has the kept positions only,
        right-aligned, so that its last position is always the next token's. In `train()` mode, with labels, or with
        `drop_tokens=False` the output has full length and decisions act through the attention mask.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Ids; image tokens are
                `config.image_token_id`.
            pixel_values (`torch.FloatTensor`, *optional*): Images, as the processor returns them.
            attention_mask (`torch.Tensor` of shape `(batch, past + tokens)`, *optional*): 0 = padding, either side.
            position_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Positions.
            past_key_values ([`SparseCache`], *optional*): Earlier tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, tokens, hidden_size)`, *optional*): Instead of ids.
                Without an image source everything in them counts as text.
            vision_feature_layer (`int` or `list[int]`, *optional*): As in the host.
            vision_feature_select_strategy (`str`, *optional*): As in the host.
            image_sizes (`torch.Tensor`, *optional*): As in the host.
            mm_encoder_outputs (`dict`, *optional*): Image features computed earlier.
            cache ([`SparseCache`], *optional*): Other name of `past_key_values`.
            answer_labels (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Labels, from which the answer
                tokens are found.
            drop_tokens (`bool`, defaults to `True`): False masks instead of dropping.
            prompt_length (`int`, *optional*): Columns of the sequence that are prompt; later ones are generated text.
                Without it one new token on a live cache is generated text and several are prompt.
            vision_keep_rate (`float`, *optional*): For this call instead of the configuration's.
            vision_keep_tokens (`int`, *optional*): For this call instead of the configuration's.
            output_text_threshold (`float`, *optional*): For this call instead of the configuration's.
            text_decisions (`torch.BoolTensor` of shape `(batch or 1, generated)`, *optional*): Replaces the decisions
                on generated (or answer) tokens, counted from the first one; for tests and benchmarks. The predictor
                still runs.
            **kwargs: As in the host.

        Returns:
            [`DynamicLlavaModelOutputWithPast`].

        Raises:
            ValueError: If images and image tokens do not match, a cache of another kind is passed, labels are missing
                in `train()` mode, or the sequence outgrows a sliding window.
        """
        cache = past_key_values if cache is None else cache
        settings = self.settings(
            vision_keep_rate=vision_keep_rate,
            vision_keep_tokens=vision_keep_tokens,
            output_text_threshold=output_text_threshold,
        )
        is_sparse_cache = hasattr(cache, "sparse_layer")
        host_inputs = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "image_sizes": image_sizes,
        }
        if not settings.active and not is_sparse_cache:
            self.last_sparsity, self.keep_rate_losses = None, None
            outputs = super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                mm_encoder_outputs=mm_encoder_outputs,
                return_dict=True,
                **{CACHE: cache},
                **host_inputs,
                **kwargs,
            )
            return DynamicLlavaModelOutputWithPast(**outputs)

        masked = self.training or answer_labels is not None or not drop_tokens
        self._check_call(attention_mask, cache, masked, answer_labels)
        past = cache.get_seq_length() if cache is not None else 0
        if pixel_values is None and not mm_encoder_outputs and input_ids is not None and not past:
            self._check_no_image_tokens(input_ids[:, :prompt_length])
        embeds, features, images = self._embed(
            input_ids, pixel_values, inputs_embeds, mm_encoder_outputs, {**host_inputs, **kwargs}
        )
        batch, new = embeds.shape[:2]
        use_cache = kwargs.pop("use_cache", None)
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not masked:
            cache = SparseCache(self.config)
        self._check_window(past + new)
        if position_ids is None:
            position_ids = torch.arange(past, past + new, device=embeds.device)[None]
        attended = None
        if attention_mask is not None and not bool((attention_mask[:, -new:] != 0).all()):
            attended = attention_mask[:, -new:] != 0

        if masked:
            answers = self._answers(answer_labels, attended, images, prompt_length, batch, new, embeds.device)
            chosen = self._chosen(text_decisions, 0, int(answers.sum(dim=1).max()), batch)
            step = MaskStep(self, settings, images, attended, answers, chosen)
        else:
            prompt_length = cache.prompt_length if prompt_length is None and cache is not None else prompt_length
            if prompt_length is not None:
                generated = min(max(past + new - prompt_length, 0), new)
            else:
                generated = int(past > 0 and new == 1)
            start = cache.generated_tokens if cache is not None else 0
            chosen = self._chosen(text_decisions, start, generated, batch)
            seen = ended = None
            if past and attention_mask is not None and attention_mask.shape[1] == past + new:
                seen = cache.visible_slots(attention_mask[:, :past])
            if generated and cache is not None and input_ids is not None:
                ended = cache.find_ended(input_ids[:, -generated:])
            step = DropStep(self, settings, images, attended, cache, generated, chosen, seen, ended)
        outputs = run_decoder(
            self.language_model,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            sparse_cache=cache,
            sparse_layer=self.config.sparse_layer,
            enter=step.enter,
            use_cache=cache is not None,
            **kwargs,
        )
        self.last_sparsity = step.finish()
        self.keep_rate_losses = step.losses if masked else None
        return DynamicLlavaModelOutputWithPast(**outputs, **features, sparsity=self.last_sparsity)

    def _check_call(
        self,
        attention_mask: torch.Tensor | None,
        cache: object,
        masked: bool,
        answer_labels: torch.Tensor | None,
    ) -> None:
        if self.training and answer_labels is None:
            raise ValueError(
                "`labels` must reach the forward pass of a sparse LLaVA in train() mode, got None: let the model "
                "compute its loss (no `compute_loss_func`, no label smoothing, no trainer that removes the labels), "
                "or call `model.eval()`."
            )
        if cache is not None and not hasattr(cache, "sparse_layer"):
            raise ValueError(
                f"`past_key_values` must be a SparseCache where sparsity is on, got {type(cache).__name__}: pass the "
                "cache that the model returned or `SparseCache(model.config)`, or switch sparsity off with "
                "`vision_keep_rate=1` and `use_output_text_predictor=False` in `model.config`."
            )
        if cache is not None and cache.sparse_layer != self.config.sparse_layer:
            raise ValueError(
                f"`past_key_values` must be of the model's `sparse_layer` {self.config.sparse_layer}, got a cache of "
                f"{cache.sparse_layer}: start with a new cache after changing the configuration."
            )
        if masked and cache is not None:
            raise ValueError(
                "`past_key_values` must be left out in train() mode, with labels, or with `drop_tokens=False`, got a "
                "SparseCache: pass the whole sequence."
            )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                "`attention_mask` must have the shape (batch, tokens) where sparsity is on, got "
                f"{tuple(attention_mask.shape)}: pass the mask of the tokenizer."
            )

    def _check_no_image_tokens(self, prompt: torch.Tensor) -> None:
        tokens = int((prompt == self.config.image_token_id).sum())
        if tokens:
            raise ValueError(
                f"`input_ids` must hold image tokens only where images are given, got {tokens} image tokens and "
                "neither `pixel_values` nor `mm_encoder_outputs`: pass the images of all rows."
            )

    def _check_window(self, length: int) -> None:
        config = self.language_model.config
        window = getattr(config, "sliding_window", None)
        if hasattr(config, "layer_types") and "sliding_attention" not in config.layer_types:
            window = None
        if window is not None and length > window:
            raise ValueError(
                f"`input_ids` must fit the sliding window of the language model ({window} tokens) where sparsity is "
                f"on, got {length} tokens: shorten the sequence, or switch sparsity off."
            )

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        mm_encoder_outputs: dict[str, Any] | None,
        host_inputs: dict[str, Any],
    ) -> tuple[torch.Tensor, dict[str, Any], Images]:
        """Embed ids, put image features in their places and tell where the images are."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given: leave one of them out.")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError(
                "Only one of `pixel_values` and `mm_encoder_outputs` may be given: leave one of them out."
            )
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        encoded = (mm_encoder_outputs or {}).get("image")
        if encoded is None and pixel_values is not None:
            encoded = self.get_image_features(pixel_values=pixel_values, return_dict=True, **host_inputs)
        if encoded is None:
            return embeds, {}, Images()
        pieces = list(encoded.pooler_output)
        features = torch.cat(pieces, dim=0).to(embeds.device, embeds.dtype)  # (image tokens, hidden_size)
        if input_ids is not None:
            tokens = int((input_ids == self.config.image_token_id).sum())
            if tokens != len(features):
                raise ValueError(
                    f"`input_ids` must hold one image token for every image feature, got {tokens} image tokens and "
                    f"{len(features)} features of {len(pieces)} images: let the processor expand `<image>`, and pass "
                    "the images of all rows, on a cache those of the new tokens alone."
                )
        is_image = self.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=features)[..., :1]
        images = Images.find(is_image[..., 0], [len(piece) for piece in pieces])
        embeds = embeds.masked_scatter(is_image, features)
        names = DynamicLlavaModelOutputWithPast.__dataclass_fields__
        record = {"image_outputs": encoded} if "image_outputs" in names else {"image_hidden_states": features}
        return embeds, record, images

    def _answers(
        self,
        labels: torch.Tensor | None,
        attended: torch.Tensor | None,
        images: Images,
        prompt_length: int | None,
        batch: int,
        tokens: int,
        device: torch.device,
    ) -> torch.Tensor:
        """Which tokens of a whole sequence are answer, `(batch, tokens)`."""
        everything = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        attended = everything if attended is None else attended
        if labels is None:
            answers = everything & attended
            answers[:, : tokens if prompt_length is None else prompt_length] = False
            return answers
        is_image = torch.zeros_like(everything)
        for row, columns in zip(images.rows, images.columns):
            is_image[row, columns] = True
        return find_answers(labels.to(device), attended, is_image)

    def _chosen(self, decisions: torch.Tensor | None, start: int, count: int, batch: int) -> torch.Tensor | None:
        if decisions is None or not count:
            return None
        if decisions.dim() != 2 or decisions.shape[1] < start + count or len(decisions) not in (1, batch):
            raise ValueError(
                f"`text_decisions` must have the shape ({batch} or 1 rows, generated tokens) with at least "
                f"{start + count} tokens, got {tuple(decisions.shape)}: give one decision for every generated token."
            )
        return decisions[:, start : start + count].bool()


class DynamicLlavaForConditionalGeneration(
    SparseGenerationMixin, SparseLoadingMixin, LlavaForConditionalGeneration, GenerationMixin
):
    """`LlavaForConditionalGeneration` that drops image tokens in the prefill and caches only text worth keeping.

    Same inputs, same processor, same `generate()`. Modifications: the inner model is [`DynamicLlavaModel`], the cache
    of `generate` is a [`SparseCache`], and the training loss has two more terms.

    Args:
        config ([`DynamicLlavaConfig`]): Configuration of the model.

    Example:
    ```python
    >>> from transformers import AutoProcessor
    >>> from hf_efficient import DynamicLlavaForConditionalGeneration

    >>> model = DynamicLlavaForConditionalGeneration.from_llava("llava-hf/llava-1.5-7b-hf", vision_keep_rate=0.2)
    >>> processor = AutoProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf")
    ```
    """

    config_class = DynamicLlavaConfig
    config: DynamicLlavaConfig
    _can_compile_fullgraph = False
    _keep_in_fp32_modules = PREDICTORS  # decisions near the threshold survive half precision
    _keep_in_fp32_modules_strict = PREDICTORS
    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: DynamicLlavaConfig) -> None:
        _register_weight_names()
        super().__init__(config)
        self.model = DynamicLlavaModel(config)
        self.post_init()

    @property
    def last_sparsity(self) -> SparsityRecord | None:
        """[`SparsityRecord`] of the last forward pass or `generate`; None with the method off."""
        return self.model.last_sparsity

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: SparseCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        cache: SparseCache | None = None,
        drop_tokens: bool = True,
        prompt_length: int | None = None,
        vision_keep_rate: float | None = None,
        vision_keep_tokens: int | None = None,
        output_text_threshold: float | None = None,
        text_decisions: torch.BoolTensor | None = None,
        **kwargs: Any,
    ) -> tuple | DynamicLlavaCausalLMOutputWithPast:
        """Run the sparse LLaVA; arguments as in the host and in [`DynamicLlavaModel.forward`].

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Ids.
            pixel_values (`torch.FloatTensor`, *optional*): Images.
            attention_mask (`torch.Tensor` of shape `(batch, past + tokens)`, *optional*): 0 = padding.
            position_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Positions.
            past_key_values ([`SparseCache`], *optional*): Earlier tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, tokens, hidden_size)`, *optional*): Instead of ids.
            vision_feature_layer (`int` or `list[int]`, *optional*): As in the host.
            vision_feature_select_strategy (`str`, *optional*): As in the host.
            labels (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): -100 on prompt, image and padding. In
                `eval()` mode the loss is the language loss of the sparse model; in `train()` mode
                `config.mask_loss_weight` times the two keep-rate losses is added (Eq. 9).
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): As in the host, counted on the kept positions.
            image_sizes (`torch.Tensor`, *optional*): As in the host.
            mm_encoder_outputs (`dict`, *optional*): Image features computed earlier.
            cache ([`SparseCache`], *optional*): Other name of `past_key_values`.
            drop_tokens (`bool`, defaults to `True`): False gives logits of full length through the mask.
            prompt_length (`int`, *optional*): Columns that are prompt; `generate` passes it.
            vision_keep_rate (`float`, *optional*): For this call.
            vision_keep_tokens (`int`, *optional*): For this call.
            output_text_threshold (`float`, *optional*): For this call.
            text_decisions (`torch.BoolTensor` of shape `(batch or 1, generated)`, *optional*): Replaces the decisions.
            **kwargs: As in the host.

        Returns:
            [`DynamicLlavaCausalLMOutputWithPast`].

        Raises:
            ValueError: As [`DynamicLlavaModel.forward`].
        """
        per_call = {
            "vision_keep_rate": vision_keep_rate,
            "vision_keep_tokens": vision_keep_tokens,
            "output_text_threshold": output_text_threshold,
        }
        share = None
        if labels is not None and self.model.settings(**per_call).active:
            kwargs["num_items_in_batch"], share = self._loss_scale(labels, **kwargs)
        outputs = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            answer_labels=labels,
            drop_tokens=drop_tokens,
            prompt_length=prompt_length,
            vision_keep_rate=vision_keep_rate,
            vision_keep_tokens=vision_keep_tokens,
            output_text_threshold=output_text_threshold,
            text_decisions=text_decisions,
            return_dict=True,
            **{CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )
        # `nn.DataParallel` gathers the outputs of its replicas and takes tensors only
        sparsity = None if getattr(self, "_is_replica", False) else self.model.last_sparsity
        outputs = DynamicLlavaCausalLMOutputWithPast(**outputs, sparsity=sparsity)
        losses, self.model.keep_rate_losses = self.model.keep_rate_losses, None
        if self.training and labels is not None and losses:
            self._add_keep_rate_losses(outputs, losses, share.to(outputs.loss.device))
        return outputs

    @staticmethod
    def _loss_scale(
        labels: torch.Tensor,
        num_items_in_batch: int | torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets by which the language loss is divided, at least 1 (a batch of empty answers gives 0, not NaN).

        With it the share of this batch in a step of several batches and processes, 1 where the batch stands alone.
        """
        count = ((labels[:, 1:] if shift_labels is None else shift_labels) != -100).sum()
        if num_items_in_batch is None:
            return count.clamp(min=1), torch.ones_like(count, dtype=torch.float32)
        items = torch.as_tensor(num_items_in_batch, device=count.device).clamp(min=1)
        return items, count / items

    def _add_keep_rate_losses(
        self,
        outputs: DynamicLlavaCausalLMOutputWithPast,
        losses: dict[str, torch.Tensor],
        share: torch.Tensor,
    ) -> None:
        """Add Eq. 9 to the loss, scaled as the `Trainer` scales the language loss."""
        outputs.language_loss = outputs.loss.detach()
        outputs.keep_rate_losses = {name: loss.detach() for name, loss in losses.items()}
        # mean over this batch's targets; 0 / 0 where it has none
        self.last_sparsity.losses["language"] = (outputs.language_loss / share).nan_to_num(nan=0.0)
        extra = sum(loss.to(share.device) for loss in losses.values())
        extra = self.config.mask_loss_weight * share * extra
        # what a batch may leave out (short answers, no image) takes part all the same, or DDP waits for its gradient
        unused = [
            parameter.sum().to(share.device, torch.float32)
            for name in (*PREDICTORS, "multi_modal_projector", "vision_tower")
            if hasattr(self.model, name)
            for parameter in getattr(self.model, name).parameters()
            if parameter.requires_grad
        ]
        if unused:
            extra = extra + 0.0 * torch.stack(unused).sum()
        outputs.loss = outputs.loss + extra


__all__ = ["DynamicLlavaForConditionalGeneration", "DynamicLlavaModel"]
