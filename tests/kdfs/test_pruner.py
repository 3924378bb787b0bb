"""The pass as users call it: target, both networks, resume, complaints."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_efficient import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    KDFSConfig,
    KDFSPruner,
    count_flops,
)
from hf_efficient.kdfs.losses_kdfs import distillation_loss
from hf_efficient.kdfs.modeling_kdfs_pruned import scatter_channels
from hf_efficient.kdfs.pruner_kdfs import measure_latency
from hf_efficient.kdfs.resuming_kdfs import last_whole_checkpoint
from hf_efficient.kdfs.slicing_kdfs import check_model


SHAPE = (3, 16, 16)


def cifar(**changes):
    torch.manual_seed(0)
    labels = {} if "id2label" in changes else {"num_labels": 4}
    config = CifarResNetConfig(depth=8, hidden_sizes=[8, 16, 16], **labels, **changes)
    return CifarResNetForImageClassification(config)


@pytest.mark.parametrize(("steps", "share"), [(1, 0.5), (5, 0.4), (3, 0.0)])
def test_the_target_holds_after_any_number_of_steps(arguments, toy_data, tmp_path, steps, share):
    model = cifar()
    before = copy.deepcopy(model.state_dict())
    pruner = KDFSPruner.from_pretrained(model)
    config = KDFSConfig(target_flops_reduction=0.45, fine_tune_share=share)
    folder = pruner.prune(tmp_path / "out", config, toy_data(), args=arguments(max_steps=steps))
    assert folder == tmp_path / "out"
    assert not pruner.masked_model.training
    assert not pruner.pruned_model.training
    images = torch.randn(3, *SHAPE)
    with torch.no_grad():
        masked, pruned = pruner.masked_model(images).logits, pruner.pruned_model(images).logits
    assert (masked - pruned).abs().max() / masked.abs().max() < 1e-5
    flops = pruner.report["flops"]
    assert flops["before"] == count_flops(model, SHAPE)
    assert flops["after"] == count_flops(pruner.pruned_model, SHAPE) == count_flops(pruner.masked_model, SHAPE)
    assert abs(flops["reduction"] - 0.45) < 0.01
    assert min(layer["after"] for layer in pruner.report["layers"]) >= 1
    phases = [entry["phase"] for entry in pruner.history if "loss" in entry]
    tuning = min(steps - 1, round(steps * share))
    assert phases == ["sampling"] * (steps - tuning) + ["fine_tuning"] * tuning
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items()), "the model was changed"
    assert json.loads((folder / "kdfs_report.json").read_text())["flops"] == flops
    assert KDFSConfig.from_pretrained(folder).target_flops_reduction == 0.45
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["out", "training"]


def test_the_two_progress_bars_have_names(arguments, toy_data, tmp_path, capsys):
    args = arguments(max_steps=2, disable_tqdm=False)
    KDFSPruner.from_pretrained(cifar()).prune(
        tmp_path / "out", KDFSConfig(target_flops_reduction=0.4), toy_data(), args=args
    )
    shown = capsys.readouterr().err
    assert shown.index("choosing filters: ") < shown.index("training the smaller network: ")


def test_distilling_pulls_the_small_network_to_its_teacher(arguments, toy_data, tmp_path):
    data = toy_data(64)
    model = cifar()
    pruner = KDFSPruner.from_pretrained(model)
    config = KDFSConfig(target_flops_reduction=0.4, fine_tune_share=0.9, fine_tune_kd_weight=5.0, kd_weight=5.0)
    args = arguments(max_steps=40, learning_rate=5e-3)
    pruner.prune(tmp_path / "out", config, data, args=args)
    tuning = [entry["loss"] for entry in pruner.history if entry["phase"] == "fine_tuning" and "loss" in entry]
    assert sum(tuning[-5:]) < 0.92 * sum(tuning[:5])


@pytest.mark.parametrize("phase", ["sampling", "fine_tuning"])
def test_an_interrupted_run_goes_on(arguments, toy_data, tmp_path, phase):
    config = KDFSConfig(target_flops_reduction=0.4)
    data = toy_data(24)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if phase in args.output_dir and state.global_step == 3:
                raise KeyboardInterrupt

    def prune(folder, *callbacks):
        pruner = KDFSPruner.from_pretrained(cifar())
        args = arguments(output_dir=str(tmp_path / folder), max_steps=8, save_strategy="steps", save_steps=2)
        pruner.prune(tmp_path / f"{folder}-out", config, data, args=args, callbacks=list(callbacks))
        return pruner

    whole = prune("whole")
    with pytest.raises(KeyboardInterrupt):
        prune("cut", Break())
    assert not (tmp_path / "cut-out").exists()
    other = arguments(output_dir=str(tmp_path / "cut"), max_steps=10)
    with pytest.raises(ValueError, match=r"interrupted run with `steps` \[4, 4\] instead of \[5, 5\]"):
        KDFSPruner.from_pretrained(cifar()).prune(tmp_path / "cut-out", config, data, args=other)
    resumed = prune("cut")
    expected, got = whole.pruned_model.state_dict(), resumed.pruned_model.state_dict()
    assert set(expected) == set(got)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    assert [entry["step"] for entry in resumed.history if "loss" in entry] == [1, 2, 3, 4, 1, 2, 3, 4]
    assert not (tmp_path / "cut" / "kdfs_run.json").exists(), "a finished run is over"


def test_checkpoints_of_an_earlier_run_are_not_taken_up(arguments, toy_data, tmp_path):
    """Only a run that was interrupted goes on, and only from its own checkpoints."""
    data = toy_data(24)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    def prune(target, *callbacks):
        pruner = KDFSPruner.from_pretrained(cifar())
        args = arguments(output_dir=str(tmp_path / "same"), max_steps=4, save_strategy="steps", save_steps=2)
        config = KDFSConfig(target_flops_reduction=target)
        pruner.prune(tmp_path / "out", config, data, args=args, callbacks=list(callbacks))
        return pruner

    prune(0.3)
    assert list((tmp_path / "same" / "sampling").glob("checkpoint-*"))
    with pytest.raises(KeyboardInterrupt):
        prune(0.5, Break())
    resumed = prune(0.5)
    assert [entry["step"] for entry in resumed.history if "loss" in entry] == [1, 2, 1, 2]


class BreakAtStepThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.fixture
def prune(arguments, toy_data, tmp_path):
    """Four steps of choosing filters, a checkpoint after each, in the same folders at every call."""

    def run(*callbacks):
        pruner = KDFSPruner.from_pretrained(cifar())
        args = arguments(max_steps=4, save_strategy="steps", save_steps=1)
        config = KDFSConfig(target_flops_reduction=0.4, fine_tune_share=0.0)
        pruner.prune(tmp_path / "out", config, toy_data(24), args=args, callbacks=list(callbacks))
        return pruner

    return run


def test_a_checkpoint_that_was_cut_off_is_passed_over(prune, tmp_path):
    """The machine went away while a checkpoint was written: the one before it counts."""

    with pytest.raises(KeyboardInterrupt):
        prune(BreakAtStepThree())
    last = tmp_path / "training" / "sampling" / "checkpoint-2"
    (last / "trainer_state.json").unlink()
    (last / "optimizer.pt").write_bytes(b"")
    resumed = prune()
    assert [entry["step"] for entry in resumed.history if "loss" in entry] == [1, 2, 3, 4]
    assert resumed.report["flops"]["reduction"] == pytest.approx(0.4, abs=0.01)


def test_the_teacher_is_left_without_hooks(arguments, toy_data, tmp_path):
    teacher = cifar()
    pruner = KDFSPruner.from_pretrained(cifar(), teacher=teacher)
    pruner.prune(tmp_path / "out", KDFSConfig(target_flops_reduction=0.4), toy_data(), args=arguments())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


def test_a_place_in_the_model_s_repository_is_not_the_teacher_s(tmp_path):
    model, teacher = cifar(), cifar()
    with torch.no_grad():
        next(teacher.parameters()).zero_()
    model.save_pretrained(tmp_path / "model" / "inner")
    teacher.save_pretrained(tmp_path / "teacher")
    pruner = KDFSPruner.from_pretrained(tmp_path / "model", teacher=tmp_path / "teacher", subfolder="inner")
    for name, weight in pruner.teacher.state_dict().items():
        assert torch.equal(weight, teacher.state_dict()[name])


def test_the_configuration_of_the_model_is_not_the_teacher_s(tmp_path):
    """With it the teacher's surplus layers would be left out without a word."""
    cifar().save_pretrained(tmp_path / "model")
    teacher = CifarResNetForImageClassification(CifarResNetConfig(depth=14, hidden_sizes=[8, 16, 16], num_labels=4))
    teacher.save_pretrained(tmp_path / "teacher")
    pruner = KDFSPruner.from_pretrained(tmp_path / "model", teacher=tmp_path / "teacher", config=cifar().config)
    assert pruner.teacher.config.depth == 14
    assert pruner.teacher.state_dict().keys() == teacher.state_dict().keys()


def test_a_teacher_in_the_model_s_own_folder_lies_where_the_model_does(tmp_path):
    cifar().save_pretrained(tmp_path / "inner")
    for teacher in (str(tmp_path), f"{tmp_path}/", tmp_path / "inner" / ".."):
        pruner = KDFSPruner.from_pretrained(tmp_path, teacher=teacher, subfolder="inner")
        for name, weight in pruner.teacher.state_dict().items():
            assert torch.equal(weight, pruner.model.state_dict()[name])


def test_half_precision_weights_are_trained_in_single(arguments, toy_data, tmp_path):
    cifar().half().save_pretrained(tmp_path / "half")
    pruner = KDFSPruner.from_pretrained(tmp_path / "half")
    assert next(pruner.model.parameters()).dtype == torch.float32
    pruner.prune(tmp_path / "out", KDFSConfig(target_flops_reduction=0.4), toy_data(), args=arguments(max_steps=2))
    assert next(pruner.pruned_model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_instance_keeps_its_precision(arguments, toy_data, tmp_path, dtype):
    rows = [{**row, "pixel_values": row["pixel_values"].to(dtype)} for row in toy_data()]
    pruner = KDFSPruner.from_pretrained(cifar().to(dtype))
    pruner.prune(tmp_path / "out", KDFSConfig(target_flops_reduction=0.4), rows, args=arguments(max_steps=2))
    assert next(pruner.pruned_model.parameters()).dtype == dtype
    images = torch.stack([row["pixel_values"] for row in rows])
    with torch.no_grad():
        masked, pruned = pruner.masked_model(images).logits, pruner.pruned_model(images).logits
    assert (masked - pruned).abs().max() <= 0.02 * masked.abs().max()


def test_a_pruned_checkpoint_is_pruned_again(arguments, toy_data, tmp_path):
    """The whole pass twice, through the folder: half of three quarters."""
    first = KDFSPruner.from_pretrained(cifar())
    first.prune(tmp_path / "once", KDFSConfig(target_flops_reduction=0.3), toy_data(), args=arguments())
    again = KDFSPruner.from_pretrained(tmp_path / "once")
    args = arguments(output_dir=str(tmp_path / "training-again"))
    folder = again.prune(tmp_path / "twice", KDFSConfig(target_flops_reduction=0.3), toy_data(), args=args)
    assert again.report["flops"]["before"] == first.report["flops"]["after"]
    assert again.report["flops"]["reduction"] == pytest.approx(0.3, abs=0.01)
    assert "reconstruction" in next(entry for entry in again.history if "loss" in entry)
    loaded = KDFSPruner.from_pretrained(folder).model.eval()
    images = torch.randn(3, *SHAPE)
    with torch.no_grad():
        expected = again.pruned_model(images).logits
        torch.testing.assert_close(loaded(images).logits, expected, rtol=0, atol=0)
        assert (again.masked_model(images).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_file_in_place_of_the_folder_is_refused_before_training(arguments, toy_data, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="`save_directory` must be a folder"):
        KDFSPruner.from_pretrained(cifar()).prune(tmp_path / "out", KDFSConfig(), toy_data(), args=arguments())
    assert not (tmp_path / "training").exists()


def test_latency_is_measured_within_its_time(monkeypatch):
    """On a busy machine a pass may take seconds; the measurement ends all the same."""
    now = [0.0]

    class Slow(torch.nn.Module):
        def forward(self, pixel_values):
            now[0] += 3.0
            return pixel_values

    monkeypatch.setattr("hf_efficient.kdfs.pruner_kdfs.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("hf_efficient.kdfs.pruner_kdfs.time.process_time", lambda: now[0])
    found = measure_latency({"before": Slow(), "after": Slow()}, SHAPE, repeats=1000, max_seconds=60.0)
    assert found == {"before": 3.0, "after": 3.0}
    assert now[0] <= 80.0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_scatter_is_the_loop_over_images(memory_format):
    features = torch.randn(4, 3, 5, 5).to(memory_format=memory_format)
    index = torch.tensor([3, 0, 3, 3, 2, 1])
    expected = torch.zeros(4, 6, 5, 5)
    for image in range(4):
        for channel, source in enumerate(index.tolist()):
            if source < 3:
                expected[image, channel] = features[image, source]
    scattered = scatter_channels(features, index)
    assert torch.equal(scattered, expected)
    assert scattered.is_contiguous(memory_format=memory_format)


def test_a_teacher_of_another_size(arguments, toy_data, tmp_path):
    """The reconstruction loss compares maps of activity, so the teacher may be wider and deeper."""
    teacher = CifarResNetForImageClassification(CifarResNetConfig(depth=14, hidden_sizes=[8, 16, 24], num_labels=4))
    pruner = KDFSPruner.from_pretrained(cifar(), teacher=teacher)
    pruner.prune(tmp_path / "out", KDFSConfig(target_flops_reduction=0.4), toy_data(), args=arguments())
    first = next(entry for entry in pruner.history if "reconstruction" in entry)
    assert first["reconstruction"] > 0
    assert first["distillation"] > 0


def test_rows_named_label_are_fine(arguments, toy_data, tmp_path):
    rows = [{"pixel_values": row["pixel_values"], "label": row["labels"]} for row in toy_data()]
    pruner = KDFSPruner.from_pretrained(cifar())
    pruner.prune(tmp_path / "out", KDFSConfig(target_flops_reduction=0.4), rows, args=arguments(max_steps=2))
    assert pruner.pruned_model is not None


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        ([{"pixel_values": torch.zeros(SHAPE)}], {}, "labels"),
        (None, {"target_flops_reduction": 0.99}, r"at most 0\.\d+"),
        (None, {"min_filters": 999}, r"With `min_filters` 999 and `round_to` 1 no filter can be removed"),
        (None, {"include_layers": ["nowhere"]}, r"can be pruned .*; loosen `include_layers` or `exclude_layers`\."),
    ],
)
def test_complaints(arguments, toy_data, tmp_path, rows, config, message):
    pruner = KDFSPruner.from_pretrained(cifar())
    with pytest.raises(ValueError, match=message):
        pruner.prune(tmp_path / "out", KDFSConfig(**config), rows or toy_data(), args=arguments())
    assert not (tmp_path / "out").exists()


def test_a_transformer_is_refused(arguments, toy_data, tmp_path):
    from transformers import SwinConfig, SwinForImageClassification

    class NoConvolutions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3 * 16 * 16, 4)

        def forward(self, pixel_values):
            return self.linear(pixel_values.flatten(1))

    with pytest.raises(ValueError, match="NoConvolutions has none"):
        KDFSPruner.from_pretrained(NoConvolutions()).prune(tmp_path, KDFSConfig(), toy_data(), args=arguments())
    swin = SwinForImageClassification(
        SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[1], window_size=4, num_labels=4)
    )
    with pytest.raises(ValueError, match=r"SwinForImageClassification is a vision transformer.*`ToECallback`"):
        KDFSPruner.from_pretrained(swin)


def test_a_corrupt_checkpoint_is_named(tmp_path):
    cifar().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ValueError, match="corrupt"):
        KDFSPruner.from_pretrained(tmp_path)


def test_nothing_to_export_yet(tmp_path):
    with pytest.raises(ValueError, match="call `prune` first"):
        KDFSPruner.from_pretrained(cifar()).export_onnx(tmp_path)


def test_original_weights(tmp_path):
    """Keys with `module.` and without counters load; the depth is read from them."""
    from safetensors.torch import save_file

    model = cifar().eval()
    state = {
        "module." + name.removeprefix("cifar_resnet."): value.clone()
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    save_file(state, tmp_path / "old.safetensors")
    loaded = CifarResNetForImageClassification.from_original(tmp_path / "old.safetensors")
    assert (loaded.config.depth, loaded.config.hidden_sizes, loaded.config.num_labels) == (8, [8, 16, 16], 4)
    images = torch.randn(2, *SHAPE)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)
    save_file({"module.linear.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        CifarResNetForImageClassification.from_original(tmp_path / "other.safetensors")


def test_distillation_of_itself_is_zero():
    logits = torch.randn(4, 5)
    assert distillation_loss(logits, logits, 3.0).abs() < 1e-6


def test_a_channels_last_network_is_pruned_and_resumes(arguments, toy_data, tmp_path):
    """Its weights lie otherwise in memory, which checkpoints cannot hold."""
    model = cifar().to(memory_format=torch.channels_last)
    pruner = KDFSPruner.from_pretrained(model)
    args = arguments(max_steps=2, save_strategy="steps", save_steps=1)
    pruner.prune(tmp_path / "out", KDFSConfig(target_flops_reduction=0.4), toy_data(), args=args)
    assert model.cifar_resnet.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert KDFSPruner.from_pretrained(tmp_path / "out").model is not None


def test_the_network_that_is_pruned_is_not_overwritten(arguments, toy_data, tmp_path):
    """Its folder holds the only dense weights, the teacher's as well."""
    cifar().save_pretrained(tmp_path / "dense")
    before = (tmp_path / "dense" / "model.safetensors").read_bytes()
    config = KDFSConfig(target_flops_reduction=0.4)
    for pruner in (
        KDFSPruner.from_pretrained(tmp_path / "dense"),
        KDFSPruner(CifarResNetForImageClassification.from_pretrained(tmp_path / "dense")),
        KDFSPruner.from_pretrained(cifar(), teacher=tmp_path / "dense"),
    ):
        with pytest.raises(ValueError, match="would overwrite the network"):
            pruner.prune(tmp_path / "other" / ".." / "dense", config, toy_data(), args=arguments(max_steps=1))
    assert (tmp_path / "dense" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "training").exists()


def test_files_of_an_earlier_pruning_do_not_stay(arguments, toy_data, tmp_path):
    """An ONNX file of other weights beside the new ones would be deployed."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model.onnx", "model.onnx.data", "widths.png", "notes.txt"):
        (out / name).write_text("earlier")
    pruner = KDFSPruner.from_pretrained(cifar())
    pruner.prune(out, KDFSConfig(target_flops_reduction=0.4), toy_data(), args=arguments(max_steps=1))
    assert not any((out / name).exists() for name in ("model.onnx", "model.onnx.data", "widths.png"))
    assert (out / "notes.txt").read_text() == "earlier"


def test_a_damaged_checkpoint_is_passed_over(prune, tmp_path):
    """A full disk or a bad copy leaves a checkpoint whose weights end early."""

    with pytest.raises(KeyboardInterrupt):
        prune(BreakAtStepThree())
    sampling = tmp_path / "training" / "sampling"
    assert {path.name for path in sampling.iterdir()} == {"checkpoint-1", "checkpoint-2"}
    expected = {"model.safetensors": str(sampling / "checkpoint-1"), "optimizer.pt": None}
    for number, (name, found) in zip((2, 1), expected.items(), strict=True):
        file = sampling / f"checkpoint-{number}" / name
        file.write_bytes(file.read_bytes()[:100])
        assert last_whole_checkpoint(sampling) == found
    prune()


def test_what_changed_since_the_interruption_is_named(arguments, toy_data, tmp_path):
    class Break(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                raise KeyboardInterrupt

    start, other = cifar(), cifar()
    with torch.no_grad():
        next(other.parameters()).mul_(2)

    def prune(*callbacks, teacher=None, **settings):
        args = arguments(max_steps=8, save_strategy="steps", save_steps=2)
        config = KDFSConfig(**{"target_flops_reduction": 0.4, **settings})
        pruner = KDFSPruner.from_pretrained(start, teacher=teacher)
        pruner.prune(tmp_path / "out", config, toy_data(24), args=args, callbacks=list(callbacks))

    with pytest.raises(KeyboardInterrupt):
        prune(Break(1))  # before its first checkpoint: nothing is lost by other settings
    with pytest.raises(KeyboardInterrupt):
        prune(Break(3), round_to=2)
    with pytest.raises(ValueError, match=r"interrupted run with `round_to` 2 instead of 4") as raised:
        prune(round_to=4)
    assert len(str(raised.value)) < 300 + len(str(tmp_path))
    with pytest.raises(ValueError, match=r"interrupted run with `teacher` [\d.]+ instead of [\d.]+; start"):
        prune(teacher=other, round_to=2)


def test_a_run_goes_on_where_sums_end_in_another_digit(arguments, toy_data, tmp_path, monkeypatch):
    """Processors add in different orders: the sum of all weights differs in its last digits, and names no change."""

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    def prune(factor, *callbacks):
        start = cifar().double()
        with torch.no_grad():
            next(start.parameters()).view(-1)[0] *= factor
        args = arguments(max_steps=8, save_strategy="steps", save_steps=2)
        data = [{**row, "pixel_values": row["pixel_values"].double()} for row in toy_data(24)]
        KDFSPruner(start).prune(tmp_path / "out", KDFSConfig(), data, args=args, callbacks=list(callbacks))

    with pytest.raises(KeyboardInterrupt):
        prune(1.0, Break())
    with pytest.raises(ValueError, match="interrupted run with `weights`"):
        prune(2.0)
    prune(1 + 1e-9)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_push_that_would_not_happen_is_said(arguments, toy_data, tmp_path, caplog):
    args = arguments(max_steps=2)
    args.push_to_hub = True
    with caplog.at_level("WARNING"):
        KDFSPruner(cifar()).prune(tmp_path / "out", KDFSConfig(), toy_data(), args=args)
    assert "`push_to_hub` of `args` has no effect" in caplog.text


def test_a_wrong_argument_is_named(tmp_path, toy_data, arguments, monkeypatch):
    with pytest.raises(OSError, match="`teacher` must be a folder"):
        KDFSPruner.from_pretrained(cifar(), teacher=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"`teacher` must be the checkpoint of an image classifier, but .* name an"):
        KDFSPruner.from_pretrained(cifar(), teacher=tmp_path)  # a folder without a configuration
    cifar().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "none", "auto_map": {"AutoConfig": "a.A"}}')
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 0)  # do not ask on the terminal
    with pytest.raises(ValueError, match=r"`model` must be the checkpoint .*; add `trust_remote_code=True` if you"):
        KDFSPruner.from_pretrained(tmp_path / "model")
    pruner = KDFSPruner.from_pretrained(cifar())
    with pytest.raises(ValueError, match="`pruning_config` must be a KDFSConfig, but is a dict"):
        pruner.prune(tmp_path / "out", {"round_to": 8}, toy_data(), args=arguments())
    with pytest.raises(ValueError, match="`args` must be TrainingArguments, but is a dict"):
        pruner.prune(tmp_path / "out", KDFSConfig(), toy_data(), args={"max_steps": 2})
    rows = [{"pixel_values": torch.zeros(SHAPE, dtype=torch.uint8), "labels": 0}]
    with pytest.raises(ValueError, match=r"in the model's torch\.float32, but they are torch\.uint8"):
        pruner.prune(tmp_path / "out", KDFSConfig(), rows, args=arguments(bf16=True))
    with pytest.raises(ValueError, match=r"in the model's torch\.bfloat16, but they are torch\.float32"):
        KDFSPruner(cifar().bfloat16()).prune(tmp_path / "out", KDFSConfig(), toy_data(), args=arguments())


def test_named_classes_are_saved(tmp_path):
    """`id2label` alone names the classes; the other direction follows."""
    names = {0: "a", 1: "b", 2: "c", 3: "d"}
    cifar(id2label=names).save_pretrained(tmp_path)
    config = CifarResNetForImageClassification.from_pretrained(tmp_path).config
    assert (config.id2label, config.label2id) == (names, {word: number for number, word in names.items()})


class NoPretrainedModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
        self.next, self.linear = torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(8, 4)

    def forward(self, pixel_values):
        return self.linear(self.next(torch.relu(self.norm(self.conv(pixel_values)))).relu().mean(dim=(2, 3)))


def other_head():
    model = cifar()
    model.linear = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    return model


def one_module_twice():
    model = cifar()
    model.cifar_resnet.layer3[0].conv2 = model.cifar_resnet.layer2[0].conv2
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (NoPretrainedModel, "`model` must be an image classifier of transformers, but has the class NoPretr"),
        (lambda: torch.compile(cifar(), backend="eager"), "but has the class OptimizedModule"),
        (lambda: cifar().requires_grad_(False), "`model` must have weights that train, but all are frozen"),
        (lambda: cifar(problem_type="multi_label_classification"), "`problem_type` is 'multi_label_classification'"),
        (one_module_twice, r"under one name, but cifar\S+ and cifar\S+ are the same"),
        (other_head, "what its configuration builds, .* but a smaller CifarResNetForImageClassification fails"),
        ("fixed_view", r"any number of channels, but a smaller UnusualNetwork fails \(shape"),
    ],
)
def test_what_cannot_be_sliced_is_refused_before_training(
    arguments, toy_data, tmp_path, network, monkeypatch, make, message
):
    """Else the masks are learned, for hours, and then there is no smaller network."""
    monkeypatch.setattr("hf_efficient.kdfs.pruner_kdfs.KDFSTrainer.train", lambda *a, **k: pytest.fail("training"))
    model = make() if callable(make) else network(make)[0]
    with pytest.raises(ValueError, match=message):
        KDFSPruner(model).prune(tmp_path / "out", KDFSConfig(target_flops_reduction=0.3), toy_data(), args=arguments())


def test_the_check_before_training_draws_no_random_numbers(network, mask):
    model, shape = network("cifar_resnet")
    masked = mask(model, shape, target_flops_reduction=0.3)
    before = torch.get_rng_state(), copy.deepcopy(masked.state_dict())
    check_model(masked, model)
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(torch.equal(value, masked.state_dict()[name]) for name, value in before[1].items())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(torch.zeros(SHAPE), 1)], "must yield mappings with `pixel_values` and `labels`, but yields a tuple"),
        ([{"pixel_values": torch.zeros(1, *SHAPE), "labels": 1}], r"but have the shape \(1, 3, 16, 16\)"),
        ([{"pixel_values": object(), "labels": 1}], "`pixel_values` must be a tensor, but are a object"),
        ([{"pixel_values": torch.zeros(1, 16, 16), "labels": 1}], r"cannot take an image of the shape \(1, 16, 16\)"),
    ],
)
def test_rows_that_are_no_images_are_refused(arguments, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        KDFSPruner(cifar()).prune(tmp_path / "out", KDFSConfig(target_flops_reduction=0.3), rows, args=arguments())


def test_a_backbone_is_refused(arguments, toy_data, tmp_path):
    with pytest.raises(ValueError, match="must return logits, but CifarResNetModel returns"):
        KDFSPruner(cifar().cifar_resnet).prune(tmp_path / "out", KDFSConfig(), toy_data(), args=arguments())


def test_the_present_folder_is_a_folder(arguments, toy_data, tmp_path, monkeypatch):
    """Nothing is written beside it: a mounted folder often lies where nothing else may be."""
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    made = []
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: made.append(Path(source)) or rename(source, target))
    config = KDFSConfig(target_flops_reduction=0.3)
    KDFSPruner(cifar()).prune(".", config, toy_data(), args=arguments(max_steps=1))
    assert KDFSPruner.from_pretrained(inside).model.config.model_type == "kdfs_pruned"
    saved = [path for path in made if path.name == "model.safetensors"]
    assert [path.parent.parent.resolve() for path in saved] == [inside]
    assert not [path.name for path in inside.iterdir() if path.name.startswith(".")]
    assert KDFSPruner(cifar())._default_arguments(Path(".")).output_dir == f"{inside}-training"


def test_a_model_that_is_its_own_teacher_is_left_as_it_is(arguments, toy_data, tmp_path):
    model = cifar().train()
    KDFSPruner.from_pretrained(model, teacher=model).prune(
        tmp_path / "out", KDFSConfig(target_flops_reduction=0.3), toy_data(), args=arguments(max_steps=2)
    )
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_layers_stay_frozen_in_both_phases(arguments, toy_data, tmp_path):
    model = cifar()
    model.cifar_resnet.conv1.requires_grad_(False)
    pruner = KDFSPruner(model)
    config = KDFSConfig(target_flops_reduction=0.3, exclude_layers=[r"resnet\.conv1$"])
    pruner.prune(tmp_path / "out", config, toy_data(), args=arguments(learning_rate=0.1))
    pruned = pruner.pruned_model.network
    assert torch.equal(pruned.cifar_resnet.conv1.weight, model.cifar_resnet.conv1.weight)
    assert not torch.equal(pruned.linear.weight, model.linear.weight)


def test_a_teacher_may_return_bare_logits(arguments, toy_data, tmp_path):
    pruner = KDFSPruner(cifar(), teacher=NoPretrainedModel())
    pruner.prune(tmp_path / "out", KDFSConfig(target_flops_reduction=0.3), toy_data(), args=arguments(max_steps=2))
    assert all("distillation" in entry for entry in pruner.history if "loss" in entry)


def test_layers_that_are_too_coarse_for_the_target_are_said(mask, caplog):
    masked = mask(cifar(), (3, 16, 16), round_to=8, target_flops_reduction=0.1, reconstruction_weight=0.0)
    with caplog.at_level("WARNING"):
        masked.freeze_masks()
    said = "removed, not 0.1000; with round_to=8 no step of one layer, and no step up with one down, ends closer."
    assert said in caplog.text
