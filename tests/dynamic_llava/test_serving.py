"""What a server does with a sparse LLaVA: chats in batches, threads, offload, prefix caches, beams, assistants."""

import threading

import pytest
import torch
from accelerate import cpu_offload
from transformers import StoppingCriteria, StoppingCriteriaList

from hf_efficient import SparseCache
from hf_efficient.dynamic_llava.decoder_dynamic_llava import CACHE

from .conftest import TOKENS


KEEP_ALL = {"vision_keep_rate": 1.0, "output_text_threshold": 0.0}  # the sparse code runs and drops nothing


def generate(model, batch, **kwargs):
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**batch, **{**settings, **kwargs})


def row_of(batch, row):
    """One row of a left-padded batch, alone."""
    attended = batch["attention_mask"][row].bool()
    ids = batch["input_ids"][row : row + 1, attended]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": batch["pixel_values"][[row]]}


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("cut", [4, 7])
def test_a_mask_hides_cached_tokens_from_the_sparse_layers_too(make_llava, make_sparse, new, cut):
    found = []
    first, then = torch.arange(5, 25).view(2, 10), torch.arange(30, 30 + 2 * new).view(2, new)
    mask = torch.ones(2, 10 + new, dtype=torch.long)
    mask[0, cut:8] = 0
    for model, settings in ((make_llava(), {}), (make_sparse(), KEEP_ALL)):
        with torch.no_grad():
            cache = model(input_ids=first, use_cache=True, **settings).past_key_values
            output = model(input_ids=then, attention_mask=mask, **{CACHE: cache}, **settings)
        found.append(output.logits[:, -1])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)


def test_a_hidden_token_is_gone_whether_it_was_kept_or_dropped(make_sparse):
    """Masking a token later is as if it had been dropped: rows of unlike length, real rates."""
    model = make_sparse()
    ids = torch.randint(3, 110, (2, 9), generator=torch.Generator().manual_seed(1))
    cache = SparseCache(model.config)
    cache.prompt_length = 4  # the rest is judged
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    kept = cache._kept[:, : cache._columns]
    assert not kept.all()
    hidden = int(kept[0].nonzero()[-1])
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, hidden] = 0
    seen = cache.visible_slots(mask[:, :9])
    slot = int(kept[0, :hidden].sum())
    expected = torch.ones_like(seen)
    expected[0, slot] = False
    assert torch.equal(seen, expected)
    assert cache.visible_slots(torch.ones(2, 9)) is None
    mask[0, hidden], dropped = 1, int((~kept).nonzero()[0, 1])
    mask[int((~kept).nonzero()[0, 0]), dropped] = 0
    assert cache.visible_slots(mask[:, :9]) is None


def end_of(model, batch, row):
    """A token that this row generates before any other."""
    width = batch["input_ids"].shape[1]
    sequences = generate(model, batch).sequences[:, width:]
    others = set(sequences[[other for other in range(len(sequences)) if other != row]].flatten().tolist())
    return next(int(token) for token in sequences[row, 1:] if int(token) not in others)


def test_rows_that_have_ended_are_as_alone_and_a_second_turn_is_too(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5], ["image", 3])
    width = batch["input_ids"].shape[1]
    end = end_of(model, batch, 0)
    together = generate(model, batch, eos_token_id=end)
    record, cache = model.last_sparsity, together.past_key_values
    assert cache.end_tokens is None
    answers = [len(decisions) for decisions in record.text_keep]
    assert answers[0] < answers[1]
    kept = [int((row >= 0).sum()) for row in record.kept_positions]
    for row in range(2):
        alone = generate(model, row_of(batch, row), eos_token_id=end)
        assert torch.equal(model.last_sparsity.text_keep[0], record.text_keep[row])
        # the end itself was fed in the batch alone
        assert model.last_sparsity.layer_tokens[-1] == kept[row] - (row == 0)
        # second turn: the pads behind the end are masked, as a tokenizer would have it
        question = torch.tensor([[5, 6, 7]])
        ids = torch.cat([together.sequences, question.expand(2, -1)], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, width:])], dim=1)
        mask[0, width + answers[0] + 1 : together.sequences.shape[1]] = 0
        positions = mask.cumsum(dim=1) - 1
        if row == 0:
            second = generate(
                model,
                {"input_ids": ids, "attention_mask": mask, "position_ids": positions.clamp(min=0)},
                past_key_values=cache,
                max_new_tokens=3,
            )
        follow = {"input_ids": torch.cat([alone.sequences, question], dim=1)}
        single = generate(model, follow, past_key_values=alone.past_key_values, max_new_tokens=3)
        torch.testing.assert_close(second.logits[0][row], single.logits[0][0], atol=1e-4, rtol=0)


def test_offloaded_predictors(make_sparse, make_batch):
    model, batch = make_sparse(), make_batch([3, "image", 5])
    expected = generate(model, batch).sequences
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.image_score_predictor.down_mlp[0].weight.is_meta
    assert torch.equal(generate(model, batch).sequences, expected)


class Wait(StoppingCriteria):
    """Stops a request in its third step until the other one has come as far."""

    def __init__(self, reached, go):
        self.reached, self.go, self.steps = reached, go, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.steps += 1
        if self.steps == 3:
            self.reached.set()
            assert self.go.wait(20)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_requests_in_threads_do_not_mix(make_sparse, make_batch):
    model = make_sparse()
    batches = {"a": make_batch([3, "image", 5]), "b": make_batch([9])}
    expected = {name: generate(model, batch) for name, batch in batches.items()}
    events = {name: (threading.Event(), threading.Event()) for name in batches}
    outputs = {}

    def request(name):
        criteria = StoppingCriteriaList([Wait(*events[name])])
        outputs[name] = generate(model, batches[name], stopping_criteria=criteria)

    threads = {name: threading.Thread(target=request, args=(name,)) for name in batches}
    threads["a"].start()
    assert events["a"][0].wait(20)
    threads["b"].start()
    assert events["b"][0].wait(20)
    for name in batches:
        events[name][1].set()
        threads[name].join()
    for name, output in outputs.items():
        cache, other = output.past_key_values, expected[name].past_key_values
        assert torch.equal(output.sequences, expected[name].sequences)
        assert cache.prompt_length is None
        assert repr(cache.sparsity) == repr(other.sparsity)


def test_after_beams_the_record_is_of_the_prompt(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5], ["image", 3])
    with torch.no_grad():
        positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        prompt = model(**batch, position_ids=positions).sparsity
    generate(model, batch, num_beams=3, num_return_sequences=2)
    record = model.last_sparsity
    assert [len(row) for row in record.text_keep] == [0] * 4
    assert record.text_keep_rate is None
    for row in range(4):
        assert torch.equal(record.image_index[row][0], prompt.image_index[row // 2][0])
        assert torch.equal(record.kept_positions[row], prompt.kept_positions[row // 2])
    assert record.layer_tokens == prompt.layer_tokens


@pytest.mark.parametrize("target", ["dense", "sparse"])
def test_a_sparse_model_assists_on_a_prompt_with_an_image(make_llava, make_sparse, make_batch, target):
    model, batch = (make_llava() if target == "dense" else make_sparse()), make_batch([3, "image", 5])
    expected = generate(model, batch).sequences
    assert torch.equal(generate(model, batch, assistant_model=make_sparse()).sequences, expected)


def test_a_cache_of_inference_mode_goes_on_outside_of_it(make_sparse, make_batch):
    model, batch = make_sparse(), make_batch([3, "image", 5])
    follow = []
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            first = generate(model, batch, max_new_tokens=5)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
        follow.append(generate(model, {"input_ids": ids}, past_key_values=first.past_key_values).sequences)
    assert torch.equal(*follow)


def test_a_cache_of_another_sparse_layer_is_refused(make_sparse, make_batch):
    model = make_sparse()
    first = generate(model, make_batch([3, "image", 5]), max_new_tokens=5)
    model.config.sparse_layer = 3
    with pytest.raises(ValueError, match="must be of the model's `sparse_layer` 3, got a cache of 2"):
        generate(model, {"input_ids": first.sequences}, past_key_values=first.past_key_values, max_new_tokens=2)


def test_crop_forgets_images(make_sparse, make_batch):
    model = make_sparse()
    batch = make_batch([3, "image", 5])
    cache = SparseCache(model.config)
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        cache.crop(-5)
        assert [len(row) for row in cache.sparsity.image_index] == [1], "the image stays"
        cache.crop(-1)
        assert cache.sparsity.image_index == cache.sparsity.image_sizes == [[]]
        cache.crop(-cache.get_seq_length())
        model(**batch, past_key_values=cache)
    assert cache.sparsity.image_sizes == [[TOKENS]]
