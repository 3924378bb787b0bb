"""The adversarial steps: equal to a plain loop, exact when resumed, and safe against NaN and a full disk."""

import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback, TrainingArguments

from hf_efficient import (
    Pix2PixConfig,
    Pix2PixDiscriminator,
    Pix2PixModel,
    Pix2PixTrainer,
    Pix2PixTrainingArguments,
)
from hf_efficient.pix2pix.losses_pix2pix import ImagePool, discriminator_loss, generator_loss
from hf_efficient.pix2pix.pairs_pix2pix import ImagePairs


class Toy(Dataset):
    """Noise to its own blurred negative: something a small network can learn."""

    def __init__(self, count: int = 6, side: int = 16) -> None:
        noise = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1
        self.source, self.target = noise, -F.avg_pool2d(noise, 3, 1, 1)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.source[row], "labels": self.target[row]}


def networks(norm: str = "instance", dropout: float = 0.0, levels: int = 3, side: int = 16):
    torch.manual_seed(0)
    config = Pix2PixConfig(num_levels=levels, base_channels=4, norm=norm, dropout=dropout, image_size=side)
    return Pix2PixModel(config), Pix2PixDiscriminator(16, base_channels=4, norm=norm)


def trainer(folder: Path, *, model=None, discriminator=None, data=None, **settings) -> Pix2PixTrainer:
    if model is None:
        model, discriminator = networks()
    defaults = {"max_steps": 4, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    eval_data = settings.pop("eval_dataset", None)
    args = Pix2PixTrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    data = data or Toy()
    return Pix2PixTrainer(model, args, discriminator, train_dataset=data, eval_dataset=eval_data)


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def trained(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything but biases: before a norm their gradient is zero, and Adam turns its rounding error into steps."""
    return {name: value for name, value in weights(network).items() if not name.endswith("bias")}


def same(left, right, **tolerance) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=name, **(tolerance or {"atol": 0, "rtol": 0}))


@pytest.mark.parametrize("gan_loss", ["vanilla", "lsgan", "hinge"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_equals_a_plain_loop(tmp_path, gan_loss, norm):
    model, discriminator = networks(norm)
    reference, opponent = networks(norm)
    data, steps = Toy(), 5
    seen: list[torch.Tensor] = []

    class Order(Toy):
        def __getitem__(self, row):
            seen.append(row)
            return super().__getitem__(row)

    run = trainer(
        tmp_path,
        model=model,
        discriminator=discriminator,
        data=Order(),
        max_steps=steps,
        gan_loss=gan_loss,
        decay_start=0.4,
        per_device_train_batch_size=2,
    )
    seen.clear()  # the first row is looked at before
    run.train()
    optimizers = [torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (reference, opponent)]
    reference.train()
    for step in range(steps):
        rows = [data[row] for row in seen[2 * step : 2 * step + 2]]
        source, target = (torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels"))
        rate = 2e-4 * (1 if step <= 2 else (5 - step) / 3)  # constant for 40 % of 5 steps, then down to 0
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        fake = reference(source).reconstruction
        optimizers[1].zero_grad()
        discriminator_loss(opponent(source, target), opponent(source, fake.detach()), gan_loss).backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        loss = generator_loss(opponent(source, fake), gan_loss) + 100 * (fake - target).abs().mean()
        loss.backward()
        optimizers[0].step()
    same(trained(model), trained(reference), atol=2e-6, rtol=1e-4)
    same(trained(discriminator), trained(opponent), atol=2e-6, rtol=1e-4)


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path):
    results = []
    for batch, accumulate in ((4, 1), (1, 4), (2, 2)):
        model, discriminator = networks()
        run = trainer(
            tmp_path / f"{batch}",
            model=model,
            discriminator=discriminator,
            max_steps=4,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
        )
        run.train()
        results.append((trained(model), trained(discriminator)))
    for model, discriminator in results[1:]:
        same(model, results[0][0], atol=2e-6, rtol=1e-4)
        same(discriminator, results[0][1], atol=2e-6, rtol=1e-4)


def test_both_losses_of_a_step_see_the_same_dropped_units(tmp_path):
    """With accumulation the generator runs twice on each micro-batch; the second run repeats the first."""
    model, discriminator = networks(dropout=0.5, levels=6, side=64)
    outputs, training = (
        [],
        trainer(
            tmp_path,
            model=model,
            discriminator=discriminator,
            data=Toy(side=64),
            max_steps=1,
            gradient_accumulation_steps=2,
            learning_rate=0.0,
        ),
    )
    model.register_forward_hook(lambda _, __, output: outputs.append(output.reconstruction.detach()))
    training.train()
    assert len(outputs) == 4
    for first, second in zip(outputs[:2], outputs[2:]):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    assert not torch.equal(outputs[0], outputs[1])


def test_micro_batches_drop_units_of_their_own_without_a_discriminator(tmp_path):
    model, discriminator = networks(dropout=0.5, levels=6, side=64)
    settings = {"gan_loss": "none", "max_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": 0.0}
    data = Toy(count=1, side=64)
    data.source, data.target = data.source.repeat(2, 1, 1, 1), data.target.repeat(2, 1, 1, 1)
    outputs, run = [], trainer(tmp_path, model=model, discriminator=discriminator, data=data, **settings)
    model.register_forward_hook(lambda _, __, output: outputs.append(output.reconstruction.detach()))
    run.train()
    assert len(outputs) == 2
    assert not torch.equal(*outputs)  # the same image twice


def test_l1_alone_leaves_the_discriminator_alone(tmp_path):
    model, discriminator = networks()
    before = weights(discriminator)
    trainer(tmp_path, model=model, discriminator=discriminator, gan_loss="none").train()
    same(weights(discriminator), before)


def test_frozen_layers_of_the_discriminator_stay_frozen(tmp_path):
    model, discriminator = networks()
    discriminator.layers[0].requires_grad_(False)
    before = weights(discriminator)
    trainer(tmp_path, model=model, discriminator=discriminator).train()
    after = weights(discriminator)
    assert torch.equal(after["layers.0.weight"], before["layers.0.weight"])
    assert not torch.equal(after["layers.2.weight"], before["layers.2.weight"])
    assert [p.requires_grad for p in discriminator.layers[0].parameters()] == [False, False]


def test_the_discriminator_has_a_learning_rate_of_its_own(tmp_path):
    model, discriminator = networks()
    before = weights(model), weights(discriminator)
    run = trainer(tmp_path, model=model, discriminator=discriminator, discriminator_learning_rate=0.0)
    run.train()
    same(weights(discriminator), before[1])
    assert not torch.equal(weights(model)["network.down.0.weight"], before[0]["network.down.0.weight"])


def test_the_discriminator_is_shown_the_pairs_of_the_pool(tmp_path):
    model, discriminator = networks()
    run = trainer(tmp_path, model=model, discriminator=discriminator, max_steps=12, pool_size=2, seed=3)
    made, shown = [], []
    model.register_forward_hook(lambda _, given, output: made.append((given[0], output.reconstruction.detach())))
    discriminator.register_forward_pre_hook(lambda _, given: shown.append(given))
    run.train()
    pool = ImagePool(2, seed=3)
    expected = [pool.query(*pair) for pair in made]
    assert any(not torch.equal(pair[1], given[1]) for pair, given in zip(made, expected))  # not always the latest
    assert len(shown) == 36  # a step: the real pair, the generated one, the latest one for the generator
    for (sources, images), (source, output) in zip(shown[1::3], expected):
        assert torch.equal(sources, source)
        assert torch.equal(images, output)


def test_it_learns(tmp_path):
    model, discriminator = networks()
    run = trainer(
        tmp_path,
        model=model,
        discriminator=discriminator,
        max_steps=60,
        learning_rate=2e-3,
        logging_steps=5,
        per_device_train_batch_size=3,
    )
    run.train()
    logs = [entry for entry in run.state.log_history if "loss_l1" in entry]
    assert logs[-1]["loss_l1"] < 0.7 * logs[0]["loss_l1"]
    assert all({"loss", "loss_gan", "loss_discriminator"} <= entry.keys() for entry in logs)


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_same_run(tmp_path, picture, accumulate):
    """Stopped inside an epoch; dropout, pool, average, augmentation, decay and norms all go on where they were."""
    rows = [{"photo": picture(20, 20 + number)} for number in range(5)]

    def make(folder, **settings):
        model, discriminator = networks("batch", dropout=0.5, levels=6, side=64)
        data = ImagePairs(rows, "photo", size=64, jitter=6, flip=True)
        read = []
        original = data.__class__.__getitem__

        class Watched(ImagePairs):
            def __getitem__(self, row):
                item = original(self, row)
                read.append((row, item["pixel_values"].clone()))
                return item

        data.__class__ = Watched
        run = trainer(
            folder,
            model=model,
            discriminator=discriminator,
            data=data,
            max_steps=9,
            pool_size=3,
            ema_decay=0.5,
            gradient_accumulation_steps=accumulate,
            save_strategy="steps",
            save_steps=3,
            seed=5,
            **settings,
        )
        return run, read

    whole, seen = make(tmp_path / "whole")
    whole.train()
    first, _ = make(tmp_path / "parts")
    first.add_callback(Stop(3))
    first.train()
    second, seen_again = make(tmp_path / "parts")
    second.train(resume_from_checkpoint=True)
    same(weights(second.model), weights(whole.model))
    same(weights(second.discriminator), weights(whole.discriminator))
    for name in ("optimizer", "discriminator_optimizer"):
        left, right = (getattr(run, name).state_dict()["state"] for run in (second, whole))
        for key in left:
            same(left[key], right[key])
    left, right = (run.pool.state_dict() for run in (second, whole))
    assert left["random"] == right["random"]
    assert all(torch.equal(a, b) for x, y in zip(left["pairs"], right["pairs"]) for a, b in zip(x, y))
    assert second.discriminator_scheduler.get_last_lr() == whole.discriminator_scheduler.get_last_lr()
    last = seen[-1], seen_again[-1]
    assert last[0][0] == last[1][0]
    assert torch.equal(last[0][1], last[1][1])
    raw = [load(run, "checkpoint-9/generator_raw.safetensors") for run in (second, whole)]
    same(*raw)
    assert any(not torch.equal(raw[0][name], value) for name, value in whole.model.state_dict().items())


def load(run: Pix2PixTrainer, name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(run.args.output_dir) / name)


def test_the_averaged_weights_are_what_is_saved_and_kept(tmp_path):
    run = trainer(tmp_path, ema_decay=0.9, save_strategy="steps", save_steps=2)
    start, steps = weights(run.model), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            steps.append(weights(model))

    run.add_callback(Watch())
    run.train()
    average = start
    for step in steps:
        average = {name: 0.9 * value + 0.1 * step[name] for name, value in average.items()}
    same(weights(run.model), average, atol=1e-6, rtol=0)
    same(
        {name.removeprefix(""): value for name, value in load(run, "checkpoint-4/model.safetensors").items()},
        average,
        atol=1e-6,
        rtol=0,
    )
    same(load(run, "checkpoint-4/generator_raw.safetensors"), steps[-1])


def test_the_best_checkpoint_comes_back(tmp_path):
    run = trainer(
        tmp_path,
        max_steps=6,
        learning_rate=2e-2,
        eval_dataset=Toy(2),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="psnr",
        greater_is_better=True,
        save_total_limit=1,
        decay_start=1.0,
    )
    run.train()
    scores = {entry["step"]: entry["eval_psnr"] for entry in run.state.log_history if "eval_psnr" in entry}
    best = max(scores, key=scores.get)
    assert len(scores) == 3
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    same(weights(run.model), load(run, f"checkpoint-{best}/model.safetensors"))
    state = json.loads((tmp_path / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".saving")]
    metrics = run.evaluate()
    assert metrics["eval_psnr"] == pytest.approx(scores[best], abs=1e-3)
    outputs = run.model.eval()(torch.stack([Toy(2)[row]["pixel_values"] for row in range(2)])).reconstruction
    error = (outputs - Toy(2).target).square().mean((1, 2, 3))
    assert metrics["eval_psnr"] == pytest.approx((10 * torch.log10(4 / error)).mean().item(), abs=1e-3)


def test_preview_sheets_are_written(tmp_path):
    trainer(tmp_path, preview_steps=2, preview_count=3).train()
    files = sorted((tmp_path / "previews").iterdir())
    assert [file.name for file in files] == ["0000002.png", "0000004.png"]
    sheets = [Image.open(file) for file in files]
    assert all(sheet.width > 3 * 16 and sheet.height > 3 * 16 for sheet in sheets)
    assert sheets[0].tobytes() != sheets[1].tobytes()


def test_bfloat16(tmp_path):
    run = trainer(tmp_path, bf16=True, gradient_accumulation_steps=2)
    before, dtypes = weights(run.model), set()
    run.model.network.down[0].register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    run.train()
    assert dtypes == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in run.model.parameters())
    assert any(not torch.equal(before[name], value) for name, value in weights(run.model).items())


class Poison(TrainerCallback):
    """Makes one weight NaN after a step, as an overflow would."""

    def __init__(self, network: torch.nn.Module, step: int, event: str) -> None:
        self.network, self.step = network, step
        setattr(self, event, self.act)

    def act(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(self.network.parameters()).view(-1)[0] = float("nan")


@pytest.mark.parametrize("which", ["generator", "discriminator"])
def test_a_nan_loss_stops_at_the_last_good_checkpoint(tmp_path, which):
    run = trainer(tmp_path, max_steps=8, save_strategy="steps", save_steps=2)
    network = run.model if which == "generator" else run.discriminator
    run.add_callback(Poison(network, 3, "on_step_begin"))
    with pytest.raises(FloatingPointError, match=r"loss became nan at step 4: .*checkpoint-2; lower `learning_rate`"):
        run.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    same(weights(run.model), load(run, "checkpoint-2/model.safetensors"))


def test_after_a_nan_the_averaged_weights_are_those_of_the_checkpoint(tmp_path):
    run = trainer(tmp_path, max_steps=8, save_strategy="steps", save_steps=2, ema_decay=0.5)
    run.add_callback(Poison(run.model, 4, "on_step_begin"))
    with pytest.raises(FloatingPointError, match="checkpoint-4"):
        run.train()
    same(weights(run.model), load(run, "checkpoint-4/model.safetensors"))
    run.save_model(str(tmp_path / "kept"))
    same(load(run, "kept/model.safetensors"), load(run, "checkpoint-4/model.safetensors"))


def test_a_checkpoint_of_an_earlier_run_is_not_the_last_good_one(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=4, learning_rate=1e-2).train()
    run = trainer(tmp_path)
    run.add_callback(Poison(run.model, 1, "on_step_begin"))
    with pytest.raises(FloatingPointError, match="training stopped before this step and no checkpoint was written"):
        run.train()


def test_a_run_that_was_interrupted_inside_a_step_starts_clean(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run._held.append((Toy()[0], []))  # what an interrupt leaves behind
    run.train()
    again, _ = networks()
    expected = trainer(tmp_path / "clean", model=again, discriminator=networks()[1], max_steps=1)
    expected.train()
    same(weights(run.model), weights(expected.model))


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run = trainer(tmp_path, max_steps=8, save_strategy="steps", save_steps=2)
    run.add_callback(Poison(run.discriminator, 4, "on_step_end"))
    with pytest.raises(FloatingPointError, match="weight of the discriminator is no longer finite after step 4"):
        run.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    resumed = trainer(tmp_path, max_steps=8)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8


class FullDisk(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    run = trainer(tmp_path, max_steps=8, save_strategy="steps", save_steps=2, save_total_limit=1)
    run.add_callback(FullDisk())
    limit, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written to .*; earlier checkpoints are whole"):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    resumed = trainer(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_a_wrong_setting_is_named(tmp_path):
    for name, value, message in (
        ("gan_loss", "wgan", "one of vanilla, lsgan, hinge, none, got 'wgan'"),
        ("lambda_l1", -1.0, "`lambda_l1` must be at least 0, got -1.0"),
        ("lambda_l1", float("nan"), "`lambda_l1` must be at least 0, got nan"),
        ("pool_size", -1, "`pool_size` must be at least 0, got -1"),
        ("decay_start", 1.5, r"`decay_start` must lie in \[0, 1\], got 1.5"),
        ("ema_decay", 1.0, r"`ema_decay` must lie in \[0, 1\), got 1.0"),
        ("preview_count", 0, "`preview_count` must be at least 1, got 0"),
        ("lr_scheduler_type", "cosine", "from `decay_start` on; got .*cosine.* and 0"),
        ("warmup_steps", 10, "`warmup_steps` must be left out: .* and 10"),
    ):
        with pytest.raises(ValueError, match=message):
            Pix2PixTrainingArguments(output_dir=str(tmp_path), **{name: value})
    with pytest.raises(TypeError, match="must be Pix2PixTrainingArguments, got TrainingArguments"):
        Pix2PixTrainer(networks()[0], TrainingArguments(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"`discriminator` must take 6 channels, .*, got 4; set its `num_channels`"):
        trainer(tmp_path, model=networks()[0], discriminator=Pix2PixDiscriminator(16, 4, 4))
    source, wrong = torch.zeros(3, 16, 16), torch.zeros(3, 20, 16)
    for row, message in (
        ({"pixel_values": source, "photo": source}, "`labels`, got pixel_values, photo; make .* by ImagePairs"),
        ((source, source), "got a tuple; make .* by ImagePairs"),
        (
            {"pixel_values": source, "labels": Image.new("RGB", (16, 16))},
            "`labels` of .* a tensor .*, got Image; Imag",
        ),
        (
            {"pixel_values": source, "labels": source[:1]},
            r"the shape \(3, height, width\), got \(1, 16, 16\); set `num_",
        ),
        ({"pixel_values": wrong, "labels": wrong}, "divisible by 8 .*, got 20x16; set `size=16` in ImagePairs"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, data=[row])
        with pytest.raises(ValueError, match="`eval_dataset` must "):
            trainer(tmp_path, eval_dataset={"a": Toy(), "b": [row]})
    model, message = networks()[0], "Images of `train_dataset` .* at least 24 pixels .*=70`, got 16x16; build"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=model, discriminator=Pix2PixDiscriminator(70, base_channels=4))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=model)  # the discriminator that is made where none is given
    trainer(tmp_path, model=model, gan_loss="none")  # asks no discriminator
    trainer(tmp_path, model=model, data=Toy(side=24), eval_dataset=Toy())  # nor does an evaluation
    other = tmp_path / "other"
    trainer(other, save_strategy="steps", save_steps=4).train()
    (other / "checkpoint-4" / "discriminator.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint .* is missing, as with `save_only_model`"):
        trainer(other, max_steps=8).train(resume_from_checkpoint=True)


def test_rows_of_a_stream_and_of_a_collator_of_ones_own_are_not_looked_at(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from Toy()

    assert trainer(tmp_path, data=Stream()).train().global_step == 4
    model, discriminator = networks()
    args = Pix2PixTrainingArguments(output_dir=str(tmp_path), max_steps=2, save_strategy="no", use_cpu=True)
    data, collate = (
        [0, 1, 2],
        lambda rows: {name: torch.stack([Toy()[row][name] for row in rows]) for name in Toy()[0]},
    )
    run = Pix2PixTrainer(model, args, discriminator, train_dataset=data, data_collator=collate)
    assert run.train().global_step == 2


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with an accelerator memory is pinned")
def test_a_cpu_pins_no_memory(tmp_path):
    run = trainer(tmp_path, max_steps=1, use_cpu=False)
    assert run.args.dataloader_pin_memory is False
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pin_memory")
        run.train()


def test_a_checkpoint_of_other_networks_is_named(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    model, discriminator = networks(levels=4)
    with pytest.raises(ValueError, match=r"checkpoint-4 holds another generator .*: `num_levels` 3 instead of 4"):
        trainer(tmp_path, model=model, discriminator=discriminator, max_steps=8).train(resume_from_checkpoint=True)
    model, _ = networks()
    for discriminator in (Pix2PixDiscriminator(34, base_channels=4), Pix2PixDiscriminator(16, base_channels=8)):
        with pytest.raises(ValueError, match="checkpoint-4 holds another discriminator"):
            trainer(tmp_path, model=model, discriminator=discriminator, max_steps=8).train(resume_from_checkpoint=True)


def test_an_evaluation_without_data_of_its_own_is_measured(tmp_path):
    metrics = trainer(tmp_path).evaluate(Toy(2))
    assert {"eval_loss", "eval_psnr", "eval_ssim"} <= metrics.keys()


DISTRIBUTED = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from test_trainer import networks, trainer
from pathlib import Path

norm, accumulate = sys.argv[3], int(sys.argv[4])
model, discriminator = networks(norm)
run = trainer(Path(sys.argv[2]), model=model, discriminator=discriminator, max_steps=6, save_strategy="steps",
              save_steps=3, gradient_accumulation_steps=accumulate, pool_size=2)
assert run.args.world_size == 2, run.args.world_size
run.train()
for network in (run.model, run.discriminator):
    for name, value in network.named_parameters():
        both = [torch.empty_like(value) for _ in range(2)]
        torch.distributed.all_gather(both, value.detach())
        assert torch.equal(*both), name
if run.args.process_index == 0:
    torch.save([run.model.state_dict(), run.discriminator.state_dict()], Path(sys.argv[2]) / "final.pt")
torch.distributed.barrier()
resumed = trainer(Path(sys.argv[2]), model=networks(norm)[0], discriminator=networks(norm)[1], max_steps=6,
                  gradient_accumulation_steps=accumulate, pool_size=2)
resumed.train(resume_from_checkpoint=str(Path(sys.argv[2]) / "checkpoint-3"))
for left, right in ((resumed.model, run.model), (resumed.discriminator, run.discriminator)):
    for (name, value), other in zip(left.named_parameters(), right.parameters()):
        assert torch.equal(value, other), name
print("in step", flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)  # DistributedDataParallel holds gloo's threads, and those may abort while the interpreter ends
"""


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "accumulate"), [("instance", 1), ("instance", 2), ("batch", 1)])
def test_two_processes_train_the_same_networks(tmp_path, norm, accumulate):
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += [str(script), str(Path(__file__).parent), str(tmp_path / "out"), norm, str(accumulate)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("in step") == 2
