"""The pass: sample masks, freeze them at the target, slice, fine-tune the smaller network, save it."""

import copy
import math
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .configuration_kdfs import RULES, KDFSConfig
from .flops_kdfs import count_flops
from .masking_kdfs import KDFSMaskedModel
from .modeling_kdfs_pruned import KDFSPrunedModelForImageClassification
from .resuming_kdfs import PHASE_WORDS, SAMPLED_NAME, Run, train_to_the_end, write_json
from .rows_kdfs import first_image, makes_images
from .saving_kdfs import disk_is_named
from .slicing_kdfs import check_model, host_network, slice_network, write_back
from .structure_kdfs import check_convolutions, read_structure
from .tracing_kdfs import example_input
from .trainer_kdfs import DistillationTrainer, KDFSTrainer, check_teacher, name_progress


logger = logging.get_logger(__name__)

REPORT_NAME = "kdfs_report.json"
OF_ONE_REPOSITORY = ("revision", "code_revision", "subfolder", "variant", "config")
DERIVED = ("model.onnx", "model.onnx.data", "widths.png")  # made of a pruned network; they end with it


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be made or written, before the work whose result it is to hold.

    Whether one can be written is tried, not asked: to the administrator every folder says yes, /proc among them.

    Args:
        folder (`Path`): Need not exist.
        name (`str`): The argument as it is typed.

    Raises:
        ValueError: If it is a file, below a file, or where nothing can be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name} must be a folder, but {folder} is a file; name a folder.")
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".hf_efficient_", dir=above))
    except OSError as error:
        why = "cannot be written" if above.is_dir() else "is a file"
        raise ValueError(f"{name} {folder} cannot be made: {above} {why}; name another folder.") from error


def check_no_source(folder: Path, sources: dict[str, Any], name: str) -> None:
    """Refuse to write the pruned network over the one it is made of, or over its teacher.

    Args:
        folder (`Path`): Where the pruned network is to go.
        sources (`dict[str, Any]`): Hub id, folder, network or `None` by argument.
        name (`str`): The argument of `folder` as it is typed.

    Raises:
        ValueError: If one of them was read from `folder`.
    """
    for argument, source in sources.items():
        if isinstance(source, nn.Module):
            source = getattr(source, "name_or_path", "")
        if source and os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(folder):
            raise ValueError(
                f"{name} {folder} would overwrite the network that {argument} was read from; name another folder."
            )


def load_classifier(
    model: str | os.PathLike | PreTrainedModel, argument: str = "model", **kwargs: Any
) -> PreTrainedModel:
    """Load an image classifier, or hand an instance through.

    Args:
        model (`str`, `os.PathLike` or `PreTrainedModel`): Hub id, folder or instance.
        argument (`str`, *optional*, defaults to `"model"`): What messages call it.
        kwargs (`Any`): As of `AutoModelForImageClassification.from_pretrained`; `dtype` is `float32` if it is not
            given, since the weights are trained.

    Returns:
        `PreTrainedModel`: The classifier.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If the checkpoint cannot be read.
    """
    if isinstance(model, nn.Module):
        return model
    if "torch_dtype" not in kwargs:
        kwargs.setdefault("dtype", torch.float32)
    try:
        loaded, info = AutoModelForImageClassification.from_pretrained(model, output_loading_info=True, **kwargs)
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"`{argument}` must be a readable checkpoint, but the weights of {os.fspath(model)!r} are corrupt "
            f"({str(error).splitlines()[0]}); download or save them again."
        ) from error
    except ValueError as error:
        code = "trust_remote_code" in str(error)
        raise ValueError(
            f"`{argument}` must be the checkpoint of an image classifier, but {os.fspath(model)!r} cannot be loaded "
            f"({str(error).splitlines()[0].rstrip('.')}); "
            f"{'add `trust_remote_code=True` if you trust its code' if code else 'name another'}."
        ) from error
    except OSError as error:
        raise OSError(
            f"`{argument}` must be a folder or a Hub id, but {os.fspath(model)!r} cannot be loaded "
            f"({str(error).splitlines()[0]})"
        ) from error
    if info["missing_keys"]:
        raise ValueError(
            f"`{argument}` must be a complete checkpoint, but {os.fspath(model)!r} lacks {len(info['missing_keys'])} "
            f"weights (such as {sorted(info['missing_keys'])[0]}); download or save it again."
        )
    return loaded


def measure_latency(
    models: dict[str, nn.Module],
    input_shape: tuple[int, ...],
    batch_size: int = 1,
    repeats: int = 30,
    max_seconds: float = 30.0,
) -> dict[str, float]:
    """Shortest seconds of a forward pass, the models taking turns so that a busy machine hits all alike.

    With one thread on the CPU it is CPU time, which a busy neighbour does not stretch.

    Args:
        models (`dict[str, nn.Module]`): Models by name.
        input_shape (`tuple[int, ...]`): Channels, height, width.
        batch_size (`int`, *optional*, defaults to 1): Images per pass.
        repeats (`int`, *optional*, defaults to 30): Passes per model, after two to warm up.
        max_seconds (`float`, *optional*, defaults to 30.0): No further pass after this time and three passes. Threads
            that wait for each other on busy cores make a pass a hundred times longer.

    Returns:
        `dict[str, float]`: Seconds by name.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    images = {name: example_input(model, input_shape).repeat(batch_size, 1, 1, 1) for name, model in models.items()}
    modes = {module: module.training for model in models.values() for module in model.modules()}
    for model in models.values():
        model.eval()
    on_gpu = any(image.is_cuda for image in images.values())
    clock = time.process_time if torch.get_num_threads() == 1 and not on_gpu else time.perf_counter
    begin = time.perf_counter()
    with torch.no_grad():
        for repeat in range(repeats + 2):
            if repeat >= 5 and time.perf_counter() - begin > max_seconds:
                break
            for name, model in models.items():
                if images[name].is_cuda:
                    torch.cuda.synchronize()
                start = clock()
                model(images[name])
                if images[name].is_cuda:
                    torch.cuda.synchronize()
                if repeat >= 2:
                    times[name].append(clock() - start)
    for module, training in modes.items():
        module.training = training
    return {name: min(values) for name, values in times.items()}


class KDFSPruner:
    """Filter pruning as one pass, shaped like an Optimum quantizer.

    Args:
        model (`PreTrainedModel`): Image classifier to prune; it is left as it is.
        teacher (`nn.Module`, *optional*): Default: the model itself.
        processing_class (`Any`, *optional*): Image processor saved beside the pruned network.

    Attributes:
        masked_model ([`KDFSMaskedModel`]): After [`prune`], the masked network in evaluation mode.
        pruned_model ([`KDFSPrunedModelForImageClassification`]): After [`prune`], the smaller network.
        history (`list[dict]`): Logged losses of both phases.
        report (`dict`): Filters per layer, multiply-adds, parameters, latency before and after.

    Raises:
        ValueError: If the model is no network, has no filters to prune, or the teacher has other labels.

    Example:
    ```python
    pruner = KDFSPruner.from_pretrained("user/resnet")
    pruner.prune("out", KDFSConfig(target_flops_reduction=0.55), train_dataset=train, eval_dataset=test)
    ```
    """

    def __init__(
        self, model: PreTrainedModel, teacher: nn.Module | None = None, processing_class: Any | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"`model` must be an image classifier, but is a {type(model).__name__}; load one by its folder or Hub "
                "id with `KDFSPruner.from_pretrained`."
            )
        check_convolutions(model)
        if teacher is not None:
            check_teacher(teacher, model)
        self.model = model
        self.teacher = teacher
        self.processing_class = processing_class
        self.masked_model: KDFSMaskedModel | None = None
        self.pruned_model: KDFSPrunedModelForImageClassification | None = None
        self.history: list[dict[str, Any]] = []
        self.report: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike | PreTrainedModel,
        teacher: str | os.PathLike | nn.Module | None = None,
        **kwargs: Any,
    ) -> "KDFSPruner":
        """Load the network to prune.

        Args:
            model (`str`, `os.PathLike` or `PreTrainedModel`): Hub id, folder or instance of an image classifier.
            teacher (`str`, `os.PathLike` or `nn.Module`, *optional*): Default: the model itself.
            kwargs (`Any`): As of `AutoModelForImageClassification.from_pretrained`; what names a place in the model's
                repository (`revision`, `subfolder`, `variant`, `code_revision`) or is its `config` is not for a
                teacher of another one, which is handed in as an instance where it needs such.

        Returns:
            [`KDFSPruner`]: Ready to prune.

        Raises:
            OSError: If there is no such checkpoint.
            ValueError: If a checkpoint cannot be read, the teacher has other labels, or the network no filters.
        """
        processor = None
        if not isinstance(model, nn.Module):
            try:
                others = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}
                processor = AutoImageProcessor.from_pretrained(model, **others)
            except (OSError, ValueError, ImportError) as error:
                logger.info("No image processor beside the model (%s).", error)
        loaded = load_classifier(model, **kwargs)
        others = kwargs
        if not _is_one_source(teacher, model):
            others = {name: value for name, value in kwargs.items() if name not in OF_ONE_REPOSITORY}
        return cls(loaded, None if teacher is None else load_classifier(teacher, "teacher", **others), processor)

    def prune(
        self,
        save_directory: str | os.PathLike,
        pruning_config: KDFSConfig,
        train_dataset: Any,
        eval_dataset: Any | None = None,
        args: TrainingArguments | None = None,
        processing_class: Any | None = None,
        data_collator: Any | None = None,
        compute_metrics: Any | None = None,
        callbacks: list[Any] | None = None,
    ) -> Path:
        """Learn the masks, slice, fine-tune and save.

        An interrupted run continues where its last checkpoint was written if it is started again with the same
        settings and the same `args.output_dir`.

        Args:
            save_directory (`str` or `os.PathLike`): Folder of the pruned checkpoint. The ONNX file and the picture of
                an earlier one are removed from it.
            pruning_config ([`KDFSConfig`]): Settings of the method.
            train_dataset (`Dataset`): Yields `pixel_values` and `labels`.
            eval_dataset (`Dataset`, *optional*): Likewise.
            args (`TrainingArguments`, *optional*): For both phases together; `push_to_hub` has no effect. Default: 20
                epochs of AdamW.
            processing_class (`Any`, *optional*): Image processor, saved too.
            data_collator (`Any`, *optional*): As of [`~transformers.Trainer`].
            compute_metrics (`Any`, *optional*): Likewise.
            callbacks (`list`, *optional*): Likewise, for both phases.

        Returns:
            `Path`: `save_directory`.

        Raises:
            OSError: If the disk is full; what was written before stays, and the run goes on from it.
            ValueError: If the target cannot be reached, the training diverges, rows lack labels or are of another
                data type, the teacher does not take their images, the folder cannot be written or holds the network
                itself, or another run was interrupted in `args.output_dir`.
        """
        if not isinstance(pruning_config, KDFSConfig):
            kind = type(pruning_config).__name__
            raise ValueError(f"`pruning_config` must be a KDFSConfig, but is a {kind}; make one of your settings.")
        if args is not None and not isinstance(args, TrainingArguments):
            kind = type(args).__name__
            raise ValueError(f"`args` must be TrainingArguments, but is a {kind}; make them of your settings.")
        save_directory = Path(save_directory)
        check_folder(save_directory, "`save_directory`")
        check_no_source(save_directory, {"`model`": self.model, "`teacher`": self.teacher}, "`save_directory`")
        if (save_directory / REPORT_NAME).is_file():
            logger.warning("%s holds the result of an earlier pruning, which the new one replaces.", save_directory)
        image = first_image(train_dataset)
        dtype = next((weight.dtype for weight in self.model.parameters()), image.dtype)
        mixed = args is not None and (args.bf16 or args.fp16) and image.is_floating_point()
        if image.dtype != dtype and not mixed:
            raise ValueError(
                f"`train_dataset` must yield `pixel_values` in the model's {dtype}, but they are {image.dtype}; load "
                "the model in float32 (TrainingArguments(bf16=True) trains it in mixed precision), or cast the rows."
            )
        input_shape = tuple(image.shape)
        args = args or self._default_arguments(save_directory, not makes_images(train_dataset))
        if args.push_to_hub:
            logger.warning(
                "`push_to_hub` of `args` has no effect, since nothing is pushed before the network is sliced; call "
                "`pruned_model.push_to_hub(...)` afterwards."
            )
        self.processing_class = processing_class or self.processing_class
        masked = self._mask(pruning_config, input_shape)
        teacher = copy.deepcopy(self.model) if self.teacher in (None, self.model) else self.teacher
        common = {
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "data_collator": data_collator,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
        }
        run = Run(Path(args.output_dir))
        sampler = KDFSTrainer(masked, run.phase_arguments(args, "sampling"), pruning_config, teacher, **common)
        name_progress(sampler, PHASE_WORDS[0])
        sampling_steps, tuning_steps = _split_steps(sampler, args, pruning_config.fine_tune_share)
        run.open(self._fingerprint(pruning_config, args, sampling_steps, tuning_steps), sampler)
        self._sample(sampler, masked, run, sampling_steps)
        sampler.release_teacher()
        masked.freeze_masks()
        pruned = slice_network(masked, self.model)
        logs = list(sampler.state.log_history) if not run.sampled else run.load_history()
        self.history = [{"phase": "sampling", **entry} for entry in logs]
        if tuning_steps:
            weight = pruning_config.fine_tune_kd_weight
            weight = pruning_config.kd_weight if weight is None else weight
            arguments = run.phase_arguments(args, "fine_tuning")
            arguments.max_steps = tuning_steps
            tuner = DistillationTrainer(
                pruned,
                arguments,
                teacher=teacher,
                kd_weight=weight,
                kd_temperature=pruning_config.kd_temperature,
                **common,
            )
            name_progress(tuner, PHASE_WORDS[1])
            train_to_the_end(tuner, run.last_checkpoint("fine_tuning"))
            check_finite(pruned, PHASE_WORDS[1], run.folder)
            self.history += [{"phase": "fine_tuning", **entry} for entry in tuner.state.log_history]
        write_back(masked, pruned)
        self.masked_model, self.pruned_model = masked.eval(), pruned.eval()
        self.report = self._describe(masked, input_shape)
        if sampler.is_world_process_zero():
            with disk_is_named(save_directory):
                self._save(save_directory, pruning_config)
            run.close()
        sampler.accelerator.wait_for_everyone()
        return save_directory

    def _default_arguments(self, save_directory: Path, remove_unused_columns: bool = True) -> TrainingArguments:
        return TrainingArguments(
            output_dir=f"{os.path.abspath(save_directory)}-training",
            num_train_epochs=20,
            per_device_train_batch_size=128,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            max_grad_norm=0.0,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="epoch",
            save_total_limit=1,
            logging_strategy="epoch",
            remove_unused_columns=remove_unused_columns,
            report_to="none",
        )

    def _mask(self, config: KDFSConfig, input_shape: tuple[int, ...]) -> KDFSMaskedModel:
        network = copy.deepcopy(host_network(self.model))
        structure = read_structure(network, input_shape, config.include_layers, config.exclude_layers)
        left = [
            f"{name} ({reason})"
            for name, reason in structure.whole.items()
            if "shared" in reason or "grouped" in reason
        ]
        if left:
            logger.warning("These layers cannot be pruned and are left whole: %s.", ", ".join(left))
        masked = KDFSMaskedModel(network, structure, config)
        check_model(masked, self.model)
        return masked

    def _fingerprint(
        self, config: KDFSConfig, args: TrainingArguments, sampling_steps: int, tuning_steps: int
    ) -> dict[str, Any]:
        teacher = self.model if self.teacher is None else self.teacher
        return {
            "pruning_config": {name: getattr(config, name) for name in RULES},
            "steps": [sampling_steps, tuning_steps],
            "seed": args.seed,
            "learning_rate": args.learning_rate,
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "weights": _fingerprint_of(self.model),
            "teacher": _fingerprint_of(teacher),
        }

    def _sample(self, trainer: KDFSTrainer, masked: KDFSMaskedModel, run: Run, steps: int) -> None:
        if run.sampled:
            logger.warning("The sampling phase of %s is done; its result is used.", run.folder)
            masked.load_state_dict(load_file(run.folder / SAMPLED_NAME))
            masked.to(trainer.args.device)
            return
        trainer.args.max_steps = steps
        trainer.args.load_best_model_at_end = False  # the last masks count, not the best
        train_to_the_end(trainer, run.last_checkpoint("sampling"))
        check_finite(masked.network, PHASE_WORDS[0], run.folder)
        if trainer.is_world_process_zero():
            with disk_is_named(run.folder):
                run.save_sampled(masked, trainer.state.log_history)
        trainer.accelerator.wait_for_everyone()

    def _describe(self, masked: KDFSMaskedModel, input_shape: tuple[int, ...]) -> dict[str, Any]:
        """What was removed, and whether it is faster."""
        pruned = self.pruned_model
        dense_macs, macs = count_flops(self.model, input_shape), count_flops(pruned, input_shape)
        dense = copy.deepcopy(self.model).to(next(pruned.parameters()).device)
        latency = measure_latency({"before": dense, "after": pruned}, input_shape)
        kept = masked.kept_channels()
        layers = [
            {"name": group.name, "before": group.size, "after": kept[f"network.{group.name}"][1]}
            for group in masked.structure.groups
        ]
        faster = latency["after"] < 0.97 * latency["before"]  # less is noise
        return {
            "layers": layers,
            "left_whole": masked.structure.whole,
            "flops_convention": "multiply-adds of convolutions and linear layers, one image",
            "flops": {"before": dense_macs, "after": macs, "reduction": 1 - macs / dense_macs},
            "parameters": {
                "before": sum(parameter.numel() for parameter in dense.parameters()),
                "after": sum(parameter.numel() for parameter in pruned.parameters()),
            },
            "latency_seconds_batch_1": {**latency, "threads": torch.get_num_threads()},
            "verdict": f"{latency['before'] / latency['after']:.2f}x as fast at batch size 1"
            if faster
            else "no gain: not faster at batch size 1",
        }

    def _save(self, save_directory: Path, config: KDFSConfig) -> None:
        """Everything goes to a hidden folder first, so that the checkpoint appears whole or not at all."""
        unfinished = save_directory / f".{uuid.uuid4().hex}"  # inside: nothing may be written beside a mounted folder
        try:
            self.pruned_model.save_pretrained(unfinished)
            config.save_pretrained(unfinished)
            timm = type(self.processing_class).__name__ == "TimmWrapperImageProcessor"  # lives in config.json
            if self.processing_class is not None and not timm:
                self.processing_class.save_pretrained(unfinished)
            write_report(unfinished, self.report)
            for name in ("config.json", *DERIVED):  # of an earlier pruning, with other weights
                (save_directory / name).unlink(missing_ok=True)
            files = sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json")
            for path in files:  # config.json last: before it nothing loads
                os.replace(path, save_directory / path.name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        logger.info("Saved the pruned network in %s: %s.", save_directory, self.report["verdict"])

    def export_onnx(self, save_directory: str | os.PathLike) -> Path:
        """Write the pruned network as ONNX with a free batch size.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, made if missing.

        Returns:
            `Path`: The file `model.onnx`.

        Raises:
            ValueError: If nothing was pruned yet.
        """
        if self.pruned_model is None:
            raise ValueError("`export_onnx` needs a pruned network, but there is none yet; call `prune` first.")
        return self.pruned_model.export_onnx(save_directory)


def check_finite(network: nn.Module, phase: str, folder: Path) -> None:
    """Refuse to go on with weights that a training has ruined.

    Args:
        network (`nn.Module`): After the training.
        phase (`str`): What the training was for.
        folder (`Path`): Where its checkpoints lie.

    Raises:
        ValueError: If a weight or statistic is infinite or no number.
    """
    name = next((name for name, value in network.state_dict().items() if not value.isfinite().all()), None)
    if name is not None:
        raise ValueError(
            f"The training diverged while {phase}: {name} holds values that are no finite numbers; look for images "
            f"that hold such, or lower `learning_rate`, and remove {folder}, whose checkpoints are of no use."
        )


def _is_one_source(one: Any, other: Any) -> bool:
    """Whether two names are the same Hub id, or the same folder however it is written."""
    if not all(isinstance(name, (str, os.PathLike)) for name in (one, other)):
        return False
    if os.path.isdir(one) and os.path.isdir(other):
        return os.path.samefile(one, other)
    return os.fspath(one) == os.fspath(other)


def _fingerprint_of(network: nn.Module) -> float:
    """Tells weights apart, with as many digits as processors that add in another order agree on."""
    return float(f"{sum(float(weight.detach().double().abs().sum()) for weight in network.parameters()):.9g}")


def _split_steps(trainer: KDFSTrainer, args: TrainingArguments, fine_tune_share: float) -> tuple[int, int]:
    """Optimiser steps of the sampling phase and of fine-tuning."""
    data = trainer.train_dataset
    batches = len(trainer.get_train_dataloader()) if args.max_steps <= 0 or has_length(data) else None
    if batches == 0:
        raise ValueError(
            f"`train_dataset` must fill a batch, but has {len(data)} rows and a batch {args.train_batch_size}, and "
            "`dataloader_drop_last` leaves smaller ones out; set a smaller `batch_size`, or leave that out."
        )
    if args.max_steps > 0:
        total = args.max_steps
    else:
        per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
        total = max(1, math.ceil(per_epoch * args.num_train_epochs))
    tuning = min(total - 1, round(total * fine_tune_share))
    return total - tuning, tuning


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write what a pruning removed as `kdfs_report.json`, whole or not at all.

    Args:
        folder (`Path`): Of the checkpoint.
        report (`dict`): `KDFSPruner.report`, with more or without.
    """
    write_json(folder / REPORT_NAME, report)
