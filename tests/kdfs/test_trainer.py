"""The sampling phase learns, resumes exactly, and does not depend on how a batch is split."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback, TrainingArguments

from hf_efficient import CifarResNetConfig, CifarResNetForImageClassification, KDFSConfig, KDFSTrainer
from hf_efficient.kdfs.slicing_kdfs import slice_network
from hf_efficient.kdfs.trainer_kdfs import DistillationTrainer


def cifar(labels=4, **changes):
    config = CifarResNetConfig(depth=8, hidden_sizes=[8, 8, 16], num_labels=labels, **changes)
    return CifarResNetForImageClassification(config)


def far(got, expected):
    """Largest difference, relative to the largest value (a gradient of zero counts as 1e-3)."""
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


class Gradients(TrainerCallback):
    """Keep the gradients of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def test_gradients_reach_what_should_train(arguments, toy_data):
    model, teacher = cifar(), cifar()
    seen = Gradients()
    config = KDFSConfig(target_flops_reduction=0.4)
    trainer = KDFSTrainer(model, arguments(max_steps=1), config, teacher, train_dataset=toy_data(), callbacks=[seen])
    frozen = copy.deepcopy(teacher.state_dict())
    trainer.train()
    gradients = seen.steps[0]
    names = {name for name, _ in trainer.model.named_parameters()}
    assert set(gradients) == names
    assert any(name.startswith("mask_logits") for name in names)
    assert any(name.startswith("decoders") for name in names)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert all(torch.equal(frozen[name], value) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_masks_have_their_own_learning_rate(arguments, toy_data):
    config = KDFSConfig(target_flops_reduction=0.4, mask_learning_rate=0.25)
    trainer = KDFSTrainer(cifar(), arguments(weight_decay=0.1), config, train_dataset=toy_data())
    groups = trainer.create_optimizer().param_groups
    logits = {id(parameter) for parameter in trainer.model.mask_logits}
    own = [group for group in groups if {id(parameter) for parameter in group["params"]} & logits]
    assert len(own) == 1
    assert {id(parameter) for parameter in own[0]["params"]} == logits
    assert (own[0]["lr"], own[0]["weight_decay"]) == (0.25, 0.0)
    assert sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))


def test_the_cost_falls_to_the_target(arguments, toy_data):
    config = KDFSConfig(target_flops_reduction=0.4, mask_learning_rate=0.1, flops_weight=30, reconstruction_weight=10)
    args = arguments(max_steps=60, learning_rate=1e-2, lr_scheduler_type="constant")
    trainer = KDFSTrainer(cifar(), args, config, cifar(), train_dataset=toy_data(64))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "flops" in entry]
    early, late = logs[:10], logs[-10:]
    for name in ("flops", "cross_entropy"):
        assert sum(entry[name] for entry in late) < 0.7 * sum(entry[name] for entry in early), name
    assert {"loss", "cross_entropy", "distillation", "reconstruction", "flops"} <= set(late[-1])
    expected = late[-1]["cross_entropy"] + 0.05 * late[-1]["distillation"]
    expected += 10 * late[-1]["reconstruction"] + 30 * late[-1]["flops"]
    assert late[-1]["loss"] == pytest.approx(expected, rel=1e-4)


def test_identical_student_has_no_reconstruction_loss(arguments, toy_data, mask):
    """The decoders start as the identity: with all filters kept the student is its teacher."""
    model = cifar().eval()
    masked = mask(model, (3, 16, 16), random=False, target_flops_reduction=0.4, initial_keep_margin=60.0)
    trainer = KDFSTrainer(masked, arguments(), None, copy.deepcopy(model), train_dataset=toy_data())
    images = torch.stack([row["pixel_values"] for row in toy_data()])
    masked.train()
    for module in masked.network.modules():
        module.training = False
    masked.training = True
    losses = trainer.extra_losses(masked(images), images)
    assert losses["reconstruction"].item() < 1e-12
    assert abs(losses["distillation"].item()) < 1e-6


def test_one_mask_per_step_and_deterministic_in_evaluation(mask):
    masked = mask(cifar().eval(), (3, 16, 16), target_flops_reduction=0.4)
    torch.testing.assert_close(masked.masks(), masked.masks(), rtol=0, atol=0)
    masked.train()
    masked.set_noise(0, 5, 1.0)
    first = masked.masks()
    torch.rand(3)
    torch.testing.assert_close(masked.masks(), first, rtol=0, atol=0)
    masked.set_noise(0, 6, 1.0)
    assert not torch.equal(masked.masks(), first)
    copy.deepcopy(masked).train()(torch.randn(2, 3, 16, 16))  # a masked model can be copied after training forwards


def test_a_copy_has_its_own_masks(mask):
    masked = mask(cifar().eval(), (3, 16, 16), target_flops_reduction=0.4)
    twin = copy.deepcopy(masked)
    with torch.no_grad():
        for logits in twin.mask_logits:
            logits[:, 1] = logits[:, 0] + 9.0
        images = torch.randn(2, 3, 16, 16)
        assert not torch.equal(masked(images).logits, twin(images).logits)
        torch.testing.assert_close(twin(images).logits, twin.network(images).logits, rtol=0, atol=0)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_gradients_do_not_depend_on_accumulation(network, arguments, toy_data, accumulation):
    model, _ = network("plain")
    config = KDFSConfig(target_flops_reduction=0.3)

    def gradients(batch, steps):
        torch.manual_seed(0)
        seen = Gradients()
        args = arguments(max_steps=2, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        data = toy_data(16, size=12, labels=5)
        trainer = KDFSTrainer(
            copy.deepcopy(model), args, config, copy.deepcopy(model), train_dataset=data, callbacks=[seen]
        )
        assert trainer.loss_is_scaled_for_ga is False
        trainer.train()
        return seen.steps

    whole, split = gradients(8, 1), gradients(8 // accumulation, accumulation)
    for one, many in zip(whole, split, strict=True):
        assert set(one) == set(many)
        for name in one:
            assert far(many[name], one[name]) < 1e-5, name


def test_resume_is_exact(arguments, toy_data, tmp_path):
    """Stopped inside the phase: every weight, statistic, logit and optimiser moment is the same."""
    config = KDFSConfig(target_flops_reduction=0.4)
    start, teacher = cifar(), cifar()

    def run(folder, resume=None, stop=None):
        args = arguments(output_dir=str(tmp_path / folder), max_steps=6, save_strategy="steps", save_steps=3)
        callbacks = [stop] if stop else None
        trainer = KDFSTrainer(
            copy.deepcopy(start), args, config, copy.deepcopy(teacher), train_dataset=toy_data(24), callbacks=callbacks
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 3

    whole = run("whole")
    run("cut", stop=Stop())
    resumed = run("cut", resume=str(tmp_path / "cut" / "checkpoint-3"))
    expected, got = whole.model.state_dict(), resumed.model.state_dict()
    assert set(expected) == set(got)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    left, right = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    for index, state in left.items():
        for name, value in state.items():
            torch.testing.assert_close(right[index][name], value, rtol=0, atol=0)


def test_bfloat16(arguments, toy_data):
    trainer = KDFSTrainer(
        cifar(), arguments(bf16=True), KDFSConfig(target_flops_reduction=0.4), cifar(), train_dataset=toy_data()
    )
    trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    shares = [entry["flops"] for entry in trainer.state.log_history if "flops" in entry]
    assert len(shares) == 4
    assert all(0 < share < 1 for share in shares)
    trainer.model.freeze_masks()
    kept = float(trainer.model.cost.count_macs(trainer.model.frozen_masks)) / trainer.model.dense_macs
    assert abs(kept - 0.6) < 0.01


@pytest.mark.parametrize("trainer_class", [DistillationTrainer, KDFSTrainer])
def test_in_bfloat16_the_teacher_computes_in_bfloat16_too(trainer_class, arguments, toy_data):
    teacher, seen = cifar(), []
    teacher.cifar_resnet.conv1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer = trainer_class(
        model=cifar(), args=arguments(bf16=True, max_steps=1), train_dataset=toy_data(), teacher=teacher
    )
    trainer.train()
    assert set(seen) == {torch.bfloat16}


def test_a_teacher_without_stages_distils_its_logits_alone(arguments, toy_data, caplog):
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1}
    teacher = ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=8, num_labels=4))
    trainer = KDFSTrainer(cifar(), arguments(max_steps=1), KDFSConfig(), teacher, train_dataset=toy_data())
    assert "the reconstruction loss is left out" in caplog.text
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "distillation" in entry)
    assert "reconstruction" not in entry


def test_a_teacher_that_does_not_take_the_images_is_refused_before_training(arguments, toy_data):
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1}
    vit = ViTForImageClassification(ViTConfig(**size, image_size=32, patch_size=8, num_labels=4))
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 4))
    many = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 7))
    for teacher, message in (
        (vit, r"shape \(3, 16, 16\), but ViTFor\w+, made for 32 x 32 pixels, fails on one \(.*\); take a teacher"),
        (flat, r"shape \(3, 16, 16\), but Sequential fails on one \(mat1"),
        (many, r"logits of the shape \(1, 4\), one per label of the model, but Sequential gives \(1, 7\)"),
    ):
        with pytest.raises(ValueError, match=message):
            KDFSTrainer(cifar(), arguments(), KDFSConfig(), teacher, train_dataset=toy_data())


@pytest.mark.parametrize("family", ["resnet", "cifar_resnet"])
def test_maps_of_another_size_are_not_rebuilt(arguments, toy_data, caplog, family):
    """A teacher of the same class, or with as many stages, that halves its images elsewhere."""
    shape = {"embedding_size": 8, "layer_type": "basic", "num_labels": 4}
    resnet = ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], downsample_in_first_stage=True, **shape)
    other = {
        "resnet": ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], **shape),
        "cifar_resnet": ResNetConfig(hidden_sizes=[8, 16, 24], depths=[1, 1, 1], **shape),
    }
    model = ResNetForImageClassification(resnet) if family == "resnet" else cifar()
    teacher = ResNetForImageClassification(other[family])
    config = KDFSConfig(target_flops_reduction=0.3)
    trainer = KDFSTrainer(model, arguments(max_steps=1), config, teacher, train_dataset=toy_data(size=32))
    assert "so the reconstruction loss is left out" in caplog.text
    trainer.train()
    assert "distillation" in trainer.state.log_history[0]
    assert not any(module._forward_hooks for module in teacher.modules())


class SharedActivation(torch.nn.Module):
    """One module ends both resolutions; of the first, its output is gone when the second is there."""

    def __init__(self):
        super().__init__()
        widths = [(3, 8, 1), (8, 8, 1), (8, 12, 2), (12, 16, 1)]
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(a, b, 3, step, padding=1) for a, b, step in widths)
        self.act, self.last, self.linear = torch.nn.ReLU(), torch.nn.ReLU(), torch.nn.Linear(16, 4)

    def forward(self, pixel_values):
        hidden = pixel_values
        for conv in self.convs[:3]:
            hidden = self.act(conv(hidden))
        return self.linear(self.last(self.convs[3](hidden)).mean(dim=(2, 3)))


def test_a_module_that_runs_twice_ends_no_earlier_stage(arguments, toy_data):
    model, config = SharedActivation(), KDFSConfig(target_flops_reduction=0.3)
    trainer = KDFSTrainer(model, arguments(max_steps=1), config, copy.deepcopy(model), train_dataset=toy_data(size=8))
    assert list(trainer.model.structure.stage_sizes.values()) == [(8, 8), (4, 4)]
    trainer.train()
    assert "reconstruction" in trainer.state.log_history[0]


def test_distillation_alone(arguments, toy_data):
    teacher = cifar()
    trainer = DistillationTrainer(
        model=cifar(), args=arguments(), train_dataset=toy_data(), teacher=teacher, kd_weight=2.0, kd_temperature=4.0
    )
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "distillation" in entry)
    assert entry["loss"] == pytest.approx(entry["cross_entropy"] + 2.0 * entry["distillation"], rel=1e-4)


@pytest.mark.parametrize("trainer_class", [DistillationTrainer, KDFSTrainer])
def test_a_teacher_in_another_precision_is_asked_in_its_own(trainer_class, arguments, toy_data):
    teacher = cifar()
    rows = [{**row, "pixel_values": row["pixel_values"].bfloat16()} for row in toy_data()]
    trainer = trainer_class(model=cifar().bfloat16(), args=arguments(max_steps=2), train_dataset=rows, teacher=teacher)
    trainer.train()
    assert trainer.state.log_history[-2]["distillation"] > 0
    assert {weight.dtype for weight in teacher.parameters()} == {torch.float32}


def test_a_device_without_float64_is_refused_in_words(arguments, toy_data, monkeypatch):
    args = arguments()
    monkeypatch.setattr(type(args), "device", torch.device("mps"))
    with pytest.raises(ValueError, match="float64, which MPS lacks; set `use_cpu=True`"):
        KDFSTrainer(cifar(), args, train_dataset=toy_data())


def test_a_teacher_with_other_labels_is_refused(arguments, toy_data):
    with pytest.raises(ValueError, match="7 labels and the model 4"):
        KDFSTrainer(cifar(), arguments(), KDFSConfig(), cifar(labels=7), train_dataset=toy_data())
    ours = cifar(id2label={0: "a", 1: "b", 2: "c", 3: "d"})
    theirs = cifar(id2label={0: "a", 1: "c", 2: "b", 3: "d"})
    with pytest.raises(ValueError, match="label 1 is 'c' there and 'b'"):
        KDFSTrainer(ours, arguments(), KDFSConfig(), theirs, train_dataset=toy_data())


def test_mixed_precision_ends_with_the_training(arguments, toy_data):
    """Else latencies and answers afterwards would be those of bfloat16, beside a teacher in float32."""
    model = cifar()
    DistillationTrainer(model=model, args=arguments(max_steps=1, bf16=True), train_dataset=toy_data()).train()
    seen = []
    handle = model.get_submodule("linear").register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    model.eval()(torch.zeros(1, 3, 8, 8))
    handle.remove()
    assert seen == [torch.float32]


@pytest.mark.parametrize("trainer_class", [DistillationTrainer, KDFSTrainer])
def test_what_these_trainers_do_not_do_is_refused(arguments, toy_data, monkeypatch, trainer_class):
    """Label smoothing and another loss were left out in silence; among GPUs a Trainer splits a batch without masks."""
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` must be 0, but is 0\.1"):
        trainer_class(cifar(), arguments(label_smoothing_factor=0.1), train_dataset=toy_data())
    with pytest.raises(ValueError, match="`compute_loss_func` must be None"):
        trainer_class(cifar(), arguments(), train_dataset=toy_data(), compute_loss_func=lambda *a, **k: None)
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="Every process must have one GPU, but this one sees 2"):
        trainer_class(cifar(), arguments(), train_dataset=toy_data())


def test_activations_are_not_computed_again(arguments, toy_data):
    """That happens after the forward pass, when there are no masks."""
    trainer = KDFSTrainer(cifar(), arguments(gradient_checkpointing=True), KDFSConfig(), train_dataset=toy_data())
    with pytest.raises(ValueError, match="must be off while masks are learned"):
        trainer.train()
    model = cifar()
    model.cifar_resnet.grad_checkpointing = True  # as in timm
    with pytest.raises(ValueError, match="must be off while masks are learned"):
        KDFSTrainer(model, arguments(), KDFSConfig(), train_dataset=toy_data())


def test_a_pruned_network_goes_through_the_sampling_phase(network, slice_randomly, arguments, toy_data):
    model, shape = network("cifar_resnet")
    _, once = slice_randomly(model, shape, target_flops_reduction=0.2)
    config = KDFSConfig(target_flops_reduction=0.2)
    trainer = KDFSTrainer(once, arguments(max_steps=1), config, copy.deepcopy(once), train_dataset=toy_data())
    trainer.train()
    trainer.model.freeze_masks()
    twice = slice_network(trainer.model, once)
    images = torch.randn(2, *shape)
    with torch.no_grad():
        assert far(twice(images).logits, trainer.model.eval()(images).logits) < 1e-5


def test_a_label_the_model_lacks_is_refused(arguments):
    rows = [{"pixel_values": torch.zeros(3, 8, 8), "labels": label} for label in (0, 1, 2, 12)]
    trainer = KDFSTrainer(cifar(), arguments(), KDFSConfig(), train_dataset=rows)
    with pytest.raises(ValueError, match=r"`labels` must be numbers of the model's classes.*Target 12"):
        trainer.train()


@pytest.mark.parametrize(
    ("rows", "message"),
    [(None, "is None"), ([], "is empty"), ([{"pixel_values": torch.zeros(3, 8, 8)}], r"hold \['pixel_values'\]")],
)
def test_a_dataset_without_labels_is_refused(arguments, rows, message):
    with pytest.raises(ValueError, match=message):
        KDFSTrainer(cifar(), arguments(), KDFSConfig(), train_dataset=rows)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_flops_reduction", 1.0),
        ("fine_tune_share", 1),
        ("mask_learning_rate", 0),
        ("kd_temperature", -3),
        ("min_filters", 0),
        ("round_to", 1.5),
        ("include_layers", "conv"),
        ("initial_keep_margin", float("nan")),
        ("flops_weight", float("inf")),
    ],
)
def test_settings_outside_their_range(field, value):
    with pytest.raises(ValueError, match=rf"`{field}` must be .* but is {re.escape(repr(value))}"):
        KDFSConfig(**{field: value})


def test_a_pattern_that_is_none_is_refused_with_its_fault():
    with pytest.raises(ValueError, match=r"`exclude_layers` must be .*'layer\(1' is none \(missing \)"):
        KDFSConfig(exclude_layers=["fc", "layer(1"])


def test_unknown_settings_are_refused(tmp_path):
    for name in ("target_flop_reduction", "keep_share", "to_dict"):
        with pytest.raises(ValueError, match=f"`{name}` is not a setting of KDFSConfig"):
            KDFSConfig(**{name: 0.4})
    config = KDFSConfig(target_flops_reduction=0.4, round_to=8, exclude_layers=["head"])
    config.save_pretrained(tmp_path)
    assert (tmp_path / "kdfs_config.json").is_file()
    loaded = KDFSConfig.from_pretrained(tmp_path)
    assert (loaded.target_flops_reduction, loaded.round_to, loaded.exclude_layers) == (0.4, 8, ["head"])


def test_the_target_that_a_refusal_names_is_taken(mask):
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, hidden_sizes=[8, 16, 32], num_labels=4))
    with pytest.raises(ValueError, match=r"must be at most 0\.\d+") as refused:
        mask(model, (3, 16, 16), target_flops_reduction=0.9, round_to=4)
    named = float(re.search(r"at most ([\d.]+)", str(refused.value)).group(1))
    mask(model, (3, 16, 16), target_flops_reduction=named, round_to=4)


DISTRIBUTED = """
import copy, os, sys
sys.path.insert(0, sys.argv[2])
import torch
from transformers import TrainingArguments
from conftest import PlainConfig, PlainNetwork
from test_trainer import Gradients
from hf_efficient import KDFSConfig, KDFSTrainer

data = torch.load(sys.argv[1] + "/data.pt")
model = PlainNetwork(PlainConfig(num_labels=5))
model.load_state_dict(torch.load(sys.argv[1] + "/model.pt"))
args = TrainingArguments(
    output_dir=sys.argv[1] + "/out", max_steps=2, per_device_train_batch_size=int(sys.argv[3]), use_cpu=True,
    report_to="none", save_strategy="no", disable_tqdm=True, max_grad_norm=0.0, learning_rate=1e-3,
)
assert args.world_size == int(sys.argv[4]), args.world_size
seen, masks = Gradients(), []
trainer = KDFSTrainer(
    copy.deepcopy(model), args, KDFSConfig(target_flops_reduction=0.3), copy.deepcopy(model), train_dataset=data,
    callbacks=[seen],
)
draw = trainer.model.masks
trainer.model.masks = lambda: masks.append(draw()) or masks[-1]
trainer.train()
torch.save({"gradients": seen.steps, "masks": [mask.detach() for mask in masks]},
           f"{sys.argv[1]}/result-{sys.argv[4]}-{args.process_index}.pt")
if args.world_size > 1:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # DistributedDataParallel holds gloo's threads, and those may abort while the interpreter ends
"""


@pytest.mark.slow
def test_two_processes_draw_one_mask_and_have_the_gradients_of_one(network, toy_data, tmp_path):
    model, _ = network("plain")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(toy_data(16, size=12, labels=5), tmp_path / "data.pt")
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED)
    here = Path(__file__).resolve().parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for processes, batch in ((1, 8), (2, 4)):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*launch, str(script), str(tmp_path), str(here), str(batch), str(processes)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    single = torch.load(tmp_path / "result-1-0.pt")
    ranks = [torch.load(tmp_path / f"result-2-{rank}.pt") for rank in (0, 1)]
    assert len(single["masks"]) == 2
    for step in range(2):
        assert torch.equal(ranks[0]["masks"][step], ranks[1]["masks"][step])
        assert torch.equal(ranks[0]["masks"][step], single["masks"][step])
        for name, expected in single["gradients"][step].items():
            for rank in ranks:
                gradients = {key.removeprefix("module."): value for key, value in rank["gradients"][step].items()}
                got = gradients[name]
                assert far(got, expected) < 1e-5, name
