"""Trainer of a sparse LLaVA: own learning rate for the predictors, logs to every tracker, whole checkpoints."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .callback_dynamic_llava import (
    SWITCHES,
    DynamicLlavaCallback,
    check_trainable,
    find_sparse_model,
    is_training_log,
)
from .loading_dynamic_llava import PREDICTORS
from .pushing_dynamic_llava import PushesNoPickles


STAGING = "_incomplete"  # pushing a run's folder leaves out what begins with an underscore
IN_CONFIG = ("mask_loss_weight", "gumbel_start_temperature", "gumbel_end_temperature")


@dataclass
class DynamicLlavaTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus what only a sparse LLaVA has (Dynamic-LLaVA, Sec. 4.1).

    Args:
        trainable (`str`, defaults to `"all"`): `"all"` trains language model, projector and predictors,
            `"predictors"` the predictors alone. A `PeftModel` keeps the choice of its adapter.
        freeze_vision_tower (`bool`, defaults to `True`): Keep the vision tower as it is.
        predictor_learning_rate (`float`, defaults to 2e-4): Learning rate of the predictors, on the common schedule.
        predictor_weight_decay (`float`, defaults to 0.0): Weight decay of the predictors.
        mask_loss_weight (`float`, *optional*): Written to the model's configuration when set.
        gumbel_start_temperature (`float`, *optional*): Written to the model's configuration when set.
        gumbel_end_temperature (`float`, *optional*): Written to the model's configuration when set.

    Raises:
        ValueError: If `trainable` is neither word, or a rate is negative.
    """

    trainable: str = field(default="all", metadata={"help": "'all' or 'predictors'."})
    freeze_vision_tower: bool = field(default=True, metadata={"help": "Keep the vision tower as it is."})
    predictor_learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate of the predictors."})
    predictor_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the predictors."})
    mask_loss_weight: float | None = field(default=None, metadata={"help": "Weight of the keep-rate losses."})
    gumbel_start_temperature: float | None = field(default=None, metadata={"help": "Temperature at the start."})
    gumbel_end_temperature: float | None = field(default=None, metadata={"help": "Temperature at the end."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainable not in ("all", "predictors"):
            raise ValueError(f"`trainable` must be 'all' or 'predictors', got {self.trainable!r}: choose one.")
        for name in ("predictor_learning_rate", "predictor_weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}: pass a larger value.")


def _setting(args: TrainingArguments, name: str) -> Any:
    """Value of an argument, or its default where plain `TrainingArguments` are given."""
    return getattr(args, name, getattr(DynamicLlavaTrainingArguments, name))


class DynamicLlavaTrainer(PushesNoPickles, Trainer):
    """`Trainer` for a sparse LLaVA.

    Modifications: [`DynamicLlavaCallback`] is always there; the predictors have their own learning rate and weight
    decay; losses and keep rates reach every experiment tracker; a checkpoint is written into a temporary folder and
    renamed when it is whole, so that an interrupted run never leaves half a checkpoint. Everything else is the
    parent's.

    Args:
        model ([`DynamicLlavaForConditionalGeneration`] or `PeftModel`, *optional*): The sparse LLaVA; without it
            `model_init` must return one.
        args ([`DynamicLlavaTrainingArguments`], *optional*): Settings of the run; plain `TrainingArguments` take the
            defaults of the others.
        **kwargs: As in `Trainer`.

    Raises:
        ValueError: If the model is no sparse LLaVA, or its predictors are frozen or wrapped by LoRA.

    Example:
    ```python
    >>> from hf_efficient import DynamicLlavaTrainer, DynamicLlavaTrainingArguments

    >>> args = DynamicLlavaTrainingArguments(output_dir="out", learning_rate=5e-6)
    >>> DynamicLlavaTrainer(model, args, train_dataset=dataset, data_collator=collator).train()
    ```
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DynamicLlavaTrainingArguments | None = None,
        *positional: Any,
        **kwargs: Any,
    ) -> None:
        args = DynamicLlavaTrainingArguments("tmp_trainer") if args is None else args
        if model is not None:
            self._prepare_model(model, args)
        self._staging = False
        self._staged_push: str | None = None
        super().__init__(model, args, *positional, **kwargs)
        self._own_callback = DynamicLlavaCallback.install(self)

    def _prepare_model(self, model: nn.Module, args: TrainingArguments) -> None:
        """Write the run's settings into the configuration and choose what learns."""
        sparse = find_sparse_model(model)
        for name in IN_CONFIG:
            value = _setting(args, name)
            if value is not None:
                setattr(sparse.config, name, value)
        if not hasattr(model, "peft_config"):
            model.requires_grad_(_setting(args, "trainable") == "all")
            for name in PREDICTORS:
                if hasattr(sparse, name):  # the instruct predictor is kept, never trained
                    getattr(sparse, name).requires_grad_(name in SWITCHES)
            if _setting(args, "freeze_vision_tower"):
                sparse.vision_tower.requires_grad_(False)
        check_trainable(sparse)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Call `model_init` and prepare what it returns."""
        model = super().call_model_init(trial)
        self._prepare_model(model, self.args)
        return model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Build the parent's optimiser and move the predictors into groups of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not fresh:
            return optimizer
        decayed = set(self.get_decay_parameter_names(self.model))
        weight_decay = _setting(self.args, "predictor_weight_decay")
        own = {
            id(parameter): weight_decay if name in decayed else 0.0
            for name, parameter in self.model.named_parameters()
            if "score_predictor" in name and parameter.requires_grad
        }
        for group in list(optimizer.param_groups):
            moved: dict[float, list] = {}
            for parameter in group["params"]:
                if id(parameter) in own:
                    moved.setdefault(own[id(parameter)], []).append(parameter)
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            common = {key: value for key, value in group.items() if key != "params"}
            common["lr"] = _setting(self.args, "predictor_learning_rate")
            for decay, parameters in moved.items():
                optimizer.add_param_group({**common, "weight_decay": decay, "params": parameters})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the losses and keep rates of the sparse LLaVA among the values."""
        if is_training_log(logs):
            logs.update(self._own_callback.take_logs(self.model))
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial=trial)
        return os.path.join(run_dir, STAGING) if self._staging else run_dir

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging:
            self._staged_push = checkpoint_folder
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial=trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged = run_dir / STAGING / name
        if self.args.should_save:
            shutil.rmtree(run_dir / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging, self._staged_push = True, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best.exists() or best.name == name):
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            shutil.rmtree(run_dir / name, ignore_errors=True)
            os.replace(staged, run_dir / name)
            shutil.rmtree(run_dir / STAGING, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if self._staged_push is not None:
            super()._push_from_checkpoint(str(run_dir / name))


__all__ = ["DynamicLlavaTrainer", "DynamicLlavaTrainingArguments"]
