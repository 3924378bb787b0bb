"""Every number that the authors' code produced, reproduced through the converter and the public model.

The fixtures were written by the authors' implementation with tiny random weights (fp32, CPU).
"""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_efficient import DynamicLlavaForConditionalGeneration


OLD_VOCABULARY = 128
IMAGE = OLD_VOCABULARY  # the first new id
PLACEHOLDER = -200  # of the authors
LAYERS, SPARSE_LAYER = 4, 2


@pytest.fixture
def model(converted):
    model, report = DynamicLlavaForConditionalGeneration.from_pretrained(converted, output_loading_info=True)
    assert not any(report.values())
    return model


@pytest.fixture
def prompt(tensors):
    """Ids with the placeholder expanded, and the projected features of the image."""
    features = tensors["prompt0.image_features"]
    ids = []
    for token in tensors["prompt0.input_ids"].tolist():
        ids += [IMAGE] * len(features) if token == PLACEHOLDER else [token]
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=[features])}
    return {"input_ids": torch.tensor([ids]), "mm_encoder_outputs": encoded}


@pytest.fixture
def close(numbers):
    """`close(got, wanted, kind)` within the tolerance that the fixtures state."""

    def check(got, wanted, kind):
        torch.testing.assert_close(got, wanted, **numbers["tolerances"][kind])

    return check


@pytest.fixture
def watch(model):
    """Inputs and outputs of the modules around the sparse layer, call by call."""
    names = ("image_in", "image_out", "text_out", "sparse_in", "sparse_positions", "positions", "rotated")
    seen = {name: [] for name in names}
    inner = model.model

    def on_image(module, args, output):
        seen["image_in"].append(args[0])
        seen["image_out"].append(output)

    def on_sparse_layer(module, args, kwargs):
        seen["sparse_in"].append(args[0])
        seen["sparse_positions"].append(seen["rotated"][-1])  # the positions behind the rotary embedding in force

    inner.language_model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: seen["rotated"].append(kwargs["position_ids"]), with_kwargs=True
    )
    inner.image_score_predictor.register_forward_hook(on_image)
    inner.output_text_score_predictor.register_forward_hook(lambda _, args, output: seen["text_out"].append(output))
    inner.language_model.layers[SPARSE_LAYER].register_forward_pre_hook(on_sparse_layer, with_kwargs=True)
    inner.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen["positions"].append(kwargs["position_ids"]), with_kwargs=True
    )
    return seen


def check_caches(cache, tensors, prefix, close):
    assert len(cache) == LAYERS
    for layer in range(LAYERS):
        close(cache.layers[layer].keys, tensors[f"{prefix}.key_cache.{layer}"], "caches")
        close(cache.layers[layer].values, tensors[f"{prefix}.value_cache.{layer}"], "caches")


@torch.no_grad()
def test_predictors_give_the_authors_logits(model, tensors, close):
    x, policy = tensors["module.vision_predictor.in"], tensors["module.vision_predictor.policy"]
    assert 0 < policy.mean() < 1
    close(model.model.image_score_predictor(x, policy), tensors["module.vision_predictor.out"], "logits")
    text = model.model.output_text_score_predictor(tensors["module.text_predictor.in"])
    close(text, tensors["module.text_predictor.out"], "logits")


@torch.no_grad()
def test_prefill(model, prompt, watch, tensors, numbers, close):
    wanted = numbers["a_prefill"]
    out = model(**prompt)
    assert prompt["input_ids"].shape == (1, wanted["n_prompt"])
    assert list(out.logits[..., :OLD_VOCABULARY].shape) == wanted["logits_shape"]
    close(out.logits[..., :OLD_VOCABULARY], tensors["prefill.logits"], "logits")
    close(watch["image_in"][0], tensors["prefill.image_tokens_at_sparse_layer"], "logits")
    close(watch["image_out"][0], tensors["prefill.image_predictor_logits"], "logits")
    close(watch["sparse_in"][0], tensors["prefill.hidden_into_layer2_after_pruning"], "logits")

    kept = out.sparsity.image_index[0][0]
    assert kept.tolist() == wanted["kept"] == tensors["prefill.kept_image_index"][0].tolist()
    assert len(kept) == wanted["n_keep"]
    positions = tensors["prefill.position_ids_sparse"].long()
    assert torch.equal(watch["sparse_positions"][0], positions)
    assert torch.equal(out.sparsity.kept_positions, positions)
    assert out.sparsity.layer_tokens == wanted["cache_lens"]
    assert [out.past_key_values.get_seq_length(layer) for layer in range(LAYERS)] == wanted["cache_lens"]
    check_caches(out.past_key_values, tensors, "prefill", close)


@torch.no_grad()
def test_prompt_is_embedded_as_the_authors_do(model, prompt, tensors):
    embeds = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: embeds.append(args[0]))
    model(**prompt)
    assert torch.equal(embeds[0], tensors["prompt0.inputs_embeds"])


@torch.no_grad()
def test_every_step_of_cached_decoding(model, prompt, watch, tensors, numbers, close):
    wanted = numbers["b_decode_cache_prompt0"]
    tokens, logits = tensors["decode_cache.prompt0.tokens"], tensors["decode_cache.prompt0.logits"]
    assert tokens.tolist() == wanted["tokens"]
    out = model(**prompt)
    cache = out.past_key_values
    close(out.logits[0, -1, :OLD_VOCABULARY], logits[0], "logits")
    for step, lengths in enumerate(wanted["cache_lens_per_step"]):
        assert out.logits[0, -1].argmax() == tokens[step]
        out = model(input_ids=tokens[None, step : step + 1].long(), past_key_values=cache)
        close(out.logits[0, -1, :OLD_VOCABULARY], logits[step + 1], "logits")
        assert out.sparsity.layer_tokens == lengths
        assert out.sparsity.text_keep[0].int().tolist() == wanted["decisions"][: step + 1]
    assert out.logits[0, -1].argmax() == tokens[-1]
    assert [int(positions) for positions in watch["positions"][1:]] == wanted["positions_of_steps"]
    assert [int(positions) for positions in watch["sparse_positions"][1:]] == wanted["positions_of_steps"]
    assert tensors["decode_cache.prompt0.decisions"].tolist() == wanted["decisions"]
    close(torch.stack(watch["text_out"])[:, 0, 0], tensors["decode_cache.prompt0.predictor_logits"], "logits")
    assert out.sparsity.layer_tokens == wanted["final_cache_lens"]
    assert out.sparsity.image_index[0][0].tolist() == wanted["kept_image"]
    check_caches(cache, tensors, "decode_cache.prompt0", close)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_generate_gives_the_authors_tokens(model, prompt, tensors, numbers, close, use_cache):
    """Without a cache the authors' ranking differs from their decisions; ours keeps the decision set in both modes."""
    tokens = tensors["decode_cache.prompt0.tokens"]
    out = model.generate(
        **prompt,
        max_new_tokens=len(tokens),
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[0, prompt["input_ids"].shape[1] :]
    assert new.tolist() == tokens.tolist()
    close(torch.cat(out.logits)[:, :OLD_VOCABULARY], tensors["decode_cache.prompt0.logits"], "logits")
    record, wanted = model.last_sparsity, numbers["b_decode_cache_prompt0"]
    assert record.text_keep[0].int().tolist() == wanted["decisions"]
    assert record.layer_tokens == wanted["final_cache_lens"]
    assert record.image_index[0][0].tolist() == wanted["kept_image"]


@torch.no_grad()
def test_with_the_method_off_the_dense_logits_are_the_authors(model, prompt, tensors, close):
    model.config.vision_keep_rate, model.config.use_output_text_predictor = 1.0, False
    close(model(**prompt).logits[..., :OLD_VOCABULARY], tensors["dense.logits"], "logits")


def test_fixture_decisions_are_far_from_ties(numbers):
    """What the exact comparisons above rest on."""
    assert numbers["a_prefill"]["gap_kth_to_next"] > 1e-2
    assert numbers["b_decode_cache_prompt0"]["min_abs_decision_margin"] > 1e-2
    assert numbers["b_decode_cache_prompt0"]["min_top1_top2_logit_gap"] > 1e-2
