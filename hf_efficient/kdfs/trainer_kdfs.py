"""Two trainers: distillation from a teacher, and the sampling phase that learns masks on top of it."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.utils import logging

from .configuration_kdfs import KDFSConfig
from .importance_kdfs import first_rows, own_random_state, start_from_sensitivity
from .losses_kdfs import distillation_loss, flops_loss, reconstruction_loss
from .masking_kdfs import FeatureTaps, KDFSMaskedModel
from .pushing_kdfs import PushesNoPickles
from .rows_kdfs import batch_is_sound, check_columns, first_image
from .sampling_kdfs import gumbel_temperature
from .saving_kdfs import disk_is_named
from .slicing_kdfs import host_network
from .structure_kdfs import NetworkStructure, read_structure
from .tracing_kdfs import example_input


logger = logging.get_logger(__name__)


def check_teacher(teacher: nn.Module, model: nn.Module) -> None:
    """Refuse a teacher that answers another question.

    Args:
        teacher (`nn.Module`): The teacher.
        model (`nn.Module`): The student.

    Raises:
        ValueError: If the label sets differ.
    """
    theirs, ours = getattr(teacher, "config", None), getattr(model, "config", None)
    if theirs is None or ours is None:
        return
    if theirs.num_labels != ours.num_labels:
        raise ValueError(
            f"`teacher` must have the model's labels, but has {theirs.num_labels} labels and the model "
            f"{ours.num_labels}; use a teacher trained on the same classes."
        )
    named = [config.id2label for config in (theirs, ours) if config.id2label.get(0) != "LABEL_0"]
    if len(named) == 2 and named[0] != named[1]:
        label = next(index for index in named[1] if named[0].get(index) != named[1][index])
        raise ValueError(
            f"`teacher` must have the model's labels in the same order, but label {label} is {named[0].get(label)!r} "
            f"there and {named[1][label]!r} in the model; use a teacher trained on the same classes."
        )


def _image_size(network: nn.Module) -> tuple[int, int] | None:
    """Height and width that a configuration names."""
    config = getattr(network, "config", None)
    size = getattr(config, "image_size", None)
    size = size or ((getattr(config, "pretrained_cfg", None) or {}).get("input_size") or (None,))[-2:]
    size = (size, size) if isinstance(size, int) else tuple(size)
    return size if len(size) == 2 else None


def check_arguments(args: TrainingArguments | None, compute_loss_func: Any | None = None) -> None:
    """Refuse what a [`~transformers.Trainer`] does and these do not.

    Args:
        args (`TrainingArguments`, *optional*): Settings of the training.
        compute_loss_func (`Any`, *optional*): A loss to take in place of the model's.

    Raises:
        ValueError: If `label_smoothing_factor` or `compute_loss_func` asks for another loss, or one process sees
            several GPUs, among which a Trainer would split every batch without the masks.
    """
    if compute_loss_func is not None:
        raise ValueError("`compute_loss_func` must be None, since the losses are those of KDFS; leave it out.")
    if args is None:
        return
    if args.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor` must be 0, but is {args.label_smoothing_factor}; the teacher's answers soften "
            "the labels: raise `kd_weight` instead."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"Every process must have one GPU, but this one sees {args.n_gpu}; start it with `accelerate launch` or "
            "`torchrun`, or let it see one with CUDA_VISIBLE_DEVICES=0."
        )


class NamedProgress(ProgressCallback):
    """The Trainer's progress bar with a name before it.

    Args:
        name (`str`): What the steps are for.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the bar, and name it."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)


def name_progress(trainer: Trainer, name: str) -> None:
    """Name the progress bar of a trainer, if it shows one in a terminal.

    Args:
        trainer ([`~transformers.Trainer`]): Not yet training.
        name (`str`): What its steps are for.
    """
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(NamedProgress(name))


class DistillationTrainer(PushesNoPickles, Trainer):
    """Cross entropy plus distillation, `CE + kd_weight * T^2 KL(teacher || student)`, for any image classifier.

    Args:
        teacher (`nn.Module`, *optional*): Returns logits or `.logits`. It is moved to the device of the training, put
            into evaluation mode and frozen, and stays so; hand in a copy if you train it elsewhere. `None`: cross
            entropy alone.
        kd_weight (`float`, *optional*, defaults to 0.05): Weight of the distillation loss.
        kd_temperature (`float`, *optional*, defaults to 3.0): Its temperature.
        kwargs (`Any`): As of [`~transformers.Trainer`], without a loss of your own.

    Raises:
        ValueError: If `label_smoothing_factor` or `compute_loss_func` asks for another loss, one process sees several
            GPUs, or columns of which a dataset makes its images would be removed.
    """

    loss_is_scaled_for_ga = False  # every micro step is a mean over its images: Trainer divides by their number

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None = None,
        kd_weight: float = 0.05,
        kd_temperature: float = 3.0,
        **kwargs: Any,
    ) -> None:
        check_arguments(kwargs.get("args", args[1] if len(args) > 1 else None), kwargs.get("compute_loss_func"))
        super().__init__(*args, **kwargs)
        held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else (self.eval_dataset,)
        for name, datasets in (("train_dataset", (self.train_dataset,)), ("eval_dataset", held_out)):
            for dataset in datasets:
                check_columns(dataset, name, self.args.remove_unused_columns)
        self.kd_weight, self.kd_temperature = kd_weight, kd_temperature
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval().requires_grad_(False)
        weights = () if teacher is None else teacher.parameters()
        self._teacher_dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), None)
        self._loss_parts: dict[str, Tensor] = {}
        self._loss_count = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; afterwards the model computes in the precision of its weights again, not in that of `bf16` or `fp16`.

        Args:
            args (`Any`): As of [`~transformers.Trainer.train`].
            kwargs (`Any`): Likewise.

        Returns:
            `TrainOutput`: As of [`~transformers.Trainer.train`].
        """
        try:
            output = super().train(*args, **kwargs)
        except BaseException:
            for callback in self.callback_handler.callbacks:  # else drawn again below the last sentence
                if getattr(callback, "training_bar", None) is not None:
                    callback.training_bar.close()
            raise
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # its forward would keep the autocast
        return output

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with disk_is_named(self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one micro batch.

        Args:
            model (`nn.Module`): The student, wrapped or not.
            inputs (`dict`): `pixel_values` and `labels`.
            return_outputs (`bool`, *optional*, defaults to `False`): Also return the student's output.
            num_items_in_batch (`Any`, *optional*): Unused, see `loss_is_scaled_for_ga`.

        Returns:
            `torch.FloatTensor` without axes, or a tuple of it and the output.

        Raises:
            ValueError: If a label is none of the model's, or a batch has too few images to be normalised.
        """
        with batch_is_sound():
            output = model(pixel_values=inputs["pixel_values"], labels=inputs["labels"])
        parts = {"cross_entropy": output.loss}
        if model.training:
            parts.update(self.extra_losses(output, inputs["pixel_values"]))
            for name, value in parts.items():
                self._loss_parts[name] = self._loss_parts.get(name, 0) + value.detach().float()
            self._loss_count += 1
        loss = sum(self.loss_weight(name) * value for name, value in parts.items())
        return (loss, output) if return_outputs else loss

    def loss_weight(self, name: str) -> float:
        """Weight of a part of the loss.

        Args:
            name (`str`): `cross_entropy` or `distillation`.

        Returns:
            `float`: Its factor in the sum.
        """
        return {"cross_entropy": 1.0, "distillation": self.kd_weight}[name]

    def extra_losses(self, output: Any, pixel_values: Tensor) -> dict[str, Tensor]:
        """What is added to the cross entropy in training.

        Args:
            output (`ModelOutput`): The student's output.
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): The images.

        Returns:
            `dict[str, torch.FloatTensor]`: Unweighted losses by name.
        """
        if self.teacher is None or self.kd_weight == 0:
            return {}
        with torch.no_grad(), self.accelerator.autocast():
            teacher_logits = self.teacher_logits(pixel_values)
        return {"distillation": distillation_loss(output.logits, teacher_logits, self.kd_temperature)}

    def teacher_logits(self, pixel_values: Tensor) -> Tensor:
        """What the teacher answers.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): The images.

        Returns:
            `torch.FloatTensor` of shape `(batch, labels)`.
        """
        output = self.teacher(pixel_values.to(self._teacher_dtype))
        return getattr(output, "logits", output)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of every part of the loss since the last log.

        Args:
            logs (`dict[str, float]`): What the Trainer logs.
            start_time (`float`, *optional*): Start of the training.
        """
        if "loss" in logs and self._loss_count:
            logs.update({name: float(value) / self._loss_count for name, value in self._loss_parts.items()})
            self._loss_parts, self._loss_count = {}, 0
        super().log(logs, start_time)


class KDFSTrainer(DistillationTrainer):
    """The sampling phase: weights and masks are trained together (KDFS, Sec. 3).

    `loss = CE + kd_weight KD + reconstruction_weight RC + flops_weight Mask`. One Gumbel mask is drawn per optimiser
    step from a generator seeded with (seed, global step): every process draws the same, a resumed run continues
    exactly, and gradients do not depend on how a batch is split into micro batches or processes.

    Afterwards `trainer.model.freeze_masks()` fixes the masks at the target.

    Args:
        model (`nn.Module`): An image classifier, which gets its masks in place, or a [`KDFSMaskedModel`].
        args (`TrainingArguments`): Settings of this phase.
        pruning_config ([`KDFSConfig`], *optional*): Settings of the method; default: its defaults.
        teacher (`nn.Module`, *optional*): Default: no distillation and no reconstruction loss.
        input_shape (`tuple[int, int, int]`, *optional*): `(channels, height, width)`; read from the first training
            image if missing.
        kwargs (`Any`): As of [`~transformers.Trainer`].

    Raises:
        ValueError: If the teacher has other labels or does not take the model's images, or a setting of `args` is
            none of KDFS.

    Example:
    ```python
    trainer = KDFSTrainer(model, args, KDFSConfig(target_flops_reduction=0.5), teacher, train_dataset=images)
    trainer.train()
    trainer.model.freeze_masks()
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        pruning_config: KDFSConfig | None = None,
        teacher: nn.Module | None = None,
        input_shape: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        masked = isinstance(model, KDFSMaskedModel)
        self.pruning_config = pruning_config or (model.pruning_config if masked else KDFSConfig())
        if teacher is not None:
            check_teacher(teacher, model.network if masked else model)
        if (args or TrainingArguments()).device.type == "mps":
            raise ValueError(
                "`args` must train on a CPU or a CUDA GPU, since multiply-adds are counted in float64, which MPS "
                "lacks; set `use_cpu=True`."
            )
        if not masked:
            shape = input_shape or tuple(first_image(kwargs.get("train_dataset")).shape)
            network = host_network(model)  # so that slice_network finds the names of a pruned one
            structure = read_structure(
                network, shape, self.pruning_config.include_layers, self.pruning_config.exclude_layers
            )
            model = KDFSMaskedModel(network, structure, self.pruning_config)
        super().__init__(
            model,
            args,
            teacher=teacher,
            kd_weight=self.pruning_config.kd_weight,
            kd_temperature=self.pruning_config.kd_temperature,
            **kwargs,
        )
        if teacher is not None:
            self.check_answer(model)
        self._dense_macs = model.dense_macs
        self._masked_model = model
        self._stages = self.teacher_stages(model.structure) if model.taps.names else []
        self.teacher_taps = FeatureTaps(self.teacher, self._stages) if self._stages else None
        if not self._stages:  # nothing to rebuild: decoders would be parameters without a gradient
            model.drop_decoders()

    @torch.no_grad()
    def check_answer(self, model: KDFSMaskedModel) -> None:
        """Refuse a teacher that does not take the model's images or gives other logits, before anything is trained.

        Args:
            model ([`KDFSMaskedModel`]): The student.

        Raises:
            ValueError: If the teacher fails on one image, or its answer has another shape than the student's.
        """
        shape, kind = tuple(model.structure.input_shape), type(self.teacher).__name__
        try:
            with self.accelerator.autocast():  # as in training
                got = self.teacher_logits(example_input(self.teacher, shape))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            size = _image_size(self.teacher)
            made = f", made for {size[0]} x {size[1]} pixels," if size not in (None, shape[1:]) else ""
            raise ValueError(
                f"`teacher` must take the images that the model is trained on, of the shape {shape}, but {kind}{made} "
                f"fails on one ({' '.join(str(error).split())[:200].rstrip('.')}); take a teacher that was trained on "
                "such images or takes any size, or train on images of the teacher's size."
            ) from error
        expected = (1, getattr(getattr(model.network, "config", None), "num_labels", None))
        if expected[1] is not None and tuple(getattr(got, "shape", ())) != expected:
            answer = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise ValueError(
                f"`teacher` must answer one image with logits of the shape {expected}, one per label of the model, "
                f"but {kind} gives {answer}; use an image classifier with the model's labels."
            )

    def teacher_stages(self, structure: NetworkStructure) -> list[str]:
        """Modules of the teacher whose features the decoders rebuild.

        Args:
            structure ([`NetworkStructure`]): Structure of the student.

        Returns:
            `list[str]`: Module names in the teacher; empty without a teacher.
        """
        if self.teacher is None:
            return []
        prefix = "network." if host_network(self.teacher) is not self.teacher else ""
        own = {name for name, _ in self.teacher.named_modules()}
        theirs = [prefix + name for name in structure.stages]
        if not own.issuperset(theirs):
            try:
                theirs = read_structure(self.teacher, structure.input_shape).stages
            except ValueError:  # no convolutions, such as a vision transformer
                theirs = []
        sizes, expected = self._map_sizes(theirs, structure.input_shape), list(structure.stage_sizes.values())
        if sizes != expected:
            logger.warning(
                "The teacher's stages have maps of the sizes %s and the model's of %s, so the reconstruction loss is "
                "left out; the distillation of the logits stays.",
                sizes,
                expected,
            )
            return []
        return theirs

    @torch.no_grad()
    def _map_sizes(self, names: list[str], input_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Height and width of what some modules of the teacher return."""
        taps = FeatureTaps(self.teacher, names)
        try:
            if names:
                with self.accelerator.autocast():  # as in training
                    self.teacher(example_input(self.teacher, input_shape))
            return [tuple(getattr(taps.features.get(name), "shape", ()))[2:] for name in names]
        finally:
            taps.remove()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; afterwards the teacher has no hooks any more.

        Args:
            args (`Any`): As of [`~transformers.Trainer.train`].
            kwargs (`Any`): Likewise.

        Returns:
            `TrainOutput`: As of [`~transformers.Trainer.train`].
        """
        resumed = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if resumed:  # its logits are trained ones
            self._masked_model.importance_is_measured = True
        elif not self._masked_model.importance_is_measured:
            self.measure_importance()
        if self.teacher_taps is None and self._stages:
            self.teacher_taps = FeatureTaps(self.teacher, self._stages)
        try:
            return super().train(*args, **kwargs)
        finally:
            self.release_teacher()

    def measure_importance(self) -> None:
        """Start the keep/drop logits from what each filter does to the loss; `importance_images` says how it is done.

        Every process measures the same images, and no random number of the training is drawn.
        """
        config = self.pruning_config
        if config.importance_images == 0 or config.initial_importance_spread == 0 or self.train_dataset is None:
            return
        count, steps = config.importance_images, self.args.max_steps
        if steps > 0:
            step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            count = min(count, steps * step)
        collate = self._get_collator_with_removed_columns(self.data_collator)
        with own_random_state(self.args.seed), batch_is_sound():
            quiet = self.args.disable_tqdm or not self.is_world_process_zero()
            rows = logging.tqdm(
                first_rows(self.train_dataset, count, collate), desc="measuring filters", disable=quiet, leave=False
            )
            start_from_sensitivity(self._masked_model, map(self._prepare_inputs, rows))
        self._masked_model.importance_is_measured = True

    def release_teacher(self) -> None:
        """Take the hooks off the teacher."""
        if self.teacher_taps is not None:
            self.teacher_taps.remove()
        self.teacher_taps = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser with a group of its own for the mask logits (own rate, no decay).

        Args:
            model (`nn.Module`, *optional*): Default: `self.model`.

        Returns:
            `torch.optim.Optimizer`: The optimiser.
        """
        optimizer = super().create_optimizer(model)
        logits = set(self._masked_model.mask_logits.parameters())
        if len(optimizer.param_groups) > 2:
            return optimizer
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter not in logits]
        first = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        rate = {"lr": self.pruning_config.mask_learning_rate, "weight_decay": 0.0}
        optimizer.add_param_group({**first, **rate, "params": list(self._masked_model.mask_logits.parameters())})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro step under the mask of this optimiser step.

        Args:
            args (`Any`): As of [`~transformers.Trainer.training_step`].
            kwargs (`Any`): Likewise.

        Returns:
            `torch.FloatTensor` without axes: The loss.
        """
        config = self.pruning_config
        epochs = max(1, math.ceil(self.state.num_train_epochs or 1))
        done = self.state.global_step / max(1, self.state.max_steps)
        epoch = min(epochs, math.floor(done * epochs) + 1)
        temperature = gumbel_temperature(epoch, epochs, config.gumbel_start_temperature, config.gumbel_end_temperature)
        self._masked_model.set_noise(self.args.seed, self.state.global_step, temperature)
        return super().training_step(*args, **kwargs)

    def loss_weight(self, name: str) -> float:
        """Weight of a part of the loss.

        Args:
            name (`str`): `cross_entropy`, `distillation`, `reconstruction` or `flops`.

        Returns:
            `float`: Its factor in the sum.
        """
        if name in ("reconstruction", "flops"):
            return getattr(self.pruning_config, f"{name}_weight")
        return super().loss_weight(name)

    def extra_losses(self, output: Any, pixel_values: Tensor) -> dict[str, Tensor]:
        """Distillation, reconstruction of the teacher's stages and the miss of the target.

        Args:
            output ([`KDFSMaskedOutput`]): Output of the masked network.
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): The images.

        Returns:
            `dict[str, torch.FloatTensor]`: Unweighted losses by name.
        """
        config = self.pruning_config
        losses = {"flops": flops_loss(output.macs, self._dense_macs, config.keep_share)}
        if self.teacher is None or (config.kd_weight == 0 and self.teacher_taps is None):
            return losses
        with torch.no_grad(), self.accelerator.autocast():
            teacher_logits = self.teacher_logits(pixel_values)
        if config.kd_weight > 0:
            losses["distillation"] = distillation_loss(output.logits, teacher_logits, config.kd_temperature)
        if self.teacher_taps is not None:
            pairs = zip(output.stage_features, self.teacher_taps.pop(), strict=True)
            stages = [reconstruction_loss(student, teacher) for student, teacher in pairs]
            losses["reconstruction"] = torch.stack(stages).mean()
        return losses
