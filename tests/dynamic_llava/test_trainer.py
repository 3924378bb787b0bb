"""`DynamicLlavaTrainer`: what learns and how fast, loss scaling, whole checkpoints, resume, metrics."""

import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_efficient import (
    DynamicLlavaCallback,
    DynamicLlavaForConditionalGeneration,
    DynamicLlavaTrainer,
    DynamicLlavaTrainingArguments,
)

from .test_callback import VALUES, Spy, Tracker
from .test_training import PREDICTORS, noiseless, stack


QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}


@pytest.fixture
def arguments(tmp_path):
    def make(**settings):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
        }
        return DynamicLlavaTrainingArguments(**{**defaults, **QUIET, **settings})

    return make


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class TestWhatLearns:
    @pytest.mark.parametrize(
        ("settings", "parts"),
        [
            ({}, {"language_model", "multi_modal_projector", "lm_head", *PREDICTORS}),
            ({"trainable": "predictors"}, set(PREDICTORS)),
            (
                {"freeze_vision_tower": False},
                {"language_model", "multi_modal_projector", "lm_head", "vision_tower", *PREDICTORS},
            ),
        ],
    )
    def test_parts(self, make_trainable, make_examples, arguments, settings, parts):
        model = make_trainable(has_instruct_predictor=True)
        before = weights(model)
        args = arguments(max_steps=1, predictor_learning_rate=1e-3, **settings)
        DynamicLlavaTrainer(model, args, train_dataset=make_examples()).train()
        changed = {
            name.removeprefix("model.").split(".")[0]
            for name, value in weights(model).items()
            if not torch.equal(value, before[name])
        }
        assert changed == parts

    def test_groups(self, make_trainable, make_examples, arguments):
        """Four groups: norm weights and biases of both halves without decay, predictors at their own rate."""
        for base_decay in (0.0, 0.1):
            args = arguments(weight_decay=base_decay, predictor_learning_rate=0.02, predictor_weight_decay=0.3)
            trainer = DynamicLlavaTrainer(make_trainable(), args, train_dataset=make_examples())
            trainer.create_optimizer()
            names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
            seen = []
            for group in trainer.optimizer.param_groups:
                for parameter in group["params"]:
                    name = names[id(parameter)]
                    own, plain = "predictor" in name, parameter.dim() == 1
                    assert group["lr"] == (0.02 if own else 1e-3), name
                    assert group["weight_decay"] == (0.0 if plain else 0.3 if own else base_decay), name
                    seen.append(name)
            trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
            assert sorted(seen) == sorted(trained), "each trained weight once"
            assert not any("vision_tower" in name for name in seen)
            assert len(trainer.optimizer.param_groups) == 4

    @pytest.mark.slow
    def test_both_rates_follow_the_schedule(self, make_trainable, make_examples, arguments):
        args = arguments(max_steps=4, lr_scheduler_type="linear", predictor_learning_rate=0.01)
        trainer = DynamicLlavaTrainer(make_trainable(), args, train_dataset=make_examples())
        rates = []

        class Rates(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                rates.append(sorted({group["lr"] for group in trainer.optimizer.param_groups}))

        trainer.add_callback(Rates())
        trainer.train()
        assert rates == [pytest.approx([1e-3 * part, 1e-2 * part]) for part in (1, 0.75, 0.5, 0.25)]

    def test_plain_arguments_take_the_defaults(self, make_trainable, make_examples, tmp_path):
        args = TrainingArguments(str(tmp_path), max_steps=1, **QUIET)
        trainer = DynamicLlavaTrainer(make_trainable(), args, train_dataset=make_examples())
        trainer.create_optimizer()
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {args.learning_rate, 2e-4}
        assert not trainer.model.model.vision_tower.post_layernorm.weight.requires_grad

    def test_model_init(self, make_trainable, make_examples, arguments):
        made = []

        def init():
            made.append(make_trainable())
            return made[-1]

        args = arguments(max_steps=1, trainable="predictors", mask_loss_weight=3.0)
        trainer = DynamicLlavaTrainer(None, args, model_init=init, train_dataset=make_examples())
        trainer.train()
        assert trainer.model is made[-1]
        assert trainer.model.config.mask_loss_weight == 3.0
        assert not trainer.model.lm_head.weight.requires_grad

    def test_settings_go_into_the_configuration(self, make_trainable, make_examples, arguments, tmp_path):
        given = {"mask_loss_weight": 7.0, "gumbel_start_temperature": 2.0, "gumbel_end_temperature": 0.5}
        trainer = DynamicLlavaTrainer(make_trainable(), arguments(**given), train_dataset=make_examples())
        trainer.train()
        trainer.save_model(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert {name: saved[name] for name in given} == given
        untouched = DynamicLlavaTrainer(make_trainable(mask_loss_weight=9.0), arguments()).model
        assert untouched.config.mask_loss_weight == 9.0

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"trainable": "some"}, r"`trainable` must be 'all' or 'predictors', got 'some'"),
            ({"predictor_learning_rate": -1.0}, r"`predictor_learning_rate` must be at least 0, got -1.0"),
            ({"predictor_weight_decay": -0.1}, r"`predictor_weight_decay` must be at least 0, got -0.1"),
        ],
    )
    def test_wrong_arguments(self, arguments, settings, sentence):
        with pytest.raises(ValueError, match=sentence):
            arguments(**settings)

    def test_wrong_configuration_value(self, make_trainable, arguments):
        with pytest.raises(ValueError, match=r"`gumbel_end_temperature` must be a number above 0, got 0\.0"):
            DynamicLlavaTrainer(make_trainable(), arguments(gumbel_end_temperature=0.0))

    def test_a_dense_model_is_refused_at_once(self, make_llava, arguments):
        with pytest.raises(ValueError, match=r"`model` must hold a DynamicLlava"):
            DynamicLlavaTrainer(make_llava(), arguments())


def one_step(model, args, examples):
    """Gradient of one optimiser step, read from plain gradient descent at rate 1."""
    before = weights(model)
    trainer = DynamicLlavaTrainer(model, args, train_dataset=examples)
    trainer.train()
    assert trainer.state.global_step == 1
    return {name: before[name] - value for name, value in weights(model).items()}, trainer


def test_accumulation_gives_the_same_gradient(make_trainable, make_examples, arguments, monkeypatch):
    monkeypatch.setattr(F, "gumbel_softmax", noiseless)
    common = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "predictor_learning_rate": 1.0}
    common.update(max_grad_norm=0.0, lr_scheduler_type="constant", logging_steps=1)
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        runs.append(one_step(make_trainable(opinions=True), arguments(**common, **sizes), make_examples(8)))
    (whole, one), (parts, other) = runs
    for name, gradient in whole.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(parts[name], gradient, atol=1e-4 * max(largest, 1e-2), rtol=1e-3)
        assert (largest > 0) == ("vision_tower" not in name), name
    one, other = one.state.log_history[0], other.state.log_history[0]
    assert one.keys() >= VALUES
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert other["language_loss"] == pytest.approx(one["language_loss"], rel=1e-4)


def test_every_tracker_sees_the_values(make_trainable, make_examples, arguments):
    tracker = Tracker()
    args = arguments(logging_steps=1)
    trainer = DynamicLlavaTrainer(make_trainable(), args, train_dataset=make_examples(), callbacks=[tracker])
    trainer.train()
    steps = [logs for logs in tracker.logs if "loss" in logs]
    assert len(steps) == 2
    assert all(logs.keys() >= VALUES for logs in steps)
    assert [entry.keys() >= VALUES for entry in trainer.state.log_history] == [True, True, False]
    given = DynamicLlavaCallback()
    trainer = DynamicLlavaTrainer(make_trainable(), args, callbacks=[given])
    assert [c for c in trainer.callback_handler.callbacks if isinstance(c, DynamicLlavaCallback)] == [given]


@pytest.mark.parametrize("mode", [{"bf16": True}, {"activation_checkpointing": True, "trainable": "predictors"}])
def test_modes_train(make_trainable, make_examples, arguments, mode):
    model = make_trainable(opinions=True)
    before = weights(model)
    args = arguments(gradient_accumulation_steps=2, logging_steps=1, **mode)
    trainer = DynamicLlavaTrainer(model, args, train_dataset=make_examples())
    trainer.train()
    after = weights(model)
    for name in PREDICTORS:
        assert any(name in key and not torch.equal(value, before[key]) for key, value in after.items())
    assert all(value.isfinite().all() for value in after.values())
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history[:2])


class TestEvaluation:
    def test_metrics_get_the_logits_alone(self, make_trainable, make_examples, arguments):
        seen = []

        def metrics(prediction):
            seen.append(prediction)
            return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

        model, examples = make_trainable(opinions=True), make_examples(5)
        trainer = DynamicLlavaTrainer(
            model, arguments(per_device_eval_batch_size=2), eval_dataset=examples, compute_metrics=metrics
        )
        result = trainer.evaluate()
        assert 0 <= result["eval_accuracy"] <= 1
        with torch.no_grad():
            expected = model.eval()(**stack(examples))
        torch.testing.assert_close(torch.tensor(seen[0].predictions), expected.logits, atol=1e-5, rtol=0)
        assert result["eval_loss"] == pytest.approx(expected.loss.item(), abs=1e-5)

    def test_predictions_can_be_reduced_on_the_way(self, make_trainable, make_examples, arguments):
        examples = make_examples(5)
        trainer = Trainer(
            make_trainable(),
            arguments(prediction_loss_only=False, per_device_eval_batch_size=2),
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
        )
        predictions = trainer.predict(examples).predictions
        assert predictions.shape == (5, len(examples[0]["input_ids"]))

    def test_answers_of_every_length(self, make_trainable, make_examples, arguments):
        """Answers far below and above `output_text_min_length` are evaluated with what the predictor decides."""
        model = make_trainable(opinions=True, output_text_min_length=10)
        trainer = DynamicLlavaTrainer(model, arguments())
        for answer in (1, 3, 20):
            (example,) = make_examples(1, answer=answer)
            loss = trainer.evaluate([example])["eval_loss"]
            batch = stack([example])
            with torch.no_grad():
                prompt = batch["input_ids"].shape[1] - answer
                outputs = model.eval()(
                    input_ids=batch["input_ids"],
                    pixel_values=batch["pixel_values"],
                    prompt_length=prompt,
                    drop_tokens=False,
                )
            logits = outputs.logits[0, prompt - 1 : -1]
            assert loss == pytest.approx(F.cross_entropy(logits, batch["labels"][0, prompt:]).item(), abs=1e-5)


SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
WHOLE = {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def folders(path):
    return sorted(entry.name for entry in Path(path).iterdir() if entry.is_dir())


class TestCheckpoints:
    def test_an_interrupted_save_leaves_no_checkpoint(self, make_trainable, make_examples, arguments, monkeypatch):
        args = arguments(**SAVING)
        trainer = DynamicLlavaTrainer(make_trainable(), args, train_dataset=make_examples())
        save = trainer._save_rng_state

        def broken(folder):
            if trainer.state.global_step == 4:
                raise OSError("no space left on device")
            save(folder)

        trainer._save_rng_state = broken
        with pytest.raises(OSError, match="no space left"):
            trainer.train()
        run = Path(args.output_dir)
        assert folders(run) == ["_incomplete", "checkpoint-2"]
        assert {file.name for file in (run / "checkpoint-2").iterdir()} >= WHOLE
        assert get_last_checkpoint(args.output_dir) == str(run / "checkpoint-2")

        trainer = DynamicLlavaTrainer(make_trainable(), args, train_dataset=make_examples())
        trainer.train(resume_from_checkpoint=True)
        assert folders(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"], "what was left over is gone"
        assert all({file.name for file in (run / name).iterdir()} >= WHOLE for name in folders(run))

    def test_rotation_keeps_the_best_and_the_latest(self, make_trainable, make_examples, arguments):
        args = arguments(
            **SAVING,
            eval_strategy="steps",
            eval_steps=2,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            greater_is_better=True,  # the language loss falls, so the first checkpoint stays the best
            learning_rate=5e-3,
        )
        examples = make_examples()
        model = make_trainable()
        trainer = DynamicLlavaTrainer(model, args, train_dataset=examples, eval_dataset=examples)
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert losses == sorted(losses, reverse=True)
        assert len(losses) == 3
        run = Path(args.output_dir)
        assert folders(run) == ["checkpoint-2", "checkpoint-6"]
        best = str(run / "checkpoint-2")
        assert trainer.state.best_model_checkpoint == best
        for name in folders(run):
            assert json.loads((run / name / "trainer_state.json").read_text())["best_model_checkpoint"] == best
        loaded = DynamicLlavaForConditionalGeneration.from_pretrained(best)
        for name, value in weights(loaded).items():
            assert torch.equal(value, model.get_parameter(name)), name

    def test_pushing_takes_weights_of_a_whole_checkpoint(self, make_trainable, make_examples, arguments, monkeypatch):
        """Each upload shows the model of a checkpoint that has its final name; pickled states are not asked for."""
        args = arguments(**SAVING, push_to_hub=True, hub_strategy="checkpoint", hub_model_id="me/sparse")
        uploads = []

        def upload_folder(self, folder_path, allow_patterns, **kwargs):
            newest = max(Path(folder_path).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            weights = [(folder / "model.safetensors").read_bytes() for folder in (newest, Path(folder_path))]
            same = weights[0] == weights[1]
            uploads.append((newest.name, {file.name for file in newest.iterdir()}, same, allow_patterns))
            done = concurrent.futures.Future()
            done.set_result(None)
            return done

        def init_hf_repo(self, *args, **kwargs):
            self.hub_model_id, self.push_in_progress = "me/sparse", None

        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
        monkeypatch.setattr(Trainer, "init_hf_repo", init_hf_repo)
        DynamicLlavaTrainer(make_trainable(), args, train_dataset=make_examples()).train()
        assert [name for name, *_ in uploads] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
        for _, files, same, patterns in uploads:
            assert files >= WHOLE
            assert same
            assert not {"*.bin", "*.pt", "*.pth", "*"} & set(patterns)

    def test_resume_lands_in_the_same_state(self, make_trainable, make_examples, arguments, tmp_path):
        """Stopped in the middle of an epoch: weights, optimiser, schedule, noise, temperature, next batches, logs."""

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 4:
                    raise KeyboardInterrupt

        def run(folder, resume=None, callbacks=()):
            model = make_trainable()
            spy = Spy(model)
            args = arguments(
                **{**SAVING, "max_steps": 5, "save_steps": 3},
                output_dir=str(tmp_path / folder),
                weight_decay=0.1,
                lr_scheduler_type="cosine",
                logging_steps=1,
            )
            trainer = DynamicLlavaTrainer(model, args, train_dataset=make_examples(), callbacks=[spy, *callbacks])
            trainer.train(resume_from_checkpoint=resume)
            return trainer, spy, torch.get_rng_state()

        whole, seen, noise = run("whole")
        with pytest.raises(KeyboardInterrupt):
            run("stopped", callbacks=[Stop()])
        torch.manual_seed(99)
        resumed, again, noise_again = run("stopped", resume=True)
        assert len(again.batches) == 2
        for one, other in zip(seen.batches[3:], again.batches):
            assert torch.equal(one, other)
        assert again.temperatures == seen.temperatures[3:]
        assert torch.equal(noise, noise_again)
        for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters()):
            assert torch.equal(one, other), name
        one, other = whole.optimizer.state_dict(), resumed.optimizer.state_dict()
        assert one["param_groups"] == other["param_groups"]
        assert len(one["state"]) == len(other["state"]) > 20
        for index, state in one["state"].items():
            for name, value in state.items():
                assert torch.equal(value, other["state"][index][name]), (index, name)
        assert whole.lr_scheduler.state_dict() == resumed.lr_scheduler.state_dict()
        logs = [
            [{name: entry[name] for name in (*VALUES, "loss", "grad_norm")} for entry in t.state.log_history[:-1]]
            for t in (whole, resumed)
        ]
        assert logs[0] == logs[1]

    @pytest.mark.slow
    def test_a_killed_save_leaves_no_checkpoint(self, repository, tmp_path):
        """The process dies without any clean-up while the optimiser is written."""
        script = repository / "tests" / "dynamic_llava" / "train_toy.py"
        command = [sys.executable, str(script), str(tmp_path), "--max-steps", "4", "--save-steps", "2"]
        died = subprocess.run([*command, "--die-at", "4"], capture_output=True, text=True, timeout=300)
        assert died.returncode == 9, died.stderr
        assert folders(tmp_path) == ["_incomplete", "checkpoint-2"]
        went_on = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
        assert went_on.returncode == 0, went_on.stderr
        assert folders(tmp_path) == ["checkpoint-2", "checkpoint-4"]
        assert {file.name for file in (tmp_path / "checkpoint-4").iterdir()} >= WHOLE


def test_load_state_dict_takes_the_names_of_the_file(make_trainable, tmp_path):
    from safetensors.torch import load_file

    model, other = make_trainable(opinions=True), make_trainable()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    assert not file.keys() <= other.state_dict().keys(), "the file has names of its own"
    assert other.load_state_dict(file).missing_keys == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    with pytest.raises(RuntimeError, match="nothing_of_the_kind"):
        other.load_state_dict({**file, "nothing_of_the_kind": torch.zeros(1)})


def torchrun(script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=500, env=env)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_two_processes_give_the_gradient_and_logs_of_one(repository, tmp_path):
    script = repository / "tests" / "dynamic_llava" / "train_toy.py"
    flags = ["--max-steps", "1", "--sgd", "--no-noise"]
    command = [sys.executable, str(script), str(tmp_path / "one"), "--batch", "4", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    torchrun(script, tmp_path / "two", "--batch", "2", "--world-size", "2", *flags)
    one, two = (torch.load(tmp_path / name / "result.pt") for name in ("one", "two"))
    start = one["before"]
    moved = 0
    for name, value in one["after"].items():
        assert torch.equal(start[name], two["before"][name])
        gradient, other = start[name] - value, start[name] - two["after"][name]
        torch.testing.assert_close(other, gradient, atol=1e-4 * max(gradient.abs().max().item(), 1e-2), rtol=1e-3)
        moved += bool(gradient.abs().max())
    assert moved > 40
    for name in ("loss", *VALUES):
        assert two["log"][name] == pytest.approx(one["log"][name], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("data", ["text-only", "short", "mixed"])
@pytest.mark.parametrize("train_tower", [False, True])
def test_two_processes_wait_for_no_missing_gradient(repository, tmp_path, data, train_tower):
    """With activation checkpointing DDP does not look for unused weights: each must take part in every step."""
    script = repository / "tests" / "dynamic_llava" / "train_toy.py"
    flags = ["--max-steps", "3", "--checkpointing", "--save-steps", "2", "--data", data]
    flags += ["--train-tower"] if train_tower else []
    torchrun(script, tmp_path, "--batch", "2", "--world-size", "2", *flags)
    result = torch.load(tmp_path / "result.pt")
    assert all(value.isfinite().all() for value in result["after"].values())
    assert {f"rng_state_{rank}.pth" for rank in range(2)} <= {f.name for f in (tmp_path / "checkpoint-2").iterdir()}
    assert folders(tmp_path) == ["checkpoint-2", "checkpoint-3"]
