"""`hf-efficient prune` and `optimum-cli prune kdfs`: the pass from the command line."""

import argparse
import importlib.util
import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any


class Prune:
    """Prune the filters of an image classifier and save the smaller network.

    DATASET is a Hub id, a folder of images as train/<class>/*.jpg (and test/<class>/*.jpg), a parquet file, a folder
    with train.parquet (and test.parquet), or one that save_to_disk of datasets wrote. The pass takes EPOCHS in all: it
    learns which filters to drop, then trains the smaller network. The folder OUTPUT gets the checkpoint,
    kdfs_report.json (filters before and after, multiply-adds, latency, accuracy) and widths.png. A run that was
    interrupted continues when it is started again with the same arguments; its checkpoints lie in OUTPUT-training,
    which may be removed once the run is done.

    Examples:
      hf-efficient prune --model user/resnet-18 --dataset ./photos --target-flops-reduction 0.55 --output ./pruned
      hf-efficient prune --model ./resnet --dataset ./cifar10 --output ./pruned --epochs 20 --round-to 8 --onnx
      hf-efficient prune --model ./resnet --dataset ./cifar10 --output ./pruned --config ./settings/kdfs_config.json
      optimum-cli prune kdfs --model user/resnet-18 --dataset cifar10 --output ./pruned
    """

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, method: bool = True) -> None:
        """Add the arguments of `prune` to `parser`; Optimum's command has its own word for the method."""
        if method:
            parser.add_argument("method", nargs="?", choices=["kdfs"], default="kdfs", help="kdfs, the only one")
        _add_arguments(parser)

    @staticmethod
    def run(arguments: argparse.Namespace) -> dict[str, Any]:
        """Prune, save, and return the report."""
        with _when_interrupted(lambda: _say_what_is_kept(arguments)):
            return run_prune(arguments)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="Hub id or folder of an image classifier")
    add("--dataset", required=True, help="Hub id, folder of images, parquet file or folder with train.parquet")
    add("--output", required=True, help="folder of the pruned checkpoint")
    add(
        "--target-flops-reduction",
        type=float,
        metavar="SHARE",
        help="multiply-adds to remove, in (0, 1) (default: 0.55)",
    )
    add("--config", metavar="FILE", help="kdfs_config.json, its folder or a Hub id; options beside it override it")
    add("--epochs", type=float, default=20.0, help="passes over the data in all (default: 20)")
    add("--max-steps", type=int, metavar="STEPS", help="optimiser steps in all; overrides --epochs")
    add(
        "--fine-tune-share",
        type=float,
        metavar="SHARE",
        help="share of the steps for fine-tuning, in [0, 1) (default: 0.5)",
    )
    add("--batch-size", type=int, default=128, help="images per step (default: 128)")
    add("--learning-rate", type=float, default=2e-3, help="of AdamW, cosine schedule (default: 0.002)")
    add("--round-to", type=int, metavar="N", help="kept counts are multiples of N; 8 suits real hardware (default: 1)")
    add("--min-filters", type=int, metavar="N", help="filters that stay in every layer (default: 1)")
    add("--include-layers", nargs="+", metavar="REGEX", help="prune only convolutions with these names")
    add("--exclude-layers", nargs="+", metavar="REGEX", help="leave convolutions with these names whole")
    add("--teacher", help="Hub id or folder of another teacher (default: the model itself)")
    add("--train-split", default="train", help="split to train on (default: train)")
    add("--eval-split", help="split to evaluate on (default: test or validation where there is one)")
    add("--image-column", help="default: the column of images")
    add("--label-column", help="default: the column of classes")
    add("--no-augment", action="store_true", help="no random flips and shifts of the training images")
    add("--seed", type=int, default=42, help="default: 42")
    add("--onnx", action="store_true", help="also write model.onnx")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")


SETTINGS = (
    "target_flops_reduction",
    "fine_tune_share",
    "round_to",
    "min_filters",
    "include_layers",
    "exclude_layers",
)
CONFIG_NAME = "kdfs_config.json"
NAMED = {  # option -> what it names
    "model": "a folder or a Hub id",
    "dataset": "a file, a folder or a Hub id",
    "output": "a folder",
    "config": "a file, a folder or a Hub id",
    "teacher": "a folder or a Hub id",
}


def run_prune(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command itself.

    Args:
        arguments (`argparse.Namespace`): As parsed.

    Returns:
        `dict`: The report of the pass, the folder, and `text` for the terminal.

    Raises:
        ValueError: If an argument, the model or the dataset does not fit.
    """
    import torch
    from transformers import TrainingArguments

    from .images_kdfs import ImageCollator, load_images
    from .pruner_kdfs import KDFSPruner, check_folder, check_no_source

    for option, kind in NAMED.items():
        if getattr(arguments, option) is not None and not getattr(arguments, option).strip():
            raise ValueError(f"--{option} must be {kind}, but is empty; name one.")
    given = {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
    config, of_file = _read_config(arguments.config, given)
    if arguments.epochs <= 0:
        raise ValueError(f"--epochs must be above 0, but is {arguments.epochs:g}.")
    if arguments.max_steps is not None and arguments.max_steps < 1:
        raise ValueError(f"--max-steps must be at least 1, but is {arguments.max_steps}.")
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, but is {arguments.batch_size}.")
    if arguments.learning_rate <= 0:
        raise ValueError(f"--learning-rate must be above 0, but is {arguments.learning_rate:g}.")
    if arguments.seed < 0:
        raise ValueError(f"--seed must be at least 0, but is {arguments.seed}.")
    lacking = [name for name in ("onnx", "onnxscript") if arguments.onnx and importlib.util.find_spec(name) is None]
    if lacking:
        raise ImportError(
            f"--onnx needs onnx and onnxscript, but {lacking[0]} is missing; install `hf-efficient[onnx]`."
        )
    output = Path(arguments.output)
    check_folder(output, "--output")
    check_no_source(output, {"--model": arguments.model, "--teacher": arguments.teacher}, "--output")
    if os.path.isdir(arguments.dataset) and os.path.realpath(arguments.dataset) == os.path.realpath(output):
        raise ValueError(f"--output {output} is the folder of --dataset; name another folder.")
    remote = {"trust_remote_code": True} if arguments.trust_remote_code else {}
    for option, name in (("--model", arguments.model), ("--teacher", arguments.teacher)):
        _check_classifier(option, name, remote)
    pruner = KDFSPruner.from_pretrained(arguments.model, teacher=arguments.teacher, **remote)
    if pruner.processing_class is None:
        raise ValueError(
            f"--model {arguments.model} has no image processor, so its input size is unknown; save one beside it."
        )
    if arguments.teacher is not None:
        _compare_scales(arguments.teacher, pruner.processing_class, remote)
    train, test = load_images(arguments, pruner.processing_class, pruner.model.config)
    args = TrainingArguments(
        output_dir=str(_training_folder(arguments)),
        num_train_epochs=arguments.epochs,
        max_steps=arguments.max_steps or -1,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        eval_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=arguments.seed,
        disable_tqdm=bool(getattr(arguments, "quiet", False)),
    )
    collator = ImageCollator(augment=not arguments.no_augment)
    with redirect_stdout(io.StringIO()), _name_file(arguments.config, of_file):  # the Trainer prints its logs
        folder = pruner.prune(output, config, train, args=args, data_collator=collator)
    missing = (
        "its accuracy, picture or ONNX file may be missing; the same command would prune anew, `export_onnx` of the "
        "network in Python writes the last."
    )
    with _when_interrupted(lambda: f"the pruned network is in {folder}, but {missing}"):
        return _describe(arguments, pruner, folder, test)


def _describe(arguments: argparse.Namespace, pruner: Any, folder: Path, test: Any) -> dict[str, Any]:
    """The report of a pruning that is done, with accuracy, picture and ONNX file."""
    from .figures_kdfs import format_widths, plot_widths
    from .pruner_kdfs import write_report

    report = dict(pruner.report)
    lines = [format_widths(report)]
    if test is not None:
        report["accuracy"] = {
            "before": _accuracy(pruner.model, test, arguments.batch_size),
            "after": _accuracy(pruner.pruned_model, test, arguments.batch_size),
            "images": len(test),
        }
        write_report(folder, report)
        lines.append(
            "accuracy on {images} images: {before:.4f} before, {after:.4f} after".format(**report["accuracy"])
        )
    try:
        report["picture"] = str(plot_widths(report, folder / "widths.png"))
    except ImportError as error:
        lines.append(str(error))
    if arguments.onnx:
        report["onnx"] = str(pruner.export_onnx(folder))
    report["folder"] = str(folder)
    lines.append(f"Wrote {folder}.")
    return {**report, "text": "\n".join(lines)}


def _compare_scales(teacher: str, processor: Any, remote: dict[str, Any]) -> None:
    """Warn of a teacher that knows images of another brightness than it will see."""
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    try:
        theirs = AutoImageProcessor.from_pretrained(teacher, **remote)
    except (OSError, ValueError, ImportError):  # none beside it: nothing is known
        return
    known, seen = _scale(theirs), _scale(processor)
    if known != seen:
        theirs, ours = (f"with mean and deviation {one}" if one else "not normalised" for one in (known, seen))
        logging.get_logger(__name__).warning(
            f"--teacher {teacher} was trained on images {theirs}, but will see those of the model, {ours}, so its "
            "answers may be poor; train both on images of one image processor."
        )


def _scale(processor: Any) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation by which an image processor normalises."""
    settings = getattr(processor, "data_config", None)  # of timm
    if settings is None and getattr(processor, "do_normalize", False):
        settings = {"mean": processor.image_mean, "std": processor.image_std}
    if not settings or settings.get("mean") is None:
        return None
    scale = (settings[name] for name in ("mean", "std"))  # one number stands for all channels
    scale = (values if isinstance(values, (list, tuple)) else [values] * 3 for values in scale)
    return tuple([round(float(value), 3) for value in values] for values in scale)


def _training_folder(arguments: argparse.Namespace) -> Path:
    return Path(f"{os.path.abspath(arguments.output)}-training")


def _say_what_is_kept(arguments: argparse.Namespace) -> str:
    """From what an interrupted command goes on when it is started again."""
    from .resuming_kdfs import describe_kept

    folder = _training_folder(arguments)
    kept = describe_kept(folder)
    if not kept:
        return "there was no checkpoint yet (one is written after every epoch), so the same command begins anew."
    return f"kept in {folder}: {kept}; start the same command with the same options again to go on from there."


@contextmanager
def _when_interrupted(say: Callable[[], str]) -> Iterator[None]:
    """Give an interruption the sentence that the command shows, unless it has one."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or say()) from stop


def _read_config(source: str | None, given: dict[str, Any]) -> tuple[Any, set[str]]:
    """Settings of the options, over those of a file, and the names of those that the file decides."""
    from .configuration_kdfs import RULES, KDFSConfig
    from .images_kdfs import first_sentence

    if source is None:
        return KDFSConfig(**given), set()
    values = _read_settings(source)
    try:
        config = KDFSConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"--config {source}: {_without_ticks(error, values)}") from error
    except (TypeError, AttributeError) as error:  # of fields that every configuration has
        raise ValueError(
            f"--config {source} holds a value of the wrong kind ({first_sentence(error, source)}); keep only "
            f"settings of KDFS: {', '.join(RULES)}."
        ) from error
    return KDFSConfig(**{**{name: getattr(config, name) for name in RULES}, **given}), set(values) - set(given)


def _read_settings(source: str) -> dict[str, Any]:
    """What stands in a file of settings, in that of a folder, or in that of a Hub repository."""
    from transformers.utils import cached_file

    from .images_kdfs import first_sentence

    path = Path(source)
    if path.is_dir() and not (path / CONFIG_NAME).is_file():
        raise ValueError(f"--config {source} is a folder without {CONFIG_NAME}; name one that holds it, or a file.")
    remedy = f"name a {CONFIG_NAME}, its folder, or a Hub id"
    try:
        found = path if path.exists() else cached_file(source, CONFIG_NAME)
        file = path / CONFIG_NAME if path.is_dir() else Path(found)
        values = json.loads(file.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except (OSError, ValueError, RecursionError) as error:
        where = "holds no settings of KDFS" if path.exists() else "is no file or folder here and no Hub id"
        reason = first_sentence(error, source)
        raise ValueError(f"--config {source} {where} that could be read ({reason}); {remedy}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {source} must hold a JSON object, but holds {json.dumps(values):.40}; {remedy}.")
    return values


def _without_ticks(error: Exception, names: Collection[str]) -> str:
    """A message in which these names stay as they are; others in backticks become options of the command."""
    return re.sub(r"`(\w+)`", lambda match: match[1] if match[1] in names else match[0], str(error))


@contextmanager
def _name_file(source: str | None, names: Collection[str]) -> Iterator[None]:
    """Blame a wrong setting on the file that it stands in, not on an option that nobody typed."""
    try:
        yield
    except ValueError as error:
        message = _without_ticks(error, names)
        if message == str(error):
            raise
        raise ValueError(f"--config {source}: {message}") from error


def _check_classifier(option: str, name: str | None, remote: dict[str, Any]) -> None:
    """Refuse what is no checkpoint of an image classifier before its weights are read."""
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig

    from .images_kdfs import first_sentence

    if name is None:
        return
    try:
        config = AutoConfig.from_pretrained(name, **remote)
    except (OSError, ValueError, KeyError) as error:
        where = "holds no configuration" if Path(name).is_dir() else "is no folder here and no Hub id"
        reason = first_sentence(error, name)
        remedy = "add --trust-remote-code if you trust it" if "trust_remote_code" in str(error) else "name another"
        raise ValueError(f"{option} {name} {where} that could be loaded ({reason}); {remedy}.") from error
    known = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if not known and "AutoModelForImageClassification" not in (getattr(config, "auto_map", None) or {}):
        raise ValueError(f"{option} {name} is no image classifier, but of type {config.model_type!r}; name another.")


def _accuracy(model: Any, data: Any, batch_size: int) -> float:
    import torch

    device = next(model.parameters()).device
    right = 0
    with torch.no_grad():
        for start in range(0, len(data), batch_size):
            rows = data[start : start + batch_size]
            answers = model.eval()(torch.as_tensor(rows["pixel_values"]).to(device)).logits.argmax(dim=1).cpu()
            right += int((answers == torch.as_tensor(rows["labels"])).sum())
    return right / len(data)
