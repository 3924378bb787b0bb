"""Forward passes that ToE leaves alone although they train: they are noticed, and evaluation is not taken for them."""

import logging

import pytest
import torch
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainerCallback,
    ViTForImageClassification,
)

from hf_efficient import ToECallback, token_expansion


def warnings_in(caplog, words):
    return [record for record in caplog.records if record.levelno == logging.WARNING and words in record.message]


def in_evaluation_mode(caplog):
    return warnings_in(caplog, "is in evaluation mode")


@pytest.mark.parametrize("case", ["all", "tower", "frozen tower", "all, tower frozen"])
def test_a_tower_in_evaluation_mode_is_noticed_once(case, make_vit, images, caplog, rows_seen):
    model = make_vit().train()
    if "frozen" in case:
        model.vit.requires_grad_(False)
    (model if case.startswith("all") else model.vit).eval()
    batch = {"pixel_values": images.images[:2], "labels": images.labels[:2]}
    with token_expansion(model) as expansion:
        with torch.no_grad():
            model(**batch)
        assert not in_evaluation_mode(caplog)
        for step in range(3):
            expansion.set_progress(step / 3)
            model(**batch).loss.backward()
            with torch.no_grad():
                model(**batch)
            assert len(in_evaluation_mode(caplog)) == 1
    assert "ViTForImageClassification" in caplog.text
    assert "`.train()`" in caplog.text


def test_evaluation_is_not_taken_for_a_training_step(make_vit, images, caplog):
    model = make_vit()
    with token_expansion(model) as expansion:
        for step in range(2):
            expansion.set_progress(step / 2)
            model.train()(images.images[:2], labels=images.labels[:2]).loss.backward()
            model.eval()
            with torch.no_grad():
                model(images.images)
            with torch.inference_mode():
                model(images.images)
            model(images.images)  # without `no_grad`: no gradient comes
            model.train().vit.eval()
            model.vit(images.images)
    model.eval()(images.images[:2], labels=images.labels[:2]).loss.backward()  # after the training
    assert not in_evaluation_mode(caplog)
    model.vit.requires_grad_(False)
    with token_expansion(model):
        model(images.images)  # of a frozen tower no gradient can tell: the warning must be true of both
    (record,) = in_evaluation_mode(caplog)
    assert "ran with gradients on all tokens" in record.message
    assert "trains" not in record.message


class FrozenBackboneForImageClassification(ViTForImageClassification):
    """Keeps its tower in evaluation mode, whatever the trainer says."""

    def train(self, mode=True):
        super().train(mode)
        self.vit.eval()
        return self


@pytest.mark.parametrize("frozen", [False, True])
def test_trainer_notices_a_tower_in_evaluation_mode(frozen, make_vit, make_trainer, caplog):
    host = make_vit()
    model = FrozenBackboneForImageClassification(host.config) if frozen else host.eval()
    make_trainer(model, [ToECallback()], max_steps=3, eval_strategy="steps", eval_steps=1).train()
    assert len(in_evaluation_mode(caplog)) == frozen


def timm_vit():
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=2, model_args=sizes)
    return TimmWrapperForImageClassification(config)


class Twice(Trainer):
    """A second pass over the batch, as R-Drop has it."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs) + super().compute_loss(model, inputs)


class LabelsFirst(Trainer):
    """A pass without gradients before that of the step, for pseudo-labels; in training mode unless told otherwise."""

    evaluating = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        model.train(not self.evaluating)
        with torch.no_grad():
            model(inputs["pixel_values"])
        model.train()
        return super().compute_loss(model, inputs)


class LabelsInEvaluationMode(LabelsFirst):
    """The remedy."""

    evaluating = True


class MeasuresAfterwards(Trainer):
    """A pass in training mode behind that of the step, from which nothing is learned."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs)
        with torch.no_grad():
            model(inputs["pixel_values"])
        return loss


@pytest.mark.parametrize(
    ("trainer_class", "rows_in_stage_1", "noticed"),
    [
        (Twice, [33, 65], 1),
        (LabelsFirst, [33, 65], 1),
        (LabelsInEvaluationMode, [33], 0),
        (MeasuresAfterwards, [33, 65], 0),
    ],
)
def test_a_second_pass_in_a_step_is_noticed(
    trainer_class, rows_in_stage_1, noticed, make_vit, make_trainer, caplog, rows_seen
):
    model = make_vit()
    rows, _ = rows_seen(model.vit.layers[1])
    callback = ToECallback(stage_starts=(0.0,), keep_rates=(0.5,))
    trainer = make_trainer(
        model,
        [callback],
        trainer_class=trainer_class,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert rows == rows_in_stage_1 * 8
    assert len(warnings_in(caplog, "shortens only the first forward pass")) == noticed


@pytest.mark.parametrize("training", [False, True])
def test_passes_between_the_steps_are_none_of_a_step(training, make_vit, make_trainer, images, caplog):
    """A callback may look at the model in either mode, with gradients, as for a picture of what it looks at."""

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.train(training)
            model(images.images[:2], labels=images.labels[:2]).loss.backward()
            model.zero_grad()

    make_trainer(make_vit(), [ToECallback(), Looks()], max_steps=3).train()
    assert not caplog.records


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("host", ["vit", "timm"])
def test_recomputation_is_not_a_second_pass(host, reentrant, make_vit, make_trainer, monkeypatch, caplog):
    """Also where blocks run without gradients first and with them in the backward pass."""
    if host == "timm":
        monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", reentrant)
    trainer = make_trainer(
        make_vit() if host == "vit" else timm_vit(),
        [ToECallback()],
        max_steps=3,
        activation_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["toe_kept_tokens"] for entry in logs] == [32, 48, 64]
    assert not caplog.records


@pytest.mark.parametrize("told", [False, True])
def test_a_loop_that_never_tells_its_progress_is_noticed(told, make_vit, images, caplog):
    model = make_vit().train()
    with token_expansion(model):
        pass  # nothing was trained
    with token_expansion(model) as expansion:
        for _ in range(2):
            if told:
                expansion.set_progress(0)
            model(images.images[:2], labels=images.labels[:2]).loss.backward()
    assert len(warnings_in(caplog, "call `set_progress` before each step")) == (0 if told else 1)
