"""Trains a sparse LLaVA with any stock `Trainer`: temperature schedule, checks and logs."""

from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .modeling_dynamic_llava import DynamicLlavaModel
from .sparsity_dynamic_llava import gumbel_temperature


SWITCHES = {
    "image_score_predictor": "use_vision_predictor",
    "output_text_score_predictor": "use_output_text_predictor",
}


def find_sparse_model(model: nn.Module) -> DynamicLlavaModel:
    """Find the sparse LLaVA inside a model, a `PeftModel` or a wrapper.

    Args:
        model (`nn.Module`): What the trainer holds.

    Raises:
        ValueError: If there is none.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if "gumbel_temperature" in vars(module):  # not hasattr: a wrapper answers for the module inside it
            return module
    raise ValueError(
        f"`model` must hold a DynamicLlavaForConditionalGeneration, got {type(model).__name__}: make one with "
        "`DynamicLlavaForConditionalGeneration.from_llava(model)`."
    )


def check_trainable(model: DynamicLlavaModel) -> None:
    """Refuse predictors that would not learn.

    Args:
        model ([`DynamicLlavaModel`]): The inner model.

    Raises:
        ValueError: If sparsity is off, a predictor is frozen, or one is wrapped by LoRA.
    """
    if not model.settings().active:
        raise ValueError(
            "`use_vision_predictor` with a `vision_keep_rate` below 1, or `use_output_text_predictor`, must be on to "
            f"train a sparse LLaVA, got a keep rate of {model.config.vision_keep_rate} and no text predictor: switch "
            "one on, or train the dense model."
        )
    active = [name for name, switch in SWITCHES.items() if getattr(model.config, switch)]
    for name in active:
        parameters = dict(getattr(model, name).named_parameters())
        adapted = [key for key in parameters if "lora_" in key]
        if adapted:
            raise ValueError(
                f"`target_modules` must not reach the predictors, got LoRA weights {name}.{adapted[0]}: use "
                'target_modules=r".*language_model.*(q_proj|k_proj|v_proj|o_proj)" and modules_to_save='
                '["image_score_predictor", "output_text_score_predictor"].'
            )
        if parameters and not any(parameter.requires_grad for parameter in parameters.values()):
            raise ValueError(
                f"`{name}` must be trainable, got frozen weights: unfreeze it, with peft by modules_to_save="
                '["image_score_predictor", "output_text_score_predictor"].'
            )


def is_training_log(logs: dict[str, Any]) -> bool:
    """Whether a `Trainer` logs training steps: all processes do so together, unlike what users log."""
    return "loss" in logs and "learning_rate" in logs


def _over_processes(sums: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """Add up sums and counts of all processes; a process may lack a name (a batch without images)."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return sums
    parts: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, sums)
    names = sorted({name for part in parts for name in part})
    return {name: tuple(map(sum, zip(*(part[name] for part in parts if name in part)))) for name in names}


class DynamicLlavaCallback(TrainerCallback):
    """Makes a stock `Trainer` train a sparse LLaVA (Dynamic-LLaVA, Sec. 3.3 and 4.1).

    Sets the Gumbel temperature from the trainer's global progress, so a resumed run goes on where it stopped, and adds
    the losses, keep rates and the temperature to the logs: `language_loss`, `vision_loss`, `text_loss` (unweighted
    means since the last log), `vision_keep_rate`, `text_keep_rate`, `gumbel_temperature`. They reach the console and
    `trainer_state.json`; experiment trackers see them when the callback comes first, see [`install`]. Which weights
    learn is left to you: freeze the vision tower with `model.model.vision_tower.requires_grad_(False)`.

    Raises:
        ValueError: At the start of training, if the model is no sparse LLaVA, nothing of it can learn sparsity, or the
            labels would not reach it.

    Example:
    ```python
    >>> from transformers import Trainer
    >>> from hf_efficient import DynamicLlavaCallback

    >>> Trainer(model, args, train_dataset=dataset, callbacks=[DynamicLlavaCallback()]).train()
    ```
    """

    def __init__(self) -> None:
        self._seen: dict[str, list[torch.Tensor]] = {}

    @classmethod
    def install(cls, trainer: Trainer) -> Self:
        """Put the callback of a trainer before all others, adding one if there is none.

        Args:
            trainer (`Trainer`): Any trainer.

        Returns:
            The callback.
        """
        callbacks = trainer.callback_handler.callbacks
        own = next((callback for callback in callbacks if isinstance(callback, cls)), None) or cls()
        trainer.callback_handler.callbacks = [own, *(callback for callback in callbacks if callback is not own)]
        return own

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        """Check that the predictors can learn."""
        if args.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` must be 0 to train a sparse LLaVA (it hides the labels from the model), got "
                f"{args.label_smoothing_factor}: leave it out."
            )
        self._seen = {}
        check_trainable(find_sparse_model(model))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        """Set the temperature of the coming optimiser step."""
        sparse = find_sparse_model(model)
        config, progress = sparse.config, state.global_step / max(state.max_steps, 1)
        sparse.gumbel_temperature = gumbel_temperature(
            config.gumbel_start_temperature, config.gumbel_end_temperature, progress
        )

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        """Remember what the forward pass of an accumulation step kept and lost."""
        sparse = find_sparse_model(model)
        record = sparse.last_sparsity
        if record is None:
            return
        for name, loss in record.losses.items():
            self._seen.setdefault(f"{name}_loss", []).append(loss)
        for name in ("vision_keep_rate", "text_keep_rate"):
            rate = getattr(record, name)
            if rate is not None:
                self._seen.setdefault(name, []).append(torch.tensor(rate))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        """Remember what the forward pass kept and lost."""
        self.on_substep_end(args, state, control, model=model, **kwargs)

    def take_logs(self, model: nn.Module) -> dict[str, float]:
        """Mean values of all processes since the last call, and the temperature in force; empty before the first step.

        Args:
            model (`nn.Module`): What the trainer holds.
        """
        sums = {
            name: (torch.stack([value.float().cpu() for value in seen]).sum().item(), len(seen))
            for name, seen in self._seen.items()
        }
        self._seen = {}
        sums = _over_processes(sums)
        if not sums:
            return {}
        logs = {name: round(total / count, 6) for name, (total, count) in sums.items()}
        logs["gumbel_temperature"] = round(find_sparse_model(model).gumbel_temperature, 6)
        return logs

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        logs: dict[str, Any] | None = None,
        **kwargs,
    ) -> None:
        """Add the values to the trainer's own logs of a training step."""
        if logs is None or not is_training_log(logs):
            return
        values = self.take_logs(model)
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)


__all__ = ["DynamicLlavaCallback", "check_trainable", "find_sparse_model", "is_training_log"]
