"""ToE for transformers' Trainer: `Trainer(..., callbacks=[ToECallback()])` and nothing else."""

import sys
import time
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .attachment_toe import ToEAttachment, detach, reset_compiler
from .configuration_toe import ToEConfig, check_config
from .expansion_toe import TokenExpansion
from .resume_toe import forget_names, reads_saved_names, renames_on_saving, translate_names


logger = logging.get_logger(__name__)


class ToECallback(TrainerCallback):
    """Train a vision transformer on tokens that grow in stages; the trained model is a plain one.

    The stage follows the trainer's global progress, so a resumed run lands in the right one. Training logs get
    `toe_stage`, `toe_kept_tokens` (patch tokens per image) and `toe_tokens_per_second` (patch tokens handed on by all
    processes, over the time of the training steps). The hook acts on the first forward of each training batch, and a
    warning says when there are more; evaluation and prediction see all tokens.

    Args:
        config (`ToEConfig`, *optional*): The schedule.
        **overrides: Fields of `ToEConfig` that replace those of `config` or of the default.

    Raises:
        ValueError: If a value breaks its rule; model and trainer are checked when training starts.
    """

    expansion_class: type[TokenExpansion] = TokenExpansion

    def __init__(self, config: ToEConfig | None = None, **overrides: Any) -> None:
        check_config(config)
        self.config = ToEConfig(**((config.to_dict() if config is not None else {}) | overrides))
        self._attachment: ToEAttachment | None = None
        self._tokens = 0
        self._seconds = 0.0
        self._step_start = 0.0
        self._warned = False

    @classmethod
    def install(cls, trainer: Trainer, config: ToEConfig | None = None, **overrides: Any) -> "ToECallback":
        """Put the callback in front of all others, so that experiment trackers see its values as well.

        Args:
            trainer (`Trainer`): A trainer; if it has a `ToECallback` already, that one moves to the front.
            config (`ToEConfig`, *optional*): Schedule of a new callback.
            **overrides: Fields of `ToEConfig`.

        Returns:
            `ToECallback`: The callback in front.

        Raises:
            ValueError: If the trainer has one already and a schedule is given as well.
        """
        callback = next((item for item in trainer.callback_handler.callbacks if isinstance(item, cls)), None)
        if callback is None:
            callback = cls(config, **overrides)
            callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        elif config is not None or overrides:
            raise ValueError(
                "`config` must be left out when the trainer has a ToECallback already, which only moves to the front; "
                "remove that one first to change the schedule."
            )
        else:
            trainer.remove_callback(callback)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    @staticmethod
    def detach(model: nn.Module) -> int:
        """Remove the hooks that a training left which ended by an exception.

        These are one before a layer and one behind the model, for YOLOS one behind its middle positions, for timm one
        before its wrapper, and the one that reads the names of a checkpoint. The next training with a `ToECallback`
        removes them by itself. Without one they do nothing, unless a step broke off before it called the model, or by
        the keyboard within the first layers: then the next forward in training mode is shortened. Those of a copy that
        was made in training never do anything.

        Args:
            model (`nn.Module`): The model, wrapped or not.

        Returns:
            `int`: Number of hooks removed.
        """
        removed = detach(model)
        if removed:
            reset_compiler()
        return removed + sum(forget_names(module) for module in model.modules())

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Make sure that a resumed run gets the weights of its checkpoint, see `resume_toe`.

        Args:
            args (`TrainingArguments`): Of the trainer.
            state (`TrainerState`): Of the trainer.
            control (`TrainerControl`): Of the trainer.
            model (`nn.Module`): The model to train.
            **kwargs: Unused.
        """
        if model is not None:
            translate_names(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Check schedule and model against each other and hook in.

        Args:
            args (`TrainingArguments`): Of the trainer.
            state (`TrainerState`): Of the trainer.
            control (`TrainerControl`): Of the trainer.
            model (`nn.Module`): The model to train.
            **kwargs: Unused.

        Raises:
            ValueError: If a stage would start outside the training, the model is refused, or it is not the one that
                the checkpoint holds.
        """
        if detach(model):
            reset_compiler()
        if state.global_step > 0 and not reads_saved_names(model) and renames_on_saving(model):
            raise ValueError(
                "`resume_from_checkpoint` must be given to a new Trainer made with `model=` (not `model_init=`) and "
                f"`callbacks=[ToECallback()]`, because others cannot read the names that {type(model).__name__} is "
                "saved under; this one would go on from other weights than those of the checkpoint."
            )
        translate_names(model)  # for the best checkpoint at the end: made by `model_init`, or trained before
        if self.config.counts_epochs and state.num_train_epochs >= sys.maxsize:
            raise ValueError(
                f"`stage_starts` can count epochs only where the training data has a length, got "
                f"{self.config.stage_starts}; use shares of the training such as (0.0, 0.33, 0.67)."
            )
        last, epochs = self.config.stage_starts[-1], state.num_train_epochs
        if self.config.counts_epochs and last >= epochs:
            length = f"{epochs} epoch" if epochs == 1 else f"{epochs} epochs"
            steps = f" (`max_steps` is {args.max_steps})" if args.max_steps > 0 else ""
            raise ValueError(
                f"`stage_starts` must lie inside the training of {length}{steps}, got {self.config.stage_starts}; "
                "shorten them, or use shares of the training such as (0.0, 0.33, 0.67)."
            )
        self._attachment = ToEAttachment(model, self.expansion_class(self.config)).attach()
        reset_compiler()
        self._tokens, self._seconds, self._warned = 0, 0.0, False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Arm the hook for one forward, in the stage that the global progress is in.

        Args:
            args (`TrainingArguments`): Of the trainer.
            state (`TrainerState`): Of the trainer.
            control (`TrainerControl`): Of the trainer.
            **kwargs: Unused.

        Raises:
            ValueError: If another `ToECallback` has hooked into the model as well.
        """
        self._step_start = time.perf_counter()
        if self._attachment is not None:
            if not self._attachment.in_place:
                raise ValueError(
                    "`callbacks` must hold one ToECallback for a model, but another one has taken the place of this; "
                    "remove one of them."
                )
            done = (state.epoch or 0.0) if self.config.counts_epochs else state.global_step / max(state.max_steps, 1)
            self._attachment.arm(self.config.stage_at(done))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Arm again for the next batch of an accumulated step.

        Args:
            args (`TrainingArguments`): Of the trainer.
            state (`TrainerState`): Of the trainer.
            control (`TrainerControl`): Of the trainer.
            **kwargs: Unused.
        """
        self._count(args)
        self.on_step_begin(args, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Disarm before anything else may call the model.

        Args:
            args (`TrainingArguments`): Of the trainer.
            state (`TrainerState`): Of the trainer.
            control (`TrainerControl`): Of the trainer.
            **kwargs: Unused.
        """
        self._count(args)
        if self._attachment is not None:
            self._attachment.armed = False

    def _count(self, args: TrainingArguments) -> None:
        self._seconds += time.perf_counter() - self._step_start
        if self._attachment is not None and self._attachment.passed_over and not self._warned:
            self._warned = True
            logger.warning(
                "ToE shortens only the first forward pass in training mode of every batch, and a later one saw all "
                "tokens; run passes that need no gradients in evaluation mode, join the others into one batch, or "
                "train in a loop of your own with `token_expansion`, which shortens every pass in training mode."
            )
        shape = self._attachment.last_shape if self._attachment is not None else None
        if shape is not None:
            self._tokens += shape[0] * self._kept_patches(shape[2]) * args.world_size * max(args.n_gpu, 1)

    def _kept_patches(self, rows: int) -> int:
        site = self._attachment.site
        return rows - site.num_prefix_tokens - site.num_suffix_tokens

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add stage, kept tokens and tokens per second to the logs of training steps.

        Args:
            args (`TrainingArguments`): Of the trainer.
            state (`TrainerState`): Of the trainer.
            control (`TrainerControl`): Of the trainer.
            logs (`dict`, *optional*): What is logged; extended in place.
            **kwargs: Unused.
        """
        attachment = self._attachment
        if logs is None or "loss" not in logs or attachment is None or attachment.last_shape is None:
            return
        values = {
            "toe_stage": attachment.stage,
            "toe_kept_tokens": self._kept_patches(attachment.last_shape[2]),
            "toe_tokens_per_second": round(self._tokens / max(self._seconds, 1e-9), 1),
        }
        self._tokens, self._seconds = 0, 0.0
        logs.update(values)
        if state.log_history:  # the trainer has put a copy of the logs there
            state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Leave the model as it came.

        Args:
            args (`TrainingArguments`): Of the trainer.
            state (`TrainerState`): Of the trainer.
            control (`TrainerControl`): Of the trainer.
            model (`nn.Module`): The trained model.
            **kwargs: Unused.
        """
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None
            reset_compiler()
        forget_names(model)
