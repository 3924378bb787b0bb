"""ToE under transformers' Trainer."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainerCallback,
    YolosConfig,
    YolosForObjectDetection,
)

from hf_efficient import ToECallback, ToEConfig


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_stages_tokens_and_speed_are_logged(make_vit, make_trainer, rows_seen):
    model = make_vit()
    rows, _ = rows_seen(model.vit.layers[1])
    trainer = make_trainer(model, [ToECallback()])
    trainer.train()
    assert rows == [33] * 4 + [49] * 4 + [65] * 4
    logs = training_logs(trainer)
    assert [entry["toe_stage"] for entry in logs] == [1] * 4 + [2] * 4 + [3] * 4
    assert [entry["toe_kept_tokens"] for entry in logs] == [32] * 4 + [48] * 4 + [64] * 4
    assert all(entry["toe_tokens_per_second"] > 0 for entry in logs)


def test_epochs_as_unit(make_vit, make_trainer, rows_seen):
    model = make_vit()
    rows, _ = rows_seen(model.vit.layers[1])
    callback = ToECallback(stage_starts=(1, 2), keep_rates=(0.5, 0.75))
    make_trainer(model, [callback], max_steps=-1, num_train_epochs=3).train()
    assert rows == [65] * 4 + [33] * 4 + [49] * 4


def test_install_lets_trackers_see_the_values(make_vit, make_trainer):
    class Tracker(TrainerCallback):
        def __init__(self):
            self.stages = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.stages.append(logs.get("toe_stage"))

    tracker = Tracker()
    trainer = make_trainer(make_vit(), [tracker], max_steps=3)
    callback = ToECallback.install(trainer, ToEConfig(keep_rates=(0.3, 0.6, 0.9)))
    assert trainer.callback_handler.callbacks[0] is callback
    assert ToECallback.install(trainer) is callback
    with pytest.raises(ValueError, match="`config` must be left out when the trainer has a ToECallback already"):
        ToECallback.install(trainer, distance="manhattan")
    trainer.train()
    assert tracker.stages[:3] == [1, 2, 3]


def test_evaluation_during_training_is_the_plain_model(make_vit, make_trainer, tmp_path):
    """Predictions in the middle of stage 1 against the host class loaded from the checkpoint of that moment."""
    seen = {}

    def keep(prediction):
        seen[trainer.state.global_step] = torch.tensor(prediction.predictions)
        return {}

    model = make_vit()
    trainer = make_trainer(
        model,
        [ToECallback()],
        trainer_arguments={"compute_metrics": keep},
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        eval_on_start=True,
    )
    initial = weights(model)
    trainer.train()
    assert training_logs(trainer)[2]["toe_kept_tokens"] == 32  # tokens were dropped when step 3 was evaluated
    assert sorted(seen) == [0, 3, 6, 9, 12]
    for step, predicted in seen.items():
        host = make_vit()
        if step:
            host = type(model).from_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        else:
            host.load_state_dict(initial)
        plain = make_trainer(host)
        assert torch.equal(torch.tensor(plain.predict(trainer.eval_dataset).predictions), predicted), step


def test_nothing_is_left_after_training(make_vit, make_trainer, count_hooks):
    model, twin = make_vit(), make_vit()
    make_trainer(model, [ToECallback()]).train()
    make_trainer(twin).train()
    assert count_hooks(model) == 0
    for module, other in zip(model.modules(), twin.modules()):
        assert vars(module).keys() == vars(other).keys()
        assert {key: len(value) for key, value in vars(module).items() if "hooks" in key and value is not None} == {
            key: len(value) for key, value in vars(other).items() if "hooks" in key and value is not None
        }
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert model.config.to_dict() == twin.config.to_dict()
    assert not torch.equal(model.classifier.weight, twin.classifier.weight)  # it did train differently
    pixels = torch.randn(2, 3, 32, 32)
    twin.load_state_dict(model.state_dict())
    for mode in (True, False):
        assert torch.equal(model.train(mode)(pixels).logits, twin.train(mode)(pixels).logits)


def test_keep_rate_of_one_is_plain_training(make_vit, make_trainer):
    model, twin = make_vit(), make_vit()
    make_trainer(model, [ToECallback(stage_starts=(0,), keep_rates=(1.0,))]).train()
    make_trainer(twin).train()
    assert_same(weights(model), weights(twin))


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "backward", "forward"])
def test_after_an_exception_the_model_is_plain(event, make_vit, make_trainer, count_hooks, rows_seen):
    class Breaks(TrainerCallback):
        def _break(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise RuntimeError("broken off")

    if event.startswith("on_"):
        setattr(Breaks, event, Breaks._break)

    class BreakingTrainer(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.state.global_step == 2:
                if event == "forward":
                    raise RuntimeError("broken off")
                if event == "backward":
                    loss.register_hook(lambda gradient: (_ for _ in ()).throw(RuntimeError("broken off")))
            return loss

    model, twin = make_vit(), make_vit()
    breaks = Breaks()
    trainer = make_trainer(model, [breaks, ToECallback()], trainer_class=BreakingTrainer)
    with pytest.raises(RuntimeError, match="broken off"):
        trainer.train()
    assert trainer.state.global_step >= 2
    assert count_hooks(model) == 2
    twin.load_state_dict(model.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.train()(pixels).logits, twin.train()(pixels).logits)  # the stale hook does nothing
    # the next training starts clean, whatever its callback
    rows, handle = rows_seen(model.vit.layers[1])
    other = make_trainer(model, [ToECallback(keep_rates=(0.3, 0.6, 0.9))], max_steps=3)
    other.train()
    handle.remove()
    assert rows == [20, 39, 58]
    assert count_hooks(model) == 0


@pytest.mark.parametrize("host", ["vit", "peft"])
def test_a_forward_pass_that_breaks_off_leaves_nothing_pending(host, make_vit, make_trainer):
    """Between the embedding and the layer of the hook, which has then not acted yet."""

    def break_off(layer, args):
        if trainer.state.global_step == 2:
            raise RuntimeError("broken off")

    model = vit = make_vit()
    if host == "peft":
        model = get_peft_model(vit, LoraConfig(target_modules=["q_proj", "v_proj"]))
    handle = vit.vit.layers[0].register_forward_pre_hook(break_off)
    trainer = make_trainer(model, [ToECallback()])
    with pytest.raises(RuntimeError, match="broken off"):
        trainer.train()
    handle.remove()
    pixels = torch.randn(2, 3, 32, 32)
    after = model.train()(pixels).logits
    assert ToECallback.detach(model) == (2 if host == "peft" else 3)
    assert torch.equal(after, model(pixels).logits)


def test_detach_removes_a_stale_hook(make_vit, make_trainer, count_hooks):
    class Breaks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise RuntimeError("broken off")

    model = make_vit()
    with pytest.raises(RuntimeError, match="broken off"):
        make_trainer(model, [ToECallback(), Breaks()]).train()
    assert ToECallback.detach(model) == 3  # before the layer, behind the model, and when a checkpoint is read
    assert count_hooks(model) == 0
    assert not model._load_state_dict_pre_hooks
    assert ToECallback.detach(model) == 0


def test_two_callbacks_are_refused(make_vit, make_trainer):
    class Faster(ToECallback):
        """No duplicate to transformers, which warns of those."""

    with pytest.raises(ValueError, match="`callbacks` must hold one ToECallback"):
        make_trainer(make_vit(), [ToECallback(), Faster(ToEConfig.preset("fast"))]).train()


def test_epochs_need_data_with_a_length(make_vit, make_trainer, images):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from (images[row] for row in range(len(images)))

    trainer = make_trainer(
        make_vit(), [ToECallback(stage_starts=(0, 1, 2))], trainer_arguments={"train_dataset": Endless()}
    )
    with pytest.raises(ValueError, match="can count epochs only where the training data has a length"):
        trainer.train()


@pytest.mark.parametrize("stop", [6, 4])
def test_resume_in_a_stage_ends_with_the_same_weights(stop, make_vit, make_trainer, tmp_path):
    """Stopped within stage 2 (step 6 of 4..8) and at its very start; every weight and optimizer state."""
    whole = make_trainer(make_vit(), [ToECallback()], save_strategy="steps", save_steps=stop)
    whole.train()
    fresh = make_vit()
    with torch.no_grad():  # a weight that does not come from the checkpoint would be seen
        for parameter in fresh.parameters():
            parameter.fill_(9.0)
    resumed = make_trainer(fresh, [ToECallback()])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
    assert_same(weights(whole.model), weights(resumed.model))
    a, b = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    for key, state in a.items():
        assert_same(state, b[key])
    logs = training_logs(resumed)
    assert [entry["step"] for entry in logs] == list(range(1, 13))
    assert [entry["toe_stage"] for entry in logs] == [1] * 4 + [2] * 4 + [3] * 4
    assert [e["loss"] for e in logs] == [e["loss"] for e in training_logs(whole)]  # the same batches followed


@pytest.mark.parametrize("case", ["model", "model_init", "trained before"])
def test_best_model_at_the_end_is_the_one_of_its_checkpoint(case, make_vit, make_trainer, tmp_path):
    scores = iter([0.0, 1.0, 0.5, 0.2] * 2)
    arguments = {"compute_metrics": lambda prediction: {"score": next(scores)}}
    if case == "model_init":
        arguments["model_init"] = lambda: make_vit()
    trainer = make_trainer(
        None if case == "model_init" else make_vit(),
        [ToECallback()],
        trainer_arguments=arguments,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=3,
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    trainer.train()
    if case == "trained before":
        trainer.train()
    best = type(trainer.model).from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    assert_same(weights(trainer.model), weights(best))


def test_gradient_accumulation(make_vit, make_trainer, rows_seen):
    model = make_vit()
    rows, _ = rows_seen(model.vit.layers[1])
    trainer = make_trainer(
        model, [ToECallback()], max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=3
    )
    trainer.train()
    # 16 images: two steps of three batches and one of the remaining two, twice over
    assert rows == [33] * 6 + [49] * 2 + [49] * 3 + [65] * 5
    assert [entry["toe_kept_tokens"] for entry in training_logs(trainer)] == [32, 32, 48, 48, 64, 64]


def timm_vit():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=2, model_args=sizes)
    )


@pytest.mark.parametrize("host", ["vit", "timm"])
def test_activation_checkpointing(host, make_vit, make_trainer):
    """timm recomputes whole blocks with their hooks, transformers only what is in them."""
    make = make_vit if host == "vit" else timm_vit
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(make(), [ToECallback()], max_steps=6, activation_checkpointing=checkpointing)
        trainer.train()
        assert [entry["toe_kept_tokens"] for entry in training_logs(trainer)] == [32, 32, 48, 48, 64, 64]
        results.append(weights(trainer.model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-6)


def test_a_stale_hook_does_not_disturb_recomputation(make_trainer):
    class Breaks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise RuntimeError("broken off")

    model = timm_vit()
    with pytest.raises(RuntimeError, match="broken off"):
        make_trainer(model, [ToECallback(), Breaks()]).train()
    model.train().timm_model.set_grad_checkpointing(True)
    model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()


def test_bf16_autocast(make_vit, make_trainer, rows_seen):
    model = make_vit()
    rows, _ = rows_seen(model.vit.layers[1])
    trainer = make_trainer(model, [ToECallback()], max_steps=6, bf16=True)
    trainer.train()
    assert rows == [33, 33, 49, 49, 65, 65]
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_auto_find_batch_size(make_vit, make_trainer, count_hooks, rows_seen):
    class SmallDevice(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if len(inputs["pixel_values"]) > 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate more than there is")
            return loss

    model = make_vit()
    rows, handle = rows_seen(model.vit.layers[1])
    trainer = make_trainer(
        model,
        [ToECallback()],
        trainer_class=SmallDevice,
        per_device_train_batch_size=5,
        auto_find_batch_size=True,
        max_steps=6,
    )
    trainer.train()
    handle.remove()
    assert trainer.state.train_batch_size == 4
    assert rows[-6:] == [33, 33, 49, 49, 65, 65]
    assert count_hooks(model) == 0


def test_token_count_may_change_between_batches(make_vit, make_trainer, rows_seen):
    """A resolution curriculum: 36, 64 and 100 patches in turn, with interpolated position embeddings."""
    sizes = [24, 32, 40]
    batches = iter(sizes * 4)

    def collate(items):
        pixels = torch.stack([item["pixel_values"] for item in items])
        size = next(batches)
        return {
            "pixel_values": torch.nn.functional.interpolate(pixels, size=(size, size)),
            "labels": torch.stack([item["labels"] for item in items]),
            "interpolate_pos_encoding": True,
        }

    model = make_vit()
    rows, _ = rows_seen(model.vit.layers[1])
    trainer = make_trainer(model, [ToECallback()], trainer_arguments={"data_collator": collate})
    trainer.train()
    patches = [(size // 4) ** 2 for size in sizes * 4]
    rates = [0.5] * 4 + [0.75] * 4 + [1.0] * 4
    assert rows == [1 + int(count * rate) for count, rate in zip(patches, rates)]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # called by peft
def test_lora_trains_its_own_weights_and_no_others(make_vit, make_trainer, count_hooks, rows_seen):
    host = make_vit()
    model = get_peft_model(
        host, LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], lora_alpha=64)
    )
    before = weights(model)
    rows, handle = rows_seen(host.vit.layers[1])
    make_trainer(model, [ToECallback()], learning_rate=1e-2).train()
    handle.remove()
    assert rows == [33] * 4 + [49] * 4 + [65] * 4
    for name, value in model.state_dict().items():
        trained = "lora_" in name or "modules_to_save" in name
        assert torch.equal(value, before[name]) != trained, name
    assert count_hooks(model) == 0


@pytest.mark.parametrize("middle", [False, True])
def test_detection(middle, shape, make_trainer, rows_seen):
    config = YolosConfig(
        **shape | {"image_size": [32, 32]}, num_detection_tokens=5, use_mid_position_embeddings=middle, num_labels=2
    )
    model = YolosForObjectDetection(config)
    rows, _ = rows_seen(model.vit.encoder.layer[1])

    def collate(items):
        boxes = [
            {"class_labels": item["labels"][None], "boxes": torch.tensor([[0.5, 0.25 + item["labels"] / 2, 1, 0.5]])}
            for item in items
        ]
        return {"pixel_values": torch.stack([item["pixel_values"] for item in items]), "labels": boxes}

    trainer = make_trainer(model, [ToECallback()], trainer_arguments={"data_collator": collate})
    before = weights(model)
    trainer.train()
    assert rows == [1 + kept + 5 for kept in [32] * 4 + [48] * 4 + [64] * 4]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "vit.embeddings.detection_tokens" in changed
    assert ("vit.encoder.interpolation.mid_position_embeddings" in changed) == middle
    losses = [entry["loss"] for entry in training_logs(trainer)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: ToECallback(stage_starts=(0, 100, 200)), r"of 3 epochs \(`max_steps` is 12\), got \(0, 100, 200\)"),
        (lambda: ToECallback(after_layer=5), r"`after_layer` must be below .* got 5 for the 3 layers"),
    ],
)
def test_what_does_not_fit_is_said_when_training_starts(callback, message, make_vit, make_trainer, count_hooks):
    model = make_vit()
    trainer = make_trainer(model, [callback()])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert count_hooks(model) == 0


def test_bad_values_are_said_at_construction():
    with pytest.raises(ValueError, match=r"`distance` must be one of .* got 'hamming'"):
        ToECallback(distance="hamming")
    with pytest.raises(ValueError, match=r"`config` must be a `ToEConfig`, got \{'distance': 'cosine'\}"):
        ToECallback({"distance": "cosine"})
    config = ToEConfig.preset("fast")
    assert ToECallback(config).config == config
    assert ToECallback(config, after_layer=2).config == ToEConfig.preset("fast", after_layer=2)
