"""Checks of the settings and networks of a Pix2Pix training, before it starts."""

from numbers import Integral, Real

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging

from .losses_pix2pix import GAN_LOSSES


logger = logging.get_logger(__name__)
_NO_RECOMPUTING = (
    "the networks keep their activations; a smaller batch with `gradient_accumulation_steps` saves memory"
)
_IN_FLOAT32 = "weights are measured in float32, or in mixed precision with `bf16=True`"
_WHOLE = "both networks have to be whole on every device; `accelerate launch --multi_gpu` trains on several"
# settings of `Trainer` that would be passed over without a word or break in the middle -> why
_LEFT_OUT = {
    "label_smoothing_factor": "images have no classes to smooth",
    "lr_scheduler_kwargs": "the schedule has the one setting `decay_start`",
    "gradient_checkpointing": _NO_RECOMPUTING,
    "activation_checkpointing": _NO_RECOMPUTING,
    "use_liger_kernel": "it has no kernels for these networks",
    "bf16_full_eval": _IN_FLOAT32,
    "fp16_full_eval": _IN_FLOAT32,
    "deepspeed": _WHOLE,
    "fsdp": _WHOLE,
    "parallelism_config": _WHOLE,
}
_OPTIMIZERS_OF_ONE = ("galore", "apollo", "lomo", "adalomo", "schedule_free")  # beginnings of their names


def check_arguments(args: TrainingArguments) -> None:
    """Refuse what a training of two image networks cannot go by.

    Args:
        args ([`Pix2PixTrainingArguments`]): The settings, before `TrainingArguments` reads them.

    Raises:
        ValueError: If a setting is outside its range, or one of `Trainer` is set that a training of two image networks
            would pass over or break on; the sentence names it.
    """
    _check_numbers(args)
    _refuse_what_fits_no_pair(args)


def _check_numbers(args: TrainingArguments) -> None:
    if args.gan_loss not in GAN_LOSSES:
        raise ValueError(f"`gan_loss` must be one of {', '.join(GAN_LOSSES)}, got {args.gan_loss!r}.")
    for name in ("pool_size", "preview_steps", "preview_count"):
        value = getattr(args, name)
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
    for name in ("lambda_l1", "learning_rate", "discriminator_learning_rate", "decay_start", "ema_decay"):
        value = getattr(args, name)
        if not isinstance(value, Real) and not (name == "discriminator_learning_rate" and value is None):
            raise ValueError(f"`{name}` must be a number, got {value!r}.")
    for name in ("lambda_l1", "pool_size", "preview_steps", "learning_rate", "discriminator_learning_rate"):
        value = getattr(args, name)
        if value is not None and not value >= 0:  # also NaN
            raise ValueError(f"`{name}` must be at least 0, got {value}.")
    if not 0 <= args.decay_start <= 1:
        raise ValueError(f"`decay_start` must lie in [0, 1], got {args.decay_start}.")
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"`ema_decay` must lie in [0, 1), got {args.ema_decay}.")
    if args.preview_count < 1:
        raise ValueError(f"`preview_count` must be at least 1, got {args.preview_count}.")


def _refuse_what_fits_no_pair(args: TrainingArguments) -> None:
    if args.lr_scheduler_type not in ("linear", SchedulerType.LINEAR) or args.warmup_steps:
        raise ValueError(
            "`lr_scheduler_type` and `warmup_steps` must be left out: the learning rate is constant, then falls "
            f"linearly from `decay_start` on; got {args.lr_scheduler_type!s} and {args.warmup_steps}."
        )
    reasons = {name: why for name, why in _LEFT_OUT.items() if getattr(args, name)}
    if args.neftune_noise_alpha is not None:  # 0 looks for embeddings as well
        reasons["neftune_noise_alpha"] = "a generator has no embeddings that take noise"
    if args.label_names is not None and list(args.label_names) != ["labels"]:
        reasons["label_names"] = "the wanted images are those under `labels`"
    if args.train_sampling_strategy not in ("random", "sequential"):
        reasons["train_sampling_strategy"] = 'pairs of images have no length; "random" and "sequential" remain'
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer.startswith(_OPTIMIZERS_OF_ONE):
        reasons["optim"] = "it is bound to one network, not two; adamw_torch_fused is the default"
    for name, why in reasons.items():
        value = optimizer if name == "optim" else getattr(args, name)
        raise ValueError(f"`{name}` must be left out, got {value!r}: {why}.")


def check_trainable(name: str, network: nn.Module) -> None:
    """Refuse a network whose weights are not float32: small steps would be rounded away in half precision.

    Args:
        name (`str`): What the network is called in the error.
        network (`nn.Module`): Generator or discriminator.

    Raises:
        ValueError: If one of its parameters has another format.
    """
    found = sorted({str(value.dtype) for value in network.parameters() if value.dtype != torch.float32})
    if found:
        raise ValueError(
            f"`{name}` must hold float32 weights to be trained, got {', '.join(found)}: load it by from_pretrained "
            "with dtype=torch.float32, or call its `float()`; mixed precision is `bf16=True` of the arguments."
        )


def say_what_a_cpu_lacks(args: TrainingArguments) -> None:
    """Warn of a number format that accelerate passes over on a CPU.

    Args:
        args ([`Pix2PixTrainingArguments`]): The settings of a training on a CPU.
    """
    if args.fp16:
        logger.warning("`fp16` does nothing on a CPU: training runs in float32; `bf16=True` works here.")
