"""The pass as users call it: target, both networks, resume, complaints."""

import copy
import json

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


SHAPE = (3, 16, 16)


def cifar(**changes):
    torch.manual_seed(0)
    config = CifarResNetConfig(depth=8, hidden_sizes=[8, 16, 16], num_labels=4, **changes)
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
    with pytest.raises(ValueError, match="another steps"):
        KDFSPruner.from_pretrained(cifar()).prune(tmp_path / "cut-out", config, data, args=other)
    resumed = prune("cut")
    expected, got = whole.pruned_model.state_dict(), resumed.pruned_model.state_dict()
    assert set(expected) == set(got)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    assert [entry["step"] for entry in resumed.history if "loss" in entry] == [1, 2, 3, 4, 1, 2, 3, 4]
    assert not (tmp_path / "cut" / "kdfs_run.json").exists(), "a finished run is over"


def test_scatter_is_the_loop_over_images():
    features = torch.randn(4, 3, 5, 5)
    index = torch.tensor([3, 0, 3, 3, 2, 1])
    expected = torch.zeros(4, 6, 5, 5)
    for image in range(4):
        for channel, source in enumerate(index.tolist()):
            if source < 3:
                expected[image, channel] = features[image, source]
    assert torch.equal(scatter_channels(features, index), expected)


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
        (None, {"include_layers": ["nowhere"]}, "can be pruned"),
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
    with pytest.raises(ValueError, match=r"can be pruned|at most"):
        KDFSPruner.from_pretrained(swin).prune(tmp_path / "out", KDFSConfig(), toy_data(), args=arguments())


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
