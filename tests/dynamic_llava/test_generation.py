"""`generate()` of a sparse LLaVA: every way of decoding gives what independent runs give."""

import threading

import pytest
import torch
from PIL import Image
from transformers import DynamicCache, LlamaForCausalLM, StaticCache, TextIteratorStreamer, pipeline
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import AttentionInterface

from hf_efficient import SparseCache
from hf_efficient.dynamic_llava import decoder_dynamic_llava as decoder

from .conftest import BACKBONES, IMAGE, TOKENS


EXACT = {"atol": 1e-5, "rtol": 0}


def generate(model, batch, **kwargs):
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**batch, **{**settings, **kwargs})


def assert_clear(model, batch, new=12):
    """The smallest decision margin and top-k gap are far above rounding, and something was dropped in every row."""
    margins = []

    def text(module, args, output):
        margins.append((output[..., 0] - output[..., 1]).abs().min().item())

    def image(module, args, output):
        kept = max(int(output.shape[1] * model.config.vision_keep_rate), 1)
        scores = output.log_softmax(-1)[..., 0].sort(dim=1, descending=True).values
        margins.append((scores[:, kept - 1] - scores[:, kept]).min().item())

    handles = [
        model.model.output_text_score_predictor.register_forward_hook(text),
        model.model.image_score_predictor.register_forward_hook(image),
    ]
    generate(model, batch, max_new_tokens=new)
    for handle in handles:
        handle.remove()
    assert min(margins) > 1e-4, margins
    return model.last_sparsity


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_cached_equals_uncached(make_sparse, make_batch, backbone, attention):
    model = make_sparse(backbone, attention)
    batch = make_batch([3, "image", 5], ["image", 3])
    record = assert_clear(model, batch)
    decisions = torch.cat(record.text_keep)
    assert 0 < decisions.sum() < len(decisions)
    assert all(len(index) < TOKENS for row in record.image_index for index in row)
    cached = generate(model, batch)
    kept = model.last_sparsity
    calls = []
    handle = model.model.language_model.layers[-1].register_forward_pre_hook(
        lambda module, args: calls.append(args[0].shape[1])
    )
    uncached = generate(model, batch, use_cache=False)
    handle.remove()
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **EXACT)
    assert uncached.get("past_key_values") is None
    again = model.last_sparsity
    for one, other in zip(kept.text_keep, again.text_keep):
        assert torch.equal(one, other)
    assert torch.equal(kept.kept_positions, again.kept_positions)
    assert kept.layer_tokens == again.layer_tokens
    assert [[i.tolist() for i in row] for row in kept.image_index] == [
        [i.tolist() for i in row] for row in again.image_index
    ]
    dense = batch["input_ids"].shape[1]
    assert all(length < dense + step for step, length in enumerate(calls)), "tokens really leave every step"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_row_equals_its_own_run(make_sparse, make_batch, backbone):
    model = make_sparse(backbone)
    rows = [[3, "image", 5], ["image", 2, "image", 9], [7], [2, "image", 1]]
    batch = make_batch(*rows)
    assert_clear(model, batch)
    together = generate(model, batch)
    record, cache = model.last_sparsity, together.past_key_values
    assert [len(row) for row in record.image_index] == [1, 2, 0, 1]
    images = 0
    for row, parts in enumerate(rows):
        start = int((batch["attention_mask"][row] == 0).sum())
        alone = {"input_ids": batch["input_ids"][row : row + 1, start:]}
        count = parts.count("image")
        if count:
            alone["pixel_values"] = batch["pixel_values"][images : images + count]
            images += count
        single = generate(model, alone)
        new = together.sequences[row, batch["input_ids"].shape[1] :]
        assert torch.equal(single.sequences[0, alone["input_ids"].shape[1] :], new)
        torch.testing.assert_close(
            torch.stack(single.logits)[:, 0], torch.stack(together.logits)[:, row], atol=2e-5, rtol=0
        )
        assert torch.equal(model.last_sparsity.text_keep[0], record.text_keep[row])
        held = record.kept_positions[row]
        assert torch.equal(model.last_sparsity.kept_positions[0], held[held >= 0])
        kept = int((held >= 0).sum())
        torch.testing.assert_close(
            cache.layers[-1].keys[row, :, :kept], single.past_key_values.layers[-1].keys[0], atol=2e-5, rtol=0
        )


def test_cache_holds_every_token_below_and_kept_ones_above(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5])
    lengths = []
    original = SparseCache.commit

    def commit(self, *args, **kwargs):
        original(self, *args, **kwargs)
        lengths.append([self.get_seq_length(layer) for layer in range(4)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseCache, "commit", commit)
        generate(model, batch)
    prompt, kept = batch["input_ids"].shape[1], batch["input_ids"].shape[1] - TOKENS + int(TOKENS * 0.3)
    decisions = [0, *model.last_sparsity.text_keep[0].long().cumsum(0).tolist()]
    assert lengths == [[prompt + step] * 2 + [kept + stored] * 2 for step, stored in enumerate(decisions)]


def test_beam_search_equals_uncached(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5], ["image", 3])
    assert_clear(model, batch)
    settings = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    cached = generate(model, batch, **settings)
    assert not all(row.all() for row in cached.past_key_values.sparsity.text_keep)
    uncached = generate(model, batch, use_cache=False, **settings)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, **EXACT)


def test_sampling_with_several_sequences_equals_uncached(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5])
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        runs.append(generate(model, batch, do_sample=True, num_return_sequences=3, use_cache=use_cache))
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert len({tuple(row.tolist()) for row in runs[0].sequences}) > 1
    assert not all(row.all() for row in model.last_sparsity.text_keep)


def test_assisted_decoding_equals_greedy(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5])
    batch["input_ids"] = torch.cat([batch["input_ids"], batch["input_ids"][:, -5:]], dim=1)  # something to look up
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert_clear(model, batch, new=30)
    greedy = generate(model, batch, max_new_tokens=30)
    record = model.last_sparsity
    crops = []
    original = SparseCache.crop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseCache, "crop", lambda self, n: (crops.append(n), original(self, n))[1])
        assisted = generate(model, batch, max_new_tokens=30, prompt_lookup_num_tokens=4)
    assert torch.equal(greedy.sequences, assisted.sequences)
    assert any(crop < 0 for crop in crops), "candidates were rejected and cropped"
    assert torch.equal(record.text_keep[0], model.last_sparsity.text_keep[0][: len(record.text_keep[0])])


def test_assistant_model_equals_greedy(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([9])
    assistant = make_sparse("llama").model.language_model
    helper = LlamaForCausalLM(assistant.config).eval()
    helper.model = assistant
    helper.generation_config.eos_token_id = None
    assert_clear(model, batch)
    greedy, assisted = generate(model, batch), generate(model, batch, assistant_model=helper)
    assert torch.equal(greedy.sequences, assisted.sequences)


def test_inputs_embeds(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5], ["image", 3])
    by_ids = generate(model, batch)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    by_embeds = generate(model, {"inputs_embeds": embeds, **rest})
    prompt = batch["input_ids"].shape[1]
    assert torch.equal(by_embeds.sequences, by_ids.sequences[:, prompt:])
    text = generate(model, {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]})
    assert text.past_key_values.sparsity.image_index == [[], []], "without an image source all is text"


def test_features_computed_earlier(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5], ["image", 3])
    expected = generate(model, batch, num_beams=2)
    features = {"image": model.get_image_features(batch.pop("pixel_values"), return_dict=True)}
    before = len(features["image"].pooler_output)
    for _ in range(2):  # the host repeats features for beams; the caller's stay as they are
        got = generate(model, {**batch, "mm_encoder_outputs": features}, num_beams=2)
        assert torch.equal(got.sequences, expected.sequences)
    assert len(features["image"].pooler_output) == before


@pytest.mark.parametrize("padded", [False, True])
def test_second_turn_equals_masked_oracle(make_sparse, make_batch, padded):
    """A later turn on a returned cache sees exactly what was kept: a full-length run with the same tokens masked."""
    model = make_sparse()
    batch = make_batch([3, "image", 5], ["image", 3]) if padded else make_batch([3, "image", 5])
    first = generate(model, batch)
    assert not all(row.all() for row in model.last_sparsity.text_keep)
    more = torch.randint(3, 110, (len(first.sequences), 6))
    ids = torch.cat([first.sequences, more], dim=1)
    new = ids.shape[1] - batch["input_ids"].shape[1]
    mask = torch.cat([batch["attention_mask"], torch.ones(len(ids), new, dtype=torch.long)], dim=1)
    second = generate(
        model, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values, max_new_tokens=6
    )
    record = second.past_key_values.sparsity

    # oracle: no cache, every token goes through every layer, dropped ones are hidden from all others
    prompt = batch["input_ids"].shape[1]
    fed = second.sequences[:, :-1]
    full_mask = torch.cat([mask, torch.ones(len(ids), fed.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
    kept = record._kept[:, : fed.shape[1]]

    def mask_text(self, hidden_states):
        self.policy = kept.float()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder.MaskStep, "_mask_text", mask_text)
        positions = (full_mask.cumsum(1) - 1).clamp(min=0)
        oracle = model(
            input_ids=fed,
            attention_mask=full_mask,
            position_ids=positions,
            pixel_values=batch["pixel_values"],
            drop_tokens=False,
        ).logits
    start = ids.shape[1] - 1
    torch.testing.assert_close(torch.stack(second.logits, dim=1), oracle[:, start:], atol=2e-5, rtol=0)
    assert kept[:, prompt + 12 - 1 : ids.shape[1]].all(), "tokens of a later prompt are kept"


def test_image_in_a_later_turn_is_pruned(make_sparse, make_batch):
    model = make_sparse()
    first = generate(model, make_batch([6]))
    turn = make_batch([2, "image", 3], seed=4)
    ids = torch.cat([first.sequences, turn["input_ids"]], dim=1)
    second = generate(
        model, {"input_ids": ids, "pixel_values": turn["pixel_values"]}, past_key_values=first.past_key_values
    )
    record = second.past_key_values.sparsity
    assert len(record.image_index[0][0]) == int(TOKENS * 0.3)
    assert second.past_key_values.get_seq_length(0) - second.past_key_values.get_seq_length(3) >= TOKENS - 4


def test_rates_of_a_call(make_sparse, make_batch, tmp_path):
    model = make_sparse()
    batch = make_batch([3, "image", 5])
    for settings, kept in [({}, 4), ({"vision_keep_rate": 0.5}, 8), ({"vision_keep_tokens": 3}, 3)]:
        generate(model, batch, **settings)
        assert len(model.last_sparsity.image_index[0][0]) == kept
        assert len(model(**batch, **settings).sparsity.image_index[0][0]) == kept
    generate(model, batch, output_text_threshold=0.0)
    assert model.last_sparsity.text_keep[0].all()
    generate(model, batch, output_text_threshold=1.0)
    assert not model.last_sparsity.text_keep[0].any()
    decisions = torch.tensor([[True, False] * 6])
    generate(model, batch, text_decisions=decisions)
    assert torch.equal(model.last_sparsity.text_keep[0], decisions[0, :11])
    generate(model, batch, text_decisions=decisions, use_cache=False)
    assert torch.equal(model.last_sparsity.text_keep[0], decisions[0, :11])
    with pytest.raises(ValueError, match=r"`text_decisions`.*at least 3 tokens, got \(1, 2\)"):
        generate(model, batch, text_decisions=decisions[:, :2])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, vision_keep_rate=0.75)
    assert again.config.vision_keep_rate == 0.75
    assert len(again(**batch).sparsity.image_index[0][0]) == 12


@pytest.mark.parametrize("use_cache", [True, False])
def test_one_row_of_decisions_serves_all_beams(make_sparse, make_batch, use_cache):
    model = make_sparse()
    batch = make_batch([3, "image", 5], ["image", 3])
    row = torch.tensor([[True, False, False, True, False, True, True]])
    output = generate(model, batch, num_beams=2, max_new_tokens=6, text_decisions=row, use_cache=use_cache)
    record = output.past_key_values.sparsity if use_cache else model.last_sparsity
    assert [keep.tolist() for keep in record.text_keep] == 4 * [row[0, :5].tolist()]
    with pytest.raises(ValueError, match=r"`text_decisions` must have the shape \(2 or 1 rows.*got \(3, 7\)"):
        generate(model, batch, text_decisions=row.expand(3, -1), max_new_tokens=4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_bfloat16_is_finite_and_of_the_same_shape(make_sparse, make_batch, use_cache):
    model = make_sparse()
    batch = make_batch([3, "image", 5], ["image", 3])
    expected = generate(model, batch, use_cache=use_cache)
    model = model.to(torch.bfloat16)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    got = generate(model, batch, use_cache=use_cache)
    assert got.sequences.shape == expected.sequences.shape
    assert all(torch.isfinite(logits).all() for logits in got.logits)


def test_device_map(make_sparse, make_batch, tmp_path):
    model = make_sparse()
    batch = make_batch([3, "image", 5])
    expected = generate(model, batch).sequences
    model.save_pretrained(tmp_path)
    mapped = type(model).from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(generate(mapped, batch).sequences, expected)
    assert {parameter.device.type for parameter in mapped.parameters()} == {"cpu"}


def test_streaming(make_sparse, make_batch, word_processor):
    model = make_sparse()
    batch = make_batch([3, "image", 5])
    streamer = TextIteratorStreamer(word_processor.tokenizer, skip_prompt=True)
    thread = threading.Thread(target=generate, args=(model, batch), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = generate(model, batch).sequences[0, batch["input_ids"].shape[1] :]
    assert text.split() == word_processor.tokenizer.decode(expected).split()


def test_pipeline_with_chat_template(make_sparse, word_processor):
    model = make_sparse()
    pipe = pipeline("image-text-to-text", model=model, processor=word_processor)
    content = [{"type": "image", "image": Image.new("RGB", (16, 16), "red")}, {"type": "text", "text": "w5 w6"}]
    out = pipe(text=[{"role": "user", "content": content}], max_new_tokens=5, return_full_text=False)
    assert len(out[0]["generated_text"].split()) == 5
    assert len(model.last_sparsity.image_index[0][0]) == int(TOKENS * 0.3)


def test_two_images_of_different_size(make_sparse):
    model = make_sparse()
    features = [torch.randn(10, 32), torch.randn(5, 32)]
    ids = torch.tensor([[1, *[IMAGE] * 10, 7, *[IMAGE] * 5, 8, 9]])
    out = model(input_ids=ids, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)})
    assert [len(index) for index in out.sparsity.image_index[0]] == [3, 1]
    assert out.logits.shape[1] == 4 + 4


class TestRefused:
    """With sparsity on one sentence before any compute; with sparsity off the host's own behaviour."""

    CASES = {
        "static": ({"cache_implementation": "static"}, "`cache_implementation`.*'static'"),
        "offloaded": ({"cache_implementation": "offloaded"}, "`cache_implementation`.*'offloaded'"),
        "quantized": ({"cache_implementation": "quantized"}, "`cache_implementation`.*'quantized'"),
        "paged": ({"cache_implementation": "paged"}, "`cache_implementation`.*'paged'"),
        "chunked": ({"prefill_chunk_size": 4}, "`prefill_chunk_size`.*got 4"),
        "foreign": ({"past_key_values": DynamicCache()}, "`past_key_values`.*DynamicCache"),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_on(self, make_sparse, make_batch, case):
        model = make_sparse()
        settings, message = self.CASES[case]
        ran = []
        model.model.vision_tower.register_forward_pre_hook(lambda *args: ran.append(1))
        with pytest.raises(ValueError, match=message):
            generate(model, make_batch([3, "image", 5]), **settings)
        assert not ran, "refused before any compute"
        if case in ("static", "chunked"):
            for name, value in settings.items():
                setattr(model.generation_config, name, value)
            with pytest.raises(ValueError, match=message):
                generate(model, make_batch([3, "image", 5]))
            model.config.vision_keep_rate, model.config.use_output_text_predictor = 1, False  # the remedy
            generate(model, make_batch([3, "image", 5]))

    @pytest.mark.parametrize("case", ["static", "chunked", "foreign"])
    def test_off(self, make_sparse, make_llava, make_batch, case):
        model = make_sparse(vision_keep_rate=1, use_output_text_predictor=False)
        settings, _ = self.CASES[case]
        batch = make_batch([3, "image", 5])
        expected = generate(make_llava(), batch)
        if case == "foreign":
            settings = {"past_key_values": StaticCache(config=model.config.text_config, max_cache_len=64)}
        got = generate(model, batch, **settings)
        assert torch.equal(got.sequences, expected.sequences)

    def test_continuous_batching(self, make_sparse):
        with pytest.raises(ValueError, match=r"continuous batching.*use `generate`.* in `model.config`"):
            make_sparse().generate_batch(inputs=[[1, 2, 3]])
        with pytest.raises(ValueError, match=r"`init_continuous_batching`.*use `generate`"):
            make_sparse().init_continuous_batching()

    def test_cache_in_forward(self, make_sparse, make_batch):
        with pytest.raises(ValueError, match=r"`past_key_values` must be a SparseCache.*got DynamicCache"):
            make_sparse()(**make_batch([4]), past_key_values=DynamicCache())


def test_no_position_ids_with_gaps_reach_the_attention(make_sparse, make_batch):
    """Flash attention would take them for several packed sequences."""
    seen = []

    def probe(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, kwargs.get("position_ids")))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("probe", probe)
    AttentionMaskInterface.register("probe", sdpa_mask)
    model = make_sparse("llama", "eager")
    model.model.language_model.config._attn_implementation = "probe"
    with torch.no_grad():
        output = model(**make_batch([3, "image", 5]))
    assert (output.sparsity.kept_positions.diff() > 1).any(), "positions have gaps"
    assert {layer for layer, _ in seen} == {0, 1, 2, 3}
    assert not any(_is_packed_sequence(positions, 1) for _, positions in seen)


def test_sliding_window_up_to_its_length(make_sparse, make_batch):
    model = make_sparse("mistral", sliding_window=30)
    batch = make_batch([3, "image", 2])
    length = batch["input_ids"].shape[1]
    fits = generate(model, batch, max_new_tokens=30 - length + 1)
    wide = generate(make_sparse("mistral"), batch, max_new_tokens=30 - length + 1)
    assert torch.equal(fits.sequences, wide.sequences)
    with pytest.raises(ValueError, match=r"sliding window of the language model \(30 tokens\).*got 31 tokens"):
        generate(model, batch, max_new_tokens=30 - length + 2)
