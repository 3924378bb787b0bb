"""The forward pass of a sparse LLaVA: off is off, rows are independent, shapes, spans and wrong input."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GemmaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_efficient import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, DynamicLlavaModel, SparseCache
from hf_efficient.dynamic_llava.decoder_dynamic_llava import CACHE

from .conftest import BACKBONES, IMAGE, TOKENS, llava_config, opinionated


OFF = {"vision_keep_rate": 1, "use_output_text_predictor": False}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_off_is_the_host_bit_for_bit(make_sparse, make_batch, tmp_path, backbone, attention):
    """Same files, the unmodified host class beside ours: logits, tokens, loss, hidden states, cache."""
    sparse = make_sparse(backbone, **OFF)
    sparse.save_pretrained(tmp_path)
    sparse = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
    config = llava_config(backbone)
    config._attn_implementation = attention
    host, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, config=config, output_loading_info=True, attn_implementation=attention
    )
    assert not report["missing_keys"]
    assert all("score_predictor" in key for key in report["unexpected_keys"])
    host.generation_config = sparse.generation_config
    batch = make_batch([3, "image", 5], ["image", 2, "image", 3], [4])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    ours, theirs = (m(**batch, labels=labels, output_hidden_states=True) for m in (sparse, host))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states))
    assert ours.sparsity is None
    assert sparse.last_sparsity is None
    ours, theirs = (
        m.generate(**batch, max_new_tokens=8, return_dict_in_generate=True, output_logits=True) for m in (sparse, host)
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits))
    assert type(ours.past_key_values) is type(theirs.past_key_values)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_layer_loop_is_the_host_s(make_sparse, make_llava, make_batch, backbone):
    """With sparsity on and nothing dropped our loop over the host's layers gives the host's bits."""
    sparse, host = make_sparse(backbone, vision_keep_rate=1), make_llava(backbone)
    batch = make_batch([3, "image", 5])
    ours = sparse(**batch, output_hidden_states=True)
    theirs = host(**batch, output_hidden_states=True)
    assert isinstance(ours.past_key_values, SparseCache)
    assert torch.equal(ours.logits, theirs.logits)
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states))
    steps = torch.randint(3, 110, (1, 5))
    keep = torch.ones(1, 5, dtype=torch.bool)
    caches = [ours.past_key_values, theirs.past_key_values]
    for step in range(5):
        ours = sparse(input_ids=steps[:, step : step + 1], past_key_values=caches[0], text_decisions=keep)
        theirs = host(input_ids=steps[:, step : step + 1], **{CACHE: caches[1]})
        assert torch.equal(ours.logits, theirs.logits)
    for mine, its in zip(caches[0].layers, caches[1].layers):
        assert torch.equal(mine.keys, its.keys)
        assert torch.equal(mine.values, its.values)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_stock_checkpoint_misses_the_predictors_only(make_llava, make_batch, tmp_path, backbone):
    make_llava(backbone).save_pretrained(tmp_path)
    for cls, host in (
        (DynamicLlavaForConditionalGeneration, LlavaForConditionalGeneration),
        (DynamicLlavaModel, LlavaModel),
    ):
        sizes = {"predictor_hidden_size": 16, "predictor_num_heads": 2, "predictor_intermediate_size": 32}
        model, report = cls.from_pretrained(tmp_path, output_loading_info=True, **sizes, **OFF)
        assert report["missing_keys"]
        assert all("score_predictor" in key for key in report["missing_keys"])
        assert all(key.endswith("lm_head.weight") for key in report["unexpected_keys"])
        stock = host.from_pretrained(tmp_path)
        batch = make_batch([3, "image", 5])
        assert torch.equal(model(**batch)[0], stock(**batch)[0])


@pytest.mark.parametrize("pad", ["left", "right"])
def test_each_row_equals_its_batch_of_one(make_sparse, make_batch, pad):
    model = make_sparse()
    rows = [[3, "image", 5], ["image", 2, "image", 9], [7], ["image", 1]]
    batch = make_batch(*rows, pad=pad)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    out = model(**batch, position_ids=positions)
    images = 0
    for row, parts in enumerate(rows):
        attended = batch["attention_mask"][row].bool()
        alone = {"input_ids": batch["input_ids"][row : row + 1, attended]}
        if count := parts.count("image"):
            alone["pixel_values"] = batch["pixel_values"][images : images + count]
            images += count
        single = model(**alone)
        length = single.logits.shape[1]
        assert length == alone["input_ids"].shape[1] - parts.count("image") * (TOKENS - int(TOKENS * 0.3))
        torch.testing.assert_close(out.logits[row, -length:], single.logits[0], atol=2e-5, rtol=0)
        held = out.sparsity.kept_positions[row]
        assert torch.equal(held[-length:], single.sparsity.kept_positions[0])
        assert (held[:-length] == -1).all()
        for one, other in zip(out.sparsity.image_index[row], single.sparsity.image_index[0]):
            assert torch.equal(one, other)
            assert (one.diff() > 0).all()


def test_kept_tokens_are_the_highest_scores(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5])
    seen = {}
    model.model.image_score_predictor.register_forward_hook(lambda m, a, output: seen.update(logits=output))
    index = model(**batch).sparsity.image_index[0][0]
    margin = seen["logits"][0, :, 0] - seen["logits"][0, :, 1]
    assert set(index.tolist()) == set(margin.argsort(descending=True)[: len(index)].tolist())


def test_mask_instead_of_dropping_gives_the_same_answer(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5], ["image", 3])
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    dropped = model(**batch, position_ids=positions)
    masked = model(**batch, position_ids=positions, drop_tokens=False)
    assert masked.logits.shape[1] == batch["input_ids"].shape[1]
    torch.testing.assert_close(masked.logits[:, -1], dropped.logits[:, -1], atol=1e-5, rtol=0)
    for one, other in zip(masked.sparsity.image_index, dropped.sparsity.image_index):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_attentions_shrink_at_the_sparse_layer(make_sparse, make_batch, attention):
    model = make_sparse(attention=attention)
    batch = make_batch([3, "image", 5])
    before = batch["input_ids"].shape[1]
    after = before - TOKENS + int(TOKENS * 0.3)
    out = model(**batch, output_hidden_states=True, output_attentions=attention == "eager")
    assert [state.shape[1] for state in out.hidden_states] == [before] * 3 + [after] * 2
    if attention == "eager":
        assert [weights.shape[-1] for weights in out.attentions] == [before] * 2 + [after] * 2
        masked = model(**batch, output_attentions=True, drop_tokens=False).attentions
        assert [weights.shape[-1] for weights in masked] == [before] * 4
        torch.testing.assert_close(masked[-1].sum(-1), torch.ones(1, 4, before))


def test_settings_may_change_on_a_loaded_model(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5])
    model.config.vision_keep_rate = 0.5
    assert len(model(**batch).sparsity.image_index[0][0]) == TOKENS // 2
    model.config.vision_keep_tokens = 2
    assert len(model(**batch).sparsity.image_index[0][0]) == 2
    model.config.vision_keep_tokens = None
    model.config.sparse_layer = 1
    assert model(**batch).sparsity.layer_tokens == [25, 17, 17, 17]
    model.config.use_vision_predictor = False
    assert model(**batch).sparsity.layer_tokens == [25] * 4


def test_base_model_and_auto_classes(make_sparse, make_batch, tmp_path):
    model = make_sparse()
    batch = make_batch([3, "image", 5])
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, DynamicLlavaModel)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        task = auto.from_pretrained(tmp_path)
        assert isinstance(task, DynamicLlavaForConditionalGeneration)
    hidden = base(**batch).last_hidden_state
    assert torch.equal(task.lm_head(hidden), task(**batch).logits)
    assert isinstance(model(**batch, return_dict=False), tuple)


def test_shares_the_weights_of_a_given_model(make_llava):
    llava = make_llava()
    sparse = DynamicLlavaForConditionalGeneration.from_llava(llava, vision_keep_rate=0.4, predictor_hidden_size=16)
    assert sparse.config.vision_keep_rate == 0.4
    assert sparse.lm_head.weight is llava.lm_head.weight
    assert not any(parameter.is_meta for parameter in sparse.parameters())
    assert sparse.generation_config.to_dict() == llava.generation_config.to_dict()
    sparse.generation_config.max_new_tokens = 7
    assert llava.generation_config.max_new_tokens != 7, "a copy"


def test_loads_a_checkpoint_with_its_own_arguments(make_llava, make_batch, tmp_path):
    make_llava().save_pretrained(tmp_path)
    sparse = DynamicLlavaForConditionalGeneration.from_llava(
        tmp_path, dtype=torch.bfloat16, vision_keep_tokens=3, attn_implementation="eager"
    )
    assert sparse.lm_head.weight.dtype == torch.bfloat16
    assert sparse.model.language_model.config._attn_implementation == "eager"
    batch = make_batch([3, "image", 5])
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    assert len(sparse(**batch).sparsity.image_index[0][0]) == 3


class TestWrongInput:
    def test_images_and_tokens_do_not_match(self, make_sparse, make_batch):
        model = make_sparse()
        batch = make_batch([3, "image", 5], ["image", 3])
        batch["pixel_values"] = batch["pixel_values"][:1]
        with pytest.raises(ValueError, match=r"got 32 image tokens and 16 features of 1 images"):
            model(**batch)
        with pytest.raises(ValueError, match=r"got 32 image tokens and 16 features of 1 images"):
            model.generate(**batch, max_new_tokens=2)

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_image_tokens_without_images(self, make_sparse, make_batch, use_cache):
        model = make_sparse()
        batch = make_batch([3, "image", 5])
        del batch["pixel_values"]
        with pytest.raises(ValueError, match=r"got 16 image tokens and neither `pixel_values` nor"):
            model(**batch)
        with pytest.raises(ValueError, match=r"got 16 image tokens and neither `pixel_values` nor"):
            model.generate(**batch, max_new_tokens=2, use_cache=use_cache)
        model.generation_config.suppress_tokens = [token for token in range(128) if token != IMAGE]
        output = model.generate(**make_batch([4]), max_new_tokens=3, use_cache=use_cache)
        assert output[0, -3:].tolist() == [IMAGE] * 3, "an image token that is generated is text, as in the host"

    def test_image_across_rows(self, make_sparse):
        model = make_sparse()
        ids = torch.tensor([[1, *[IMAGE] * 6], [*[IMAGE] * 6, 4]])
        features = BaseModelOutputWithPooling(pooler_output=[torch.randn(12, 32)])
        with pytest.raises(ValueError, match=r"whole images, got image 0 of 12 tokens reaching from row 0 into row 1"):
            model(input_ids=ids, mm_encoder_outputs={"image": features})

    def test_ids_and_embeds(self, make_sparse, make_batch):
        model = make_sparse()
        with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds`"):
            model.model()

    def test_mask_of_four_dimensions(self, make_sparse, make_batch):
        batch = make_batch([4])
        batch["attention_mask"] = torch.ones(1, 1, 5, 5)
        with pytest.raises(ValueError, match=r"`attention_mask` must have the shape.*got \(1, 1, 5, 5\)"):
            make_sparse()(**batch)

    @pytest.mark.parametrize("rate", [0, -0.1, 1.5, "half", True])
    def test_rate(self, make_sparse, make_batch, rate):
        message = rf"`vision_keep_rate` must be a number in \(0, 1\], got {rate!r}"
        with pytest.raises(ValueError, match=message):
            DynamicLlavaConfig(vision_keep_rate=rate)
        model = make_sparse()
        with pytest.raises(ValueError, match=message):
            model.config.vision_keep_rate = rate
        with pytest.raises(ValueError, match=message):
            model(**make_batch([4]), vision_keep_rate=rate)
        with pytest.raises(ValueError, match=message):
            model.generate(**make_batch([4]), vision_keep_rate=rate)

    @pytest.mark.parametrize(
        ("name", "value", "rule"),
        [
            ("sparse_layer", 0, "an integer of at least 1"),
            ("sparse_layer", 32, "below the number of decoder layers"),
            ("vision_keep_tokens", 0, "None or an integer"),
            ("output_text_keep_rate", 2.0, "a number in"),
            ("output_text_threshold", -1, r"\[0, 1\]"),
            ("gumbel_end_temperature", 0.0, "above 0"),
            ("mask_loss_weight", -1.0, "at least 0"),
            ("predictor_hidden_size", 30, "a multiple of 4"),
            ("use_vision_predictor", 1, "True or False"),
            ("use_instruct_predictor", True, "must be False"),
        ],
    )
    def test_settings(self, name, value, rule):
        with pytest.raises(ValueError, match=rf"`{name}`.*{rule}.*"):
            DynamicLlavaConfig(**{name: value})

    def test_sparse_layer_of_a_loaded_model(self, make_sparse):
        config = make_sparse().config
        config.sparse_layer = 3
        with pytest.raises(ValueError, match=r"`sparse_layer`.*below the number of decoder layers \(4\), got 4"):
            config.sparse_layer = 4
        assert config.sparse_layer == 3

    def test_unsupported_backbone(self):
        with pytest.raises(ValueError, match=r"`text_config.model_type`.*llama, mistral, qwen2, got 'gemma'"):
            DynamicLlavaConfig(text_config=GemmaConfig())


def test_activation_checkpointing_does_not_disturb_generation(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5])
    expected = model.generate(**batch, max_new_tokens=4)
    model.train()
    model.activation_checkpointing_enable()
    model.eval()
    assert torch.equal(model.generate(**batch, max_new_tokens=4), expected)


def test_peft_generates(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5])
    expected = model.generate(**batch, max_new_tokens=6)
    lora = LoraConfig(target_modules=r".*language_model.*(q_proj|k_proj|v_proj|o_proj)")
    wrapped = get_peft_model(model, lora)
    assert torch.equal(wrapped.generate(**batch, max_new_tokens=6), expected), "LoRA starts as the identity"
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=2.0)
    adapted = wrapped.generate(**batch, max_new_tokens=6)
    assert not torch.equal(adapted, expected)
    assert torch.equal(wrapped.generate(**batch, max_new_tokens=6, use_cache=False), adapted)


def test_opinions_survive_a_round_trip(make_sparse, make_batch, tmp_path):
    model = opinionated(make_sparse())
    batch = make_batch([3, "image", 5])
    model.save_pretrained(tmp_path)
    again = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), again.named_parameters()):
        assert torch.equal(ours, theirs), name
    assert torch.equal(model.generate(**batch, max_new_tokens=6), again.generate(**batch, max_new_tokens=6))


def test_a_sparse_checkpoint_is_not_made_sparse_again(make_sparse, tmp_path):
    make_sparse().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"which is sparse already: load it with `from_pretrained`"):
        DynamicLlavaForConditionalGeneration.from_llava(str(tmp_path))
