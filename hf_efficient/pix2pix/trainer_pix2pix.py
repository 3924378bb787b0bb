"""Adversarial training of a Pix2Pix generator (arXiv 1611.07004, Sec. 3) with transformers' `Trainer`.

Each step updates the discriminator on real and generated pairs, then the generator against the updated discriminator.
The generator's optimiser is the `Trainer`'s own; the discriminator has a second one. Both networks and optimisers, the
image pool and the running average of the weights are in every checkpoint, so that a resumed run is the same run.
"""

import contextlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from .arguments_pix2pix import check_arguments, check_trainable, say_what_a_cpu_lacks
from .figures_pix2pix import sample_sheet, save_picture, to_picture
from .losses_pix2pix import ImagePool, discriminator_loss, generator_loss, score_pairs
from .metrics_pix2pix import ImageMetrics
from .modeling_pix2pix import Pix2PixDiscriminator, Pix2PixModel
from .pairs_pix2pix import check_first_row
from .pushing_pix2pix import PushesNoPickles


_RAW_WEIGHTS, _DISCRIMINATOR = "generator_raw.safetensors", "discriminator.safetensors"
_DISCRIMINATOR_STATE = "discriminator_state.pt"
_ARCHITECTURE = ("generator", "num_levels", "base_channels", "norm", "num_channels", "num_output_channels")


@dataclass
class Pix2PixTrainingArguments(TrainingArguments):
    """Settings of a [`Pix2PixTrainer`].

    Defaults that differ from [`TrainingArguments`], all from the paper (Sec. 3.3): `learning_rate` 2e-4, `adam_beta1`
    0.5, `weight_decay` and `max_grad_norm` 0, `num_train_epochs` 200, `per_device_train_batch_size` 1; and for images:
    `remove_unused_columns` off, `batch_eval_metrics` on, `logging_nan_inf_filter` off, `ddp_broadcast_buffers` off;
    on a CPU `dataloader_pin_memory` is off, since there is nothing to copy to.
    The schedule is the one of `decay_start`; `lr_scheduler_type` and warm-up are refused, and so is what fits no pair
    of image networks: label smoothing, NEFTune, activation checkpointing, Liger kernels, evaluation in half precision,
    DeepSpeed, FSDP, sampling by length, label names, and optimisers that are bound to one network. `weight_decay` and
    `max_grad_norm` are the generator's.

    Args:
        gan_loss (`str`, defaults to `"vanilla"`): `"vanilla"` (cross entropy, Eq. 1), `"lsgan"`, `"hinge"`, or
            `"none"` for L1 alone (the paper's control).
        lambda_l1 (`float`, defaults to 100.0): Weight of the L1 loss (Eq. 4), at least 0.
        pool_size (`int`, defaults to 0): Earlier outputs the discriminator is also shown; 0 = only the latest.
        decay_start (`float`, defaults to 0.5): Share of the steps after which the learning rate falls linearly to 0,
            in `[0, 1]`; 1 = never.
        discriminator_learning_rate (`float`, *optional*): Where it differs from `learning_rate`.
        ema_decay (`float`, defaults to 0.0): Decay of the generator's average from its first weights on, in `[0, 1)`.
            With it, evaluation, previews and checkpoints show the average. 0 = off.
        preview_steps (`int`, defaults to 0): Steps between two preview sheets in `previews/`; 0 = none.
        preview_count (`int`, defaults to 4): Rows of a sheet.
    """

    gan_loss: str = field(default="vanilla", metadata={"help": "vanilla, lsgan, hinge or none"})
    lambda_l1: float = field(default=100.0, metadata={"help": "weight of the L1 loss"})
    pool_size: int = field(default=0, metadata={"help": "earlier outputs shown to the discriminator"})
    decay_start: float = field(default=0.5, metadata={"help": "share of steps before the learning rate falls"})
    discriminator_learning_rate: float | None = field(default=None, metadata={"help": "if not learning_rate"})
    ema_decay: float = field(default=0.0, metadata={"help": "decay of the averaged weights, 0 = off"})
    preview_steps: int = field(default=0, metadata={"help": "steps between preview sheets, 0 = none"})
    preview_count: int = field(default=4, metadata={"help": "rows of a preview sheet"})
    learning_rate: float = field(default=2e-4, metadata={"help": "initial learning rate of Adam"})
    adam_beta1: float = field(default=0.5, metadata={"help": "beta1 of Adam"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "clipping of the generator's gradient, 0 = none"})
    num_train_epochs: float = field(default=200.0, metadata={"help": "passes over the data"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "pairs a step and device"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "rows are made of images"})
    batch_eval_metrics: bool = field(default=True, metadata={"help": "measure batch by batch"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "training stops at NaN instead"})

    def __post_init__(self) -> None:
        check_arguments(self)
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # running averages are written between two forwards of one step
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
            say_what_a_cpu_lacks(self)


class Pix2PixTrainer(PushesNoPickles, Trainer):
    """Trains a generator against a discriminator.

    Args:
        model ([`Pix2PixModel`]): The generator.
        args ([`Pix2PixTrainingArguments`]): Settings.
        discriminator ([`Pix2PixDiscriminator`], *optional*): Its opponent; left out, a 70x70 PatchGAN with the
            generator's width and norm.
        **kwargs: As in [`Trainer`]. Rows of the data sets hold `pixel_values` and `labels`, see [`ImagePairs`].
            Without `compute_metrics` an evaluation measures PSNR and SSIM (torchmetrics). `optimizers` and
            `optimizer_cls_and_kwargs` are the generator's; the discriminator's optimiser follows `args`.

    Raises:
        TypeError: If `model` is no [`Pix2PixModel`], or `args` are plain [`TrainingArguments`].
        ValueError: If a network does not hold float32 weights, a loss function is given, accelerate is set to shard
            networks, `discriminator` takes another number of channels than source and target have together, or the
            first row of a data set lacks an image or has one of another shape than the generator takes or, to train
            on, too small for the discriminator; while training, if an image cannot be read, the images of a pair
            differ in size, or a checkpoint holds other networks.
        FloatingPointError: While training, when a loss is no longer finite. The step is not applied and the model
            holds the weights of the last checkpoint.
    """

    _left_out = (_DISCRIMINATOR, _RAW_WEIGHTS)  # of a push

    def __init__(
        self,
        model: Pix2PixModel,
        args: Pix2PixTrainingArguments,
        discriminator: Pix2PixDiscriminator | None = None,
        **kwargs: Any,
    ) -> None:
        if getattr(getattr(model, "config", None), "model_type", None) != Pix2PixModel.config_class.model_type:
            raise TypeError(f"`model` must be a Pix2PixModel, got {type(model).__name__}.")
        if not isinstance(args, Pix2PixTrainingArguments):
            raise TypeError(f"`args` must be Pix2PixTrainingArguments, got {type(args).__name__}.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                f"`compute_loss_func` must be left out, got a {type(kwargs['compute_loss_func']).__name__}: the "
                "losses are those of `gan_loss` and `lambda_l1`."
            )
        check_trainable("model", model)
        if discriminator is not None:
            check_trainable("discriminator", discriminator)
        if kwargs.get("compute_metrics") is None:
            kwargs["compute_metrics"] = ImageMetrics()
        super().__init__(model=model, args=args, **kwargs)
        # by the settings of accelerate, which are in no argument
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            found = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP"
            raise ValueError(
                f"Both networks must be whole on every device, got {found} from the settings of accelerate: train on "
                "several GPUs by `accelerate launch --multi_gpu`."
            )
        self.model_accepts_loss_kwargs = False
        config = model.config
        sides: tuple[int, ...] = ()
        if kwargs.get("data_collator") is None:
            several = isinstance(self.eval_dataset, dict)
            for data in self.eval_dataset.values() if several else [self.eval_dataset]:
                check_first_row("eval_dataset", data, config)
            sides = check_first_row("train_dataset", self.train_dataset, config)
        channels = config.num_channels + config.num_output_channels
        if discriminator is None:
            discriminator = Pix2PixDiscriminator(70, channels, config.base_channels, config.norm)
        if discriminator.layers[0].in_channels != channels:
            raise ValueError(
                f"`discriminator` must take {channels} channels, those of source and target together, got "
                f"{discriminator.layers[0].in_channels}; set its `num_channels`."
            )
        if sides and args.gan_loss != "none" and min(sides) < discriminator.smallest_side:
            raise ValueError(
                f"Images of `train_dataset` must be at least {discriminator.smallest_side} pixels high and wide for a "
                f"discriminator of `receptive_field={discriminator.receptive_field}`, got {sides[0]}x{sides[1]}; "
                "build it with a smaller receptive field or take larger images."
            )
        self.discriminator = self.discriminator_wrapped = discriminator.to(args.device)
        self.discriminator_optimizer = self.discriminator_scheduler = None
        self.pool = ImagePool(args.pool_size, args.seed + args.process_index)
        self.average: dict[str, Tensor] | None = None
        self._held: list[tuple[dict[str, Tensor], list[Tensor]]] = []
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._staging: str | None = None
        self._last_checkpoint: Path | None = None  # of this run
        self.add_callback(_EveryStep(self))

    # ---- two optimisers ----

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple:
        """Modifications: the discriminator and its optimiser are prepared, too, before checkpoints are read."""
        cls, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        rate = self.args.discriminator_learning_rate
        settings = {**settings, "lr": self.args.learning_rate if rate is None else rate, "weight_decay": 0.0}
        optimizer = cls(self.discriminator.parameters(), **settings)
        self.discriminator_wrapped, self.discriminator_optimizer = self.accelerator.prepare(
            self.discriminator, optimizer
        )
        self._held.clear()  # of a step that was interrupted
        self._sums.clear()
        self._last_checkpoint = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        self.average = None
        if self.args.ema_decay > 0:
            self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Build both schedules: constant, then a linear fall to 0 from `decay_start` on.

        Args:
            num_training_steps (`int`): Steps of the whole training.
            optimizer (`torch.optim.Optimizer`, *optional*): The generator's, as in [`Trainer`].

        Returns:
            `torch.optim.lr_scheduler.LRScheduler`: The generator's schedule.
        """

        def factor(step: int) -> float:
            begin = self.args.decay_start * num_training_steps
            return 1.0 if step <= begin else max(0.0, (num_training_steps - step) / (num_training_steps - begin))

        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        if self.discriminator_optimizer is not None:
            self.discriminator_scheduler = torch.optim.lr_scheduler.LambdaLR(self.discriminator_optimizer, factor)
        return self.lr_scheduler

    # ---- one step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one micro-batch; the last one of a step updates the discriminator and gives the generator its gradient.

        With gradient accumulation the discriminator first sees outputs of all micro-batches, made without keeping
        activations; then the generator runs again on each, so that both losses are those of one large batch.

        Args:
            model (`nn.Module`): The generator, as wrapped for training.
            inputs (`dict[str, torch.Tensor]`): `pixel_values` and `labels`.
            num_items_in_batch (`int`, *optional*): Unused.

        Returns:
            `torch.FloatTensor` of shape `()`: The generator's loss of the whole step; 0 for its earlier micro-batches.
        """
        model.train()
        self.discriminator.train()
        inputs = self._prepare_inputs(inputs)
        if not {"pixel_values", "labels"} <= inputs.keys():
            raise ValueError(f"Rows of the data set must hold `pixel_values` and `labels`, got {', '.join(inputs)}.")
        inputs = {name: inputs[name] for name in ("pixel_values", "labels")}
        shapes = [tuple(value.shape[2:]) for value in inputs.values()]
        if shapes[0] != shapes[1]:
            raise ValueError(f"Both images of a pair must have one size, got {shapes[0]} and {shapes[1]} pixels.")
        count, last = self.current_gradient_accumulation_steps, self.accelerator.sync_gradients
        again = count > 1 and self.args.gan_loss != "none"  # the generator runs twice on these inputs
        self._held.append((inputs, _random_state(self.args.device) if again else []))
        output = None
        if self.args.gan_loss != "none":
            with torch.set_grad_enabled(count == 1), self.compute_loss_context_manager():
                network = model if count == 1 else self.model
                output = network(inputs["pixel_values"], return_dict=True).reconstruction
            sync = contextlib.nullcontext() if last else self.accelerator.no_sync(self.discriminator_wrapped)
            with sync:
                self._discriminator_backward(inputs, output.detach(), count)
        if not last:
            return torch.zeros((), device=self.args.device)
        if self.args.gan_loss != "none":
            self.discriminator_optimizer.step()
            self.discriminator_optimizer.zero_grad()
        return self._generator_backward(model, output if count == 1 else None)

    def _discriminator_backward(self, inputs: dict[str, Tensor], output: Tensor, count: int) -> None:
        fakes = self.pool.query(inputs["pixel_values"], output)
        with self.compute_loss_context_manager():
            scores = score_pairs(self.discriminator_wrapped, inputs["pixel_values"], inputs["labels"], fakes)
            loss = discriminator_loss(*(score.float() for score in scores), self.args.gan_loss)
        self._check_finite("discriminator", loss)
        self._sums["loss_discriminator"].append(loss.detach())
        self.accelerator.backward(loss / count)

    def _generator_backward(self, model: nn.Module, output: Tensor | None) -> Tensor:
        held, self._held = self._held, []
        total = torch.zeros((), device=self.args.device)
        learning = [parameter for parameter in self.discriminator.parameters() if parameter.requires_grad]
        self.discriminator.requires_grad_(False)
        try:
            for number, (inputs, state) in enumerate(held):
                sync = contextlib.nullcontext() if number == len(held) - 1 else self.accelerator.no_sync(model)
                with sync:
                    if state:
                        _set_random_state(state, self.args.device)
                    loss = self._generator_loss(model, inputs, output)
                    self._check_finite("generator", loss)
                    self.accelerator.backward(loss / len(held))
                total += loss.detach() / len(held)
        finally:
            for parameter in learning:  # the others were frozen by the user
                parameter.requires_grad_(True)
        return total

    def _generator_loss(self, model: nn.Module, inputs: dict[str, Tensor], output: Tensor | None) -> Tensor:
        with self.compute_loss_context_manager():
            output = model(inputs["pixel_values"], return_dict=True).reconstruction if output is None else output
            distance = F.l1_loss(output.float(), inputs["labels"].float())
            self._sums["loss_l1"].append(distance.detach())
            loss = self.args.lambda_l1 * distance
            if self.args.gan_loss != "none":
                scores = self.discriminator(inputs["pixel_values"], output.to(inputs["pixel_values"].dtype))
                adversarial = generator_loss(scores.float(), self.args.gan_loss)
                self._sums["loss_gan"].append(adversarial.detach())
                loss = loss + adversarial
        return loss

    def _check_finite(self, network: str, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            self._stop(f"The {network}'s loss became {loss.item()} at step {self.state.global_step + 1}")

    def _stop(self, what: str) -> None:
        """Load the weights that the last checkpoint shows and end the training with one sentence."""
        self._held.clear()
        checkpoint = self._last_checkpoint
        if checkpoint is None:
            kept = "no checkpoint was written yet"
        else:
            self.model.load_state_dict(load_file(checkpoint / "model.safetensors"))
            self.average = None
            kept = f"the model holds the weights of the last good checkpoint, {checkpoint}"
        raise FloatingPointError(f"{what}: training stopped before this step and {kept}; lower `learning_rate`.")

    def _after_step(self) -> None:
        """Advance what follows the generator's optimiser step."""
        if self.args.gan_loss != "none":
            self.discriminator_scheduler.step()
        if self.average is not None:
            for name, value in self.model.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - self.args.ema_decay)
                else:
                    self.average[name].copy_(value)
        steps = self.args.preview_steps
        if steps and self.state.global_step % steps == 0 and self.is_world_process_zero():
            save_picture(self.preview(), Path(self.args.output_dir) / "previews" / f"{self.state.global_step:07d}.png")

    # ---- what a person sees ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of each loss since the last time (of this process).

        Args:
            logs (`dict[str, float]`): Values to log.
            start_time (`float`, *optional*): Start of the training.
        """
        if "loss" in logs:
            logs.update({name: torch.stack(values).mean().item() for name, values in self._sums.items()})
            self._sums.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    def preview(self) -> Any:
        """Draw source, output and target of the first pairs.

        Returns:
            `PIL.Image.Image`: The sheet; pairs come from the evaluation data where there are some, of several data
            sets from the first.
        """
        data = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        data = next(iter(data.values())) if isinstance(data, dict) else data
        training, rows = self.model.training, []
        with self._averaged():
            self.model.eval()
            for row in islice(iter(data), self.args.preview_count):  # also of a stream
                pair = self._prepare_inputs(self.data_collator([row]))
                output = self.model(pair["pixel_values"].to(self.model.dtype), return_dict=True).reconstruction
                images = (pair["pixel_values"], output, pair["labels"])
                rows.append([to_picture(image[0].float().cpu().numpy()) for image in images])
            self.model.train(training)
        return sample_sheet(rows, ["source", f"step {self.state.global_step}", "target"])

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model for a while."""
        if self.average is None or not self.is_in_train:
            yield
            return
        raw = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        try:
            yield
        finally:
            self.model.load_state_dict(raw)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the averaged weights where there are some; else as in [`Trainer`].

        Args:
            *args: As in [`Trainer`].
            **kwargs: As in [`Trainer`].

        Returns:
            `EvalLoopOutput`: As in [`Trainer`].
        """
        if isinstance(self.compute_metrics, ImageMetrics):
            self.compute_metrics.totals.clear()  # of an evaluation that broke off
        epochs = [(data, int(data.epoch)) for data in _augmented(self.train_dataset) if hasattr(data, "epoch")]
        try:
            with self._averaged():
                return super().evaluation_loop(*args, **kwargs)
        finally:
            for data, epoch in epochs:
                data.set_epoch(epoch)  # what is evaluated on as well was set to epoch 0

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else self._staging

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Modifications: the folder gets its name when all of it is there, and never holds infinite weights."""
        networks = {"generator": self.model, "discriminator": self.discriminator}
        for name, network in networks.items():
            if not all(torch.isfinite(value).all() for value in network.parameters()):
                self._stop(f"A weight of the {name} is no longer finite after step {self.state.global_step}")
        if self.args.push_to_hub:  # the upload runs on in the background and needs the final folder
            super()._save_checkpoint(model, trial)
            self._last_checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            return
        run, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        staging = run / f".saving-{name}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self._staging = str(staging)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._name_best(staging / name, run / name)
                shutil.rmtree(run / name, ignore_errors=True)
                os.replace(staging / name, run / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise OSError(
                f"{name} could not be written to {run} ({reason}); earlier checkpoints are whole."
            ) from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        self._last_checkpoint = run / name
        best = self.state.best_model_checkpoint
        if self.args.should_save:
            rotate_checkpoints(str(run), self.args.save_total_limit, best, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _name_best(self, staged: Path, final: Path) -> None:
        """Write the final name of a best checkpoint into its own state."""
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(staged / "trainer_state.json"))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Modifications: a checkpoint shows the averaged weights where there are some."""
        with self._averaged():
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.pool.state_dict(), folder / f"image_pool_{self.args.process_index}.pt")
        if not self.args.should_save:
            return
        save_file(_plain(self.discriminator.state_dict()), folder / _DISCRIMINATOR)
        state = {
            "optimizer": self.discriminator_optimizer.state_dict(),
            "scheduler": self.discriminator_scheduler.state_dict(),
        }
        torch.save(state, folder / _DISCRIMINATOR_STATE)
        if self.average is not None:
            save_file(_plain(self.model.state_dict()), folder / _RAW_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Modifications: other networks are refused, where the base class warns and goes on with random weights."""
        file = Path(resume_from_checkpoint) / "config.json"
        if file.is_file():
            saved, own = json.loads(file.read_text(encoding="utf-8")), self.model.config.to_dict()
            other = [name for name in _ARCHITECTURE if saved.get(name) != own[name]]
            if other:
                listed = ", ".join(f"`{name}` {saved.get(name)!r} instead of {own[name]!r}" for name in other)
                raise ValueError(
                    f"{resume_from_checkpoint} holds another generator than the one to train: {listed}; train in "
                    "another `output_dir` or build the generator from the checkpoint's configuration."
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not (folder / _DISCRIMINATOR).exists():
            raise ValueError(
                f"{folder} is no whole checkpoint of a Pix2PixTrainer: {_DISCRIMINATOR} is missing, as with "
                "`save_only_model`; load its generator with from_pretrained and start a new training."
            )
        weights, own = load_file(folder / _DISCRIMINATOR), self.discriminator.state_dict()
        if {name: value.shape for name, value in weights.items()} != {name: own[name].shape for name in own}:
            raise ValueError(
                f"{folder} holds another discriminator than the one to train; build it with the same receptive field, "
                "width and norm, or train in another `output_dir`."
            )
        self.discriminator.load_state_dict(weights)
        state = torch.load(folder / _DISCRIMINATOR_STATE, map_location="cpu", weights_only=True)
        self.discriminator_optimizer.load_state_dict(state["optimizer"])
        self.discriminator_scheduler.load_state_dict(state["scheduler"])
        pool = folder / f"image_pool_{self.args.process_index}.pt"
        if pool.exists():  # missing where training goes on with more processes
            self.pool.load_state_dict(torch.load(pool, map_location="cpu", weights_only=True), self.args.device)
        if (folder / _RAW_WEIGHTS).exists():
            if self.average is not None:
                self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(load_file(folder / _RAW_WEIGHTS))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Modifications: the trained model is the averaged one where there is one."""
        if self.average is not None:
            self.model.load_state_dict(self.average)
            self.average = None
        return super()._finalize_training(*args, **kwargs)


def _augmented(data: Any) -> Iterator[Any]:
    """The data sets inside of `Subset`, `ConcatDataset` and the like whose augmentation depends on the epoch."""
    if hasattr(data, "set_epoch"):
        yield data
    elif data is not None:
        for part in (getattr(data, "dataset", None), *(getattr(data, "datasets", None) or ())):
            yield from _augmented(part)


class _EveryStep(TrainerCallback):
    """Calls the trainer after each step and tells the data the epoch."""

    def __init__(self, trainer: Pix2PixTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the epoch's augmentation; `state.epoch` may lie inside the epoch after a resume."""
        for data in _augmented(self.trainer.train_dataset):
            data.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the schedule, the average and the previews."""
        self.trainer._after_step()


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in state.items()}


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.random.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.random.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
