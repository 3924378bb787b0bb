"""Settings and networks that a training would pass over in silence or break on are refused before it starts."""

import pytest
import torch
from transformers.utils import logging

from hf_efficient import Pix2PixDiscriminator, Pix2PixModel, Pix2PixTrainer, Pix2PixTrainingArguments


@pytest.fixture
def make(tmp_path, tiny_model):
    """`make(model, discriminator, trainer keywords, **settings)` builds a trainer of two steps on one pair."""
    row = {"pixel_values": torch.full((3, 16, 16), 0.5), "labels": torch.full((3, 16, 16), -0.5)}

    def build(model=None, discriminator=None, keywords=None, **settings) -> Pix2PixTrainer:
        defaults = {"max_steps": 2, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
        args = Pix2PixTrainingArguments(output_dir=str(tmp_path), **{**defaults, **settings})
        opponent = discriminator or Pix2PixDiscriminator(16, base_channels=4)
        return Pix2PixTrainer(
            model or tiny_model, args, opponent, train_dataset=[row], eval_dataset=[row], **keywords or {}
        )

    return build


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bf16", [False, True])
def test_only_float32_weights_are_trained(make, tiny_model, dtype, bf16):
    message = rf"must hold float32 weights to be trained, got {dtype}: load .*dtype=torch\.float32.*`bf16=True`"
    with pytest.raises(ValueError, match="`discriminator` " + message):
        make(discriminator=Pix2PixDiscriminator(16, base_channels=4).to(dtype), bf16=bf16)
    with pytest.raises(ValueError, match="`model` " + message):
        make(tiny_model.to(dtype), bf16=bf16)


def test_a_checkpoint_in_half_precision_trains_as_the_sentence_says(make, tiny_model, tmp_path):
    tiny_model.half().save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match=r"got torch\.float16: load"):
        make(Pix2PixModel.from_pretrained(tmp_path / "half"))  # transformers keeps the format of the file
    assert make(Pix2PixModel.from_pretrained(tmp_path / "half", dtype=torch.float32)).train().global_step == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("label_smoothing_factor", 0.1, "got 0.1: images have no classes"),
        ("lr_scheduler_kwargs", {"num_cycles": 2}, r"got \{'num_cycles': 2\}: .*`decay_start`"),
        ("neftune_noise_alpha", 5.0, "got 5.0: .*embeddings"),
        ("neftune_noise_alpha", 0.0, "got 0.0: .*embeddings"),
        ("gradient_checkpointing", True, "got True: .*`gradient_accumulation_steps`"),
        ("activation_checkpointing", True, "got True: .*`gradient_accumulation_steps`"),
        ("use_liger_kernel", True, "got True: .*no kernels"),
        ("bf16_full_eval", True, "got True: .*`bf16=True`"),
        ("fp16_full_eval", True, "got True: .*`bf16=True`"),
        ("deepspeed", {"zero_optimization": {"stage": 1}}, "got .*: .*`accelerate launch --multi_gpu`"),
        ("fsdp", "full_shard", "got 'full_shard': .*`accelerate launch --multi_gpu`"),
        ("label_names", ["pixel_values"], r"got \['pixel_values'\]: .*`labels`"),
        ("train_sampling_strategy", "group_by_length", "got 'group_by_length': .*no length"),
        ("optim", "galore_adamw", "got 'galore_adamw': .*adamw_torch_fused"),
        ("optim", "schedule_free_adamw", "got 'schedule_free_adamw': .*adamw_torch_fused"),
        ("optim", "lomo", "got 'lomo': .*adamw_torch_fused"),
    ],
)
def test_settings_of_trainer_that_fit_no_two_networks_are_refused(make, name, value, message):
    with pytest.raises(ValueError, match=f"^`{name}` must be left out, {message}"):
        make(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", -1.0, "at least 0, got -1.0"),
        ("discriminator_learning_rate", float("nan"), "at least 0, got nan"),
        ("learning_rate", "2e-4", "a number, got '2e-4'"),  # as YAML reads it
        ("decay_start", "0.5", "a number, got '0.5'"),
        ("ema_decay", None, "a number, got None"),
        ("pool_size", 2.0, "a whole number, got 2.0"),
        ("preview_steps", 0.5, "a whole number, got 0.5"),
        ("preview_count", True, "a whole number, got True"),
    ],
)
def test_a_number_out_of_its_range_is_named(make, name, value, message):
    with pytest.raises(ValueError, match=f"^`{name}` must be {message}"):
        make(**{name: value})


def test_what_the_settings_say_by_default_may_be_said(make):
    quiet = {"label_smoothing_factor": 0.0, "lr_scheduler_kwargs": {}, "label_names": ["labels"], "fsdp": ""}
    run = make(**quiet, gradient_checkpointing=False, train_sampling_strategy="sequential", optim="sgd")
    assert run.train().global_step == 2


def test_a_loss_of_ones_own_is_refused(make):
    with pytest.raises(ValueError, match=r"`compute_loss_func` must be left out, got a function: .*`gan_loss`"):
        make(keywords={"compute_loss_func": lambda *args, **kwargs: 0.0})


@pytest.mark.parametrize(("name", "kind"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")])
def test_sharded_weights_are_refused_where_accelerate_asks_for_them(make, monkeypatch, name, kind):
    """With several processes `accelerate config` may ask for them; one process shards nothing, so it is told so."""
    original = Pix2PixTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(
        Pix2PixTrainer, "create_accelerator_and_postprocess", lambda run: original(run) or setattr(run, name, True)
    )
    with pytest.raises(ValueError, match=rf"whole on every device, got {kind} .*`accelerate launch --multi_gpu`"):
        make()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator takes float16")
def test_float16_on_a_cpu_is_said_to_be_float32(make, monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger("hf_efficient.pix2pix.arguments_pix2pix"), "warning", said.append)
    make(fp16=True)
    assert len(said) == 1
    assert "`fp16`" in said[0]
    assert "`bf16=True`" in said[0]
    make(bf16=True)
    assert len(said) == 1


def test_losses_of_an_interrupted_training_are_not_logged_by_the_next(make):
    run = make(logging_steps=1)
    run._sums["loss_l1"] = [torch.tensor(1e6)]  # what a training that broke off leaves behind
    run.train()
    logged = [entry["loss_l1"] for entry in run.state.log_history if "loss_l1" in entry]
    assert len(logged) == 2
    assert max(logged) < 10
