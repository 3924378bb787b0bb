"""The training forward pass: losses, answer spans, gradients, loss scaling, evaluation with labels."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from hf_efficient.dynamic_llava import decoder_dynamic_llava as decoder
from hf_efficient.dynamic_llava.sparsity_dynamic_llava import find_answers, gumbel_temperature, sample_mask

from .conftest import BACKBONES, IMAGE, TOKENS
from .test_masked_attention import naive


PREDICTORS = ("image_score_predictor", "output_text_score_predictor")


def stack(examples):
    """Rows of different length, padded on the right; labels of padding are -100."""
    longest = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    batch = {
        name: torch.stack([F.pad(e[name], (0, longest - len(e[name])), value=value) for e in examples])
        for name, value in fill.items()
    }
    pixels = [example["pixel_values"] for example in examples if "pixel_values" in example]
    if pixels:
        batch["pixel_values"] = torch.stack(pixels)
    return batch


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def noiseless(logits, tau=1.0, hard=False, **kwargs):
    soft = (logits / tau).softmax(dim=-1)
    chosen = F.one_hot(soft.argmax(dim=-1), soft.shape[-1]).to(soft.dtype)
    return chosen - soft.detach() + soft if hard else soft


@pytest.fixture
def no_noise(monkeypatch):
    """Decisions without Gumbel noise, so that they do not depend on how a batch is cut."""
    monkeypatch.setattr(F, "gumbel_softmax", noiseless)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradients_equal_those_of_a_written_out_softmax(make_trainable, make_examples, monkeypatch, backbone):
    model = make_trainable(backbone, opinions=True).train()
    batch = stack([*make_examples(2), *make_examples(1, answer=11, image=False), *make_examples(1, answer=2)])
    torch.manual_seed(1)
    outputs = model(**batch)
    outputs.loss.backward()
    ours = gradients(model)
    dropped = [len(index) < TOKENS for row in outputs.sparsity.image_index for index in row]
    assert all(dropped)
    assert any((~row).any() for row in outputs.sparsity.text_keep)
    model.zero_grad()
    monkeypatch.setattr(decoder, "masked_attention", naive)
    torch.manual_seed(1)
    expected = model(**batch)
    expected.loss.backward()
    torch.testing.assert_close(outputs.loss, expected.loss)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("weight", [0.0, 100.0])
def test_gradients_reach_all_that_learns_and_nothing_frozen(make_trainable, make_examples, weight):
    model = make_trainable(opinions=True, mask_loss_weight=weight).train()
    model.model.vision_tower.requires_grad_(False)
    model(**stack(make_examples(4))).loss.backward()
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().sum() > 0, name


def test_predictors_alone_learn_on_a_frozen_base_with_activation_checkpointing(make_trainable, make_examples):
    model = make_trainable(opinions=True).train().requires_grad_(False)
    for name in PREDICTORS:
        getattr(model.model, name).requires_grad_(True)
    model.activation_checkpointing_enable()
    model(**stack(make_examples(4))).loss.backward()
    reached = gradients(model)
    assert {name.split(".")[1] for name in reached} == set(PREDICTORS)
    assert all(gradient.abs().sum() > 0 for gradient in reached.values())


def test_the_loss_is_the_paper_s(make_trainable, make_examples):
    model = make_trainable(opinions=True, output_text_keep_rate=0.6).train()
    examples = [*make_examples(2), *make_examples(1, answer=9), *make_examples(1, answer=3)]
    batch = stack(examples)
    outputs = model(**batch)
    images = torch.tensor([len(row[0]) / TOKENS for row in outputs.sparsity.image_index])
    texts = torch.tensor([row.float().mean() for row in outputs.sparsity.text_keep])
    assert [len(row) for row in outputs.sparsity.text_keep] == [6, 6, 9, 3]
    assert texts[3] == 1, "an answer below output_text_min_length keeps all"
    assert (texts[:3] < 1).any()
    assert (images < 1).all()
    vision = ((images - 0.3) ** 2).mean()
    text = ((texts[:3] - 0.6) ** 2).sum() / 4  # the short answer counts in the mean with 0
    language = F.cross_entropy(outputs.logits[:, :-1].reshape(-1, 128), batch["labels"][:, 1:].reshape(-1))
    torch.testing.assert_close(outputs.keep_rate_losses["vision"], vision)
    torch.testing.assert_close(outputs.keep_rate_losses["text"], text)
    torch.testing.assert_close(outputs.language_loss, language.detach())
    torch.testing.assert_close(outputs.loss, language + 100 * (vision + text))
    torch.testing.assert_close(outputs.sparsity.vision_keep_rate, images.mean().item())
    assert set(outputs.sparsity.losses) == {"language", "vision", "text"}


def test_a_token_budget_is_the_target_of_its_share(make_trainable, make_examples):
    model = make_trainable(opinions=True, vision_keep_tokens=4).train()
    outputs = model(**stack(make_examples(3)))
    shares = torch.tensor([len(row[0]) / TOKENS for row in outputs.sparsity.image_index])
    torch.testing.assert_close(outputs.keep_rate_losses["vision"], ((shares - 4 / TOKENS) ** 2).mean())


class TestShortAndEmptyAnswers:
    def test_short_answers_add_zero_to_the_text_loss(self, make_trainable, make_examples):
        model = make_trainable(opinions=True, mask_loss_weight=1.0).train()
        outputs = model(**stack(make_examples(3, answer=3)))
        assert outputs.keep_rate_losses["text"] == 0
        assert all(row.all() for row in outputs.sparsity.text_keep)
        outputs.loss.backward()
        for parameter in model.model.output_text_score_predictor.parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), "a zero, not None: DDP waits for it"

    @pytest.mark.parametrize("answers", [(0, 0), (0, 6)])
    @pytest.mark.parametrize("items", [None, 12])
    def test_empty_answers_are_never_nan(self, make_trainable, make_examples, answers, items):
        model = make_trainable(opinions=True).train()
        batch = stack([example for answer in answers for example in make_examples(1, answer=answer)])
        outputs = model(**batch, num_items_in_batch=items)
        outputs.loss.backward()
        assert outputs.loss.isfinite()
        assert all(value.isfinite() for value in outputs.sparsity.losses.values())
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())
        if answers == (0, 0):
            assert outputs.language_loss == 0
            assert outputs.keep_rate_losses["text"] == 0

    @pytest.mark.parametrize("training", [False, True])
    def test_a_batch_without_any_target_has_no_language_loss(self, make_trainable, make_examples, training):
        model = make_trainable(opinions=True).train(training)
        outputs = model(**stack(make_examples(2, answer=0)), num_items_in_batch=torch.tensor(0))
        assert outputs.loss == 0

    def test_text_only_batches_train(self, make_trainable, make_examples):
        model = make_trainable(opinions=True).train()
        outputs = model(**stack(make_examples(2, image=False)))
        outputs.loss.backward()
        assert outputs.keep_rate_losses["vision"] == 0
        assert outputs.keep_rate_losses["text"] > 0
        for module in (model.model.image_score_predictor, model.model.multi_modal_projector):
            for parameter in module.parameters():
                assert torch.equal(parameter.grad, torch.zeros_like(parameter))

    def test_a_text_only_row_is_left_out_of_the_vision_loss(self, make_trainable, make_examples):
        model = make_trainable(opinions=True).train()
        outputs = model(**stack([*make_examples(1), *make_examples(1, image=False)]))
        (share,) = (len(index) / TOKENS for row in outputs.sparsity.image_index for index in row)
        torch.testing.assert_close(outputs.keep_rate_losses["vision"].item(), (share - 0.3) ** 2)


class TestAnswers:
    @pytest.mark.parametrize(
        ("labels", "attended", "image", "expected"),
        [
            ("..aaaa", "111111", "000000", "001111"),  # plain
            ("..aa.aa", "1111111", "0000000", "0000011"),  # two turns: the earlier answer is prompt
            ("..aaa..", "1111100", "0000000", "0011100"),  # trailing padding with -100 does not end the answer
            ("..aaapp", "1111100", "0000000", "0011100"),  # nor does padding that is labelled
            ("..aaaa", "001111", "000000", None),  # left padding of -100 is no prompt
            ("...aaa", "001111", "000000", "000111"),
            ("..aiia", "111111", "000110", "001001"),  # image tokens are never answer
            ("......", "111111", "000000", "000000"),  # an answer that was cut off
        ],
    )
    def test_span(self, labels, attended, image, expected):
        ids = torch.tensor([[-100 if letter == "." else 7 for letter in labels]])
        flags = [torch.tensor([[letter == "1" for letter in row]]) for row in (attended, image)]
        if expected is None:
            with pytest.raises(ValueError, match=r"got row 0 without any -100 .* mask the prompt with -100"):
                find_answers(ids, *flags)
        else:
            assert find_answers(ids, *flags)[0].tolist() == [letter == "1" for letter in expected]

    def test_wrong_shape(self):
        everything = torch.ones(1, 4, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"got \(1, 3\) for \(1, 4\)"):
            find_answers(torch.zeros(1, 3, dtype=torch.long), everything, ~everything)

    @pytest.mark.parametrize("training", [False, True])
    def test_only_the_last_turn_is_judged(self, make_trainable, make_examples, training):
        model = make_trainable(opinions=True, output_text_min_length=1).train(training)
        batch = stack(make_examples(2, answer=12))
        batch["labels"][:, -5] = -100  # a second question of one token before the last four
        record = model(**batch).sparsity
        assert [len(row) for row in record.text_keep] == [4, 4]
        assert record.kept_positions.shape[1] >= batch["input_ids"].shape[1] - TOKENS - 4, "the first answer stays"

    def test_a_prompt_that_is_not_masked(self, make_trainable, make_examples):
        model = make_trainable().train()
        batch = stack(make_examples(2))
        batch["labels"] = batch["input_ids"].clone()
        with pytest.raises(ValueError, match="mask the prompt with -100"):
            model(**batch)

    def test_padding_changes_nothing(self, make_trainable, make_examples, no_noise):
        model = make_trainable(opinions=True).train()
        batch = stack(make_examples(3))
        expected = model(**batch)
        expected.loss.backward()
        before = {name: gradient.clone() for name, gradient in gradients(model).items()}
        largest = max(gradient.abs().max() for gradient in before.values()).item()
        for pads in ((5, 0), (0, 5)):
            model.zero_grad()
            padded = {
                name: F.pad(value, pads, value=-100 if name == "labels" else 0)
                for name, value in batch.items()
                if name != "pixel_values"
            }
            positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
            outputs = model(**padded, pixel_values=batch["pixel_values"], position_ids=positions)
            outputs.loss.backward()
            torch.testing.assert_close(outputs.loss, expected.loss, atol=1e-5, rtol=0)
            for name, gradient in gradients(model).items():
                torch.testing.assert_close(gradient, before[name], atol=1e-5 * largest, rtol=1e-3)


def test_decisions_are_hard_with_the_soft_gradient():
    logits = torch.randn(400, 2, requires_grad=True)
    mask = sample_mask(logits, 0.7)
    assert set(mask.detach().unique().tolist()) == {0.0, 1.0}
    mask.sum().backward()
    assert (logits.grad[:, 0] > 0).all()
    torch.testing.assert_close(logits.grad[:, 0], -logits.grad[:, 1])
    clear = sample_mask(torch.tensor([[30.0, -30.0], [-30.0, 30.0]]), 0.1)
    assert clear.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("progress", "value"), [(0, 1.0), (0.01, 0.9772372209558107), (0.5, 0.31622776601683794)])
def test_temperature_of_the_authors_schedule(progress, value):
    assert gumbel_temperature(1.0, 0.1, progress) == pytest.approx(value)


def test_a_part_of_a_step_adds_its_share(make_trainable, make_examples, no_noise):
    """Accumulation: `Trainer` sums the losses of the parts, each told the number of targets of the whole step."""
    model = make_trainable(opinions=True).train()
    parts = [stack(make_examples(2, answer=5, seed=1)), stack(make_examples(3, answer=8, seed=2))]
    items = 2 * 5 + 3 * 8
    expected = 0.0
    for part in parts:
        alone = model(**part)
        share = (part["labels"] != -100).sum() / items
        expected += share * (alone.language_loss + 100 * sum(alone.keep_rate_losses.values()))
    losses = []
    for part in parts:
        outputs = model(**part, num_items_in_batch=torch.tensor(items))
        losses.append(outputs.loss)
        torch.testing.assert_close(outputs.sparsity.losses["language"], model(**part).language_loss)
    torch.testing.assert_close(sum(losses), expected)


@pytest.mark.parametrize("peft", [False, True])
def test_activation_checkpointing_changes_no_gradient(make_trainable, make_examples, peft):
    model = make_trainable(opinions=True)
    if peft:
        lora = LoraConfig(
            target_modules=r".*language_model.*(q_proj|k_proj|v_proj|o_proj)", modules_to_save=list(PREDICTORS)
        )
        model = get_peft_model(model, lora)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    model.train()
    batch = stack([*make_examples(2), *make_examples(1, answer=2, image=False)])
    runs = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(**batch).loss
        loss.backward()
        runs.append((loss.detach(), gradients(model)))
    (plain, wanted), (saved, got) = runs
    assert torch.equal(plain, saved)
    assert wanted.keys() == got.keys()
    assert len(wanted) > 20
    for name, gradient in wanted.items():
        assert torch.equal(gradient, got[name]), name


def test_bfloat16_autocast_is_near_full_precision(make_trainable, make_examples, no_noise):
    model = make_trainable(opinions=True).train()
    batch = stack(make_examples(3))
    exact = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**batch)
    assert [row[0].tolist() for row in rough.sparsity.image_index] == [
        row[0].tolist() for row in exact.sparsity.image_index
    ]
    torch.testing.assert_close(rough.language_loss, exact.language_loss, atol=0.05, rtol=0)
    rough.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert all(
        parameter.grad.abs().sum() > 0 for name in PREDICTORS for parameter in getattr(model.model, name).parameters()
    )


def test_a_bfloat16_base_trains_with_exact_predictors(make_trainable, make_examples):
    model = make_trainable(opinions=True).train()
    for module in (
        model.model.language_model,
        model.model.multi_modal_projector,
        model.model.vision_tower,
        model.lm_head,
    ):
        module.to(torch.bfloat16)
    batch = stack(make_examples(2))
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    model(**batch).loss.backward()
    for name in PREDICTORS:
        for parameter in getattr(model.model, name).parameters():
            assert parameter.dtype == torch.float32
            assert parameter.grad.abs().sum() > 0


def test_outputs_of_a_data_parallel_replica_can_be_gathered(make_trainable, make_examples):
    model = make_trainable().train()
    batch = stack(make_examples(2))
    assert model(**batch).sparsity is not None
    model._is_replica = True  # as `nn.DataParallel` marks its copies

    def check(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            return all(map(check, value))
        return value is None or torch.is_tensor(value)

    outputs = model(**batch)
    assert outputs.keep_rate_losses is not None
    assert check(outputs), outputs.keys()


def test_labels_must_reach_a_training_forward(make_trainable, make_examples):
    model = make_trainable().train()
    batch = stack(make_examples(1))
    del batch["labels"]
    with pytest.raises(ValueError, match=r"`labels` must reach the forward pass .* in train\(\) mode, got None"):
        model(**batch)
    model.eval()
    assert model(**batch).loss is None


def test_evaluation_is_the_sparse_model_s_language_loss(make_trainable, make_examples):
    """With labels the logits are those of teacher-forced decoding on a cache, the loss is over all labelled tokens."""
    model = make_trainable(opinions=True, output_text_min_length=20).eval()
    dropped = 0
    for answer in (1, 2, 30):
        batch = stack(make_examples(1, answer=answer))
        batch["input_ids"][0, -answer:] = batch["labels"][0, -answer:] = torch.randint(3, 110, (answer,))
        outputs = model(**batch)
        record = outputs.sparsity
        prompt = batch["input_ids"].shape[1] - answer
        step = model(
            input_ids=batch["input_ids"][:, :prompt],
            pixel_values=batch["pixel_values"],
            use_cache=True,
            logits_to_keep=1,
        )
        logits = [step.logits]
        for token in batch["input_ids"][0, prompt:]:
            step = model(
                input_ids=token[None, None],
                past_key_values=step["cache" if "cache" in step else "past_key_values"],
            )
            logits.append(step.logits)
        forced = torch.cat(logits, dim=1)  # (1, answer + 1, vocabulary)
        torch.testing.assert_close(outputs.logits[:, prompt - 1 :], forced, atol=1e-5, rtol=0)
        targets = batch["input_ids"][0, prompt:]
        torch.testing.assert_close(outputs.loss, F.cross_entropy(forced[0, :-1], targets))
        assert outputs.keep_rate_losses is None
        assert torch.equal(record.text_keep[0], step.sparsity.text_keep[0])
        assert len(record.image_index[0][0]) == int(0.3 * TOKENS)
        dropped += int((~record.text_keep[0]).sum())
    assert 0 < dropped < 33


def test_evaluation_keeps_what_the_predictors_decide_not_noise(make_trainable, make_examples):
    model = make_trainable(opinions=True).eval()
    batch = stack(make_examples(4))
    first, second = model(**batch), model(**batch)
    assert torch.equal(first.logits, second.logits)
    seen = []
    model.model.image_score_predictor.register_forward_hook(lambda module, args, output: seen.append(output))
    record = model(**batch).sparsity
    best = seen[0].log_softmax(-1)[..., 0].topk(4, dim=1).indices.sort(dim=1).values
    assert [row[0].tolist() for row in record.image_index] == best.tolist()


def test_the_losses_fall_and_the_rates_reach_their_targets(make_trainable, make_examples):
    model = make_trainable(vision_keep_rate=0.25, output_text_keep_rate=0.5, mask_loss_weight=10.0).train()
    model.model.vision_tower.requires_grad_(False)
    batch = stack(make_examples(6, answer=8))
    assert (batch["input_ids"] == IMAGE).sum(dim=1).tolist() == [TOKENS] * 6
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    history = []
    for step in range(40):
        model.model.gumbel_temperature = gumbel_temperature(1.0, 0.1, step / 40)
        outputs = model(**batch)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        history.append({**outputs.sparsity.losses, "rate": outputs.sparsity.vision_keep_rate})
    last = {name: sum(float(step[name]) for step in history[-5:]) / 5 for name in history[0]}
    assert last["language"] < 0.3 * history[0]["language"]
    assert last["vision"] < 0.3 * history[0]["vision"]
    assert last["text"] < 0.05
    assert abs(last["rate"] - 0.25) < 0.08
