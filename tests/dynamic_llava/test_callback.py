"""`DynamicLlavaCallback`: a stock `Trainer` trains a sparse LLaVA."""

import json

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_efficient import DynamicLlavaCallback
from hf_efficient.dynamic_llava.callback_dynamic_llava import find_sparse_model

from .conftest import llava_config


VALUES = {"language_loss", "vision_loss", "text_loss", "vision_keep_rate", "text_keep_rate", "gumbel_temperature"}


class Tracker(TrainerCallback):
    """Sees what an experiment tracker would see."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


class Spy(TrainerCallback):
    """Temperature of every step, and the batches that the model saw."""

    def __init__(self, model):
        self.model, self.temperatures, self.batches = model, [], []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: self.batches.append(kwargs["input_ids"]), with_kwargs=True
        )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.temperatures.append(find_sparse_model(self.model).gumbel_temperature)


@pytest.fixture
def arguments(tmp_path):
    def make(**settings):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return TrainingArguments(**{**defaults, **settings})

    return make


def test_a_stock_trainer_trains_and_logs(make_trainable, make_examples, arguments, tmp_path, capsys):
    model = make_trainable(opinions=True, gumbel_end_temperature=0.25)
    model.model.vision_tower.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    spy = Spy(model)
    args = arguments(save_strategy="steps", save_steps=4, gradient_accumulation_steps=2)
    trainer = Trainer(model, args, train_dataset=make_examples(), callbacks=[DynamicLlavaCallback(), spy])
    trainer.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("vision_tower" in name), name
    assert spy.temperatures == pytest.approx([0.25 ** (step / 4) for step in range(4)])
    assert len(spy.batches) == 8

    history = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history] == [2, 4]
    for entry in history:
        assert entry.keys() >= VALUES
        extra = 100 * (entry["vision_loss"] + entry["text_loss"])
        assert entry["loss"] == pytest.approx(entry["language_loss"] + extra, rel=1e-3)
        assert 0 < entry["vision_keep_rate"] < 1
        assert 0 < entry["text_keep_rate"] < 1
    assert [entry["gumbel_temperature"] for entry in history] == pytest.approx([0.25**0.25, 0.25**0.75], abs=1e-5)
    assert "vision_keep_rate" in capsys.readouterr().out, "the console shows them"


def test_trackers_see_the_values_when_the_callback_comes_first(make_trainable, make_examples, arguments):
    for first in (True, False):
        tracker = Tracker()
        trainer = Trainer(
            make_trainable(), arguments(), train_dataset=make_examples(), callbacks=[tracker, DynamicLlavaCallback()]
        )
        if first:
            callback = DynamicLlavaCallback.install(trainer)
            assert trainer.callback_handler.callbacks[0] is callback
            assert sum(isinstance(c, DynamicLlavaCallback) for c in trainer.callback_handler.callbacks) == 1
        trainer.train()
        steps = [logs for logs in tracker.logs if "loss" in logs]
        assert len(steps) == 2
        for logs in steps:
            assert (logs.keys() >= VALUES) == first


def test_install_adds_a_missing_callback(make_trainable, make_examples, arguments):
    trainer = Trainer(make_trainable(), arguments(max_steps=1, logging_steps=1), train_dataset=make_examples())
    DynamicLlavaCallback.install(trainer)
    trainer.train()
    assert trainer.state.log_history[0].keys() >= VALUES


@pytest.mark.slow
def test_users_own_logs_are_left_alone(make_trainable, make_examples, arguments):
    class Chatty(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.log({"loss": 1.0})

    trainer = Trainer(
        make_trainable(), arguments(), train_dataset=make_examples(), callbacks=[DynamicLlavaCallback(), Chatty()]
    )
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        assert (entry.keys() >= VALUES) == ("learning_rate" in entry)


def test_evaluation_during_training_takes_no_noise_and_leaves_no_trace(make_trainable, make_examples, arguments):
    model = make_trainable(opinions=True)
    args = arguments(eval_strategy="steps", eval_steps=2, learning_rate=0.0, per_device_eval_batch_size=3)
    examples = make_examples(6)
    trainer = Trainer(
        model, args, train_dataset=make_examples(), eval_dataset=examples, callbacks=[DynamicLlavaCallback()]
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert losses[0] == losses[1], "nothing was learned, so nothing changes"
    assert losses[0] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    model.eval()
    with torch.no_grad():
        alone = [model(**{name: value[None] for name, value in e.items()}).loss.item() for e in examples]
    assert losses[0] == pytest.approx(sum(alone) / 6, abs=1e-5)


def test_resume_with_the_stock_trainer_lands_in_the_same_state(make_trainable, make_examples, arguments, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    def run(folder, resume=None, callbacks=()):
        model = make_trainable()
        spy = Spy(model)
        args = arguments(output_dir=str(tmp_path / folder), max_steps=5, save_strategy="steps", save_steps=3)
        trainer = Trainer(
            model, args, train_dataset=make_examples(), callbacks=[DynamicLlavaCallback(), spy, *callbacks]
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, spy

    whole, seen = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", callbacks=[Stop()])
    resumed, again = run("stopped", resume=True)
    assert resumed.state.global_step == 5
    assert len(again.batches) == 2
    for one, other in zip(seen.batches[3:], again.batches):
        assert torch.equal(one, other)
    assert again.temperatures == seen.temperatures[3:]
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(one, other), name


class TestRefuses:
    def run(self, model, args, examples):
        Trainer(model, args, train_dataset=examples, callbacks=[DynamicLlavaCallback()]).train()

    def test_a_dense_model(self, make_llava, make_examples, arguments):
        with pytest.raises(ValueError, match=r"`model` must hold a DynamicLlava.* got LlavaForConditionalGeneration"):
            self.run(make_llava(), arguments(), make_examples())

    @pytest.mark.parametrize("name", ["image_score_predictor", "output_text_score_predictor"])
    def test_a_frozen_predictor(self, make_trainable, make_examples, arguments, name):
        model = make_trainable()
        getattr(model.model, name).requires_grad_(False)
        with pytest.raises(ValueError, match=rf"`{name}` must be trainable, got frozen weights"):
            self.run(model, arguments(), make_examples())

    def test_a_frozen_predictor_that_is_off_is_fine(self, make_trainable, make_examples, arguments):
        model = make_trainable(use_output_text_predictor=False)
        model.model.output_text_score_predictor.requires_grad_(False)
        self.run(model, arguments(max_steps=1), make_examples())

    @pytest.mark.parametrize("off", [{"vision_keep_rate": 1.0}, {"use_vision_predictor": False}])
    def test_sparsity_that_is_off(self, make_trainable, make_examples, arguments, off):
        model = make_trainable(use_output_text_predictor=False, **off)
        with pytest.raises(ValueError, match=r"to train a sparse LLaVA, got a keep rate of .* and no text predictor"):
            self.run(model, arguments(), make_examples())

    def test_label_smoothing(self, make_trainable, make_examples, arguments):
        with pytest.raises(ValueError, match=r"`label_smoothing_factor` must be 0 .* got 0.1"):
            self.run(make_trainable(), arguments(label_smoothing_factor=0.1), make_examples())

    def test_a_loss_function_that_takes_the_labels(self, make_trainable, make_examples, arguments):
        trainer = Trainer(
            make_trainable(),
            arguments(),
            train_dataset=make_examples(),
            callbacks=[DynamicLlavaCallback()],
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum(),
        )
        with pytest.raises(ValueError, match=r"`labels` must reach the forward pass .*no `compute_loss_func`"):
            trainer.train()

    def test_something_else_than_a_module(self):
        with pytest.raises(ValueError, match=r"`model` must hold a DynamicLlava.* got NoneType"):
            find_sparse_model(None)


def test_finds_the_inner_model_of_a_config(make_trainable):
    model = make_trainable()
    assert find_sparse_model(model) is model.model
    assert find_sparse_model(torch.nn.Sequential(model)) is model.model
    assert llava_config().model_type == "llava"
