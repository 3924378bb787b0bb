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

    DATASET is a Hub id, a folder of images in one folder per class, a parquet file, or a folder with train.parquet
    (and test.parquet). The pass takes EPOCHS in all: it learns which filters to drop, then trains the smaller network.
    The folder OUTPUT gets the checkpoint, kdfs_report.json (filters before and after, multiply-adds, latency,
    accuracy) and widths.png. A run that was interrupted continues when it is started again with the same arguments;
    its checkpoints lie in OUTPUT-training, which may be removed once the run is done.

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
SPLIT_FOLDERS = ("train", "training", "test", "testing", "eval", "evaluation", "valid", "validation", "val", "dev")
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
    remote = {"trust_remote_code": True} if arguments.trust_remote_code else {}
    for option, name in (("--model", arguments.model), ("--teacher", arguments.teacher)):
        _check_classifier(option, name, remote)
    pruner = KDFSPruner.from_pretrained(arguments.model, teacher=arguments.teacher, **remote)
    if pruner.processing_class is None:
        raise ValueError(
            f"--model {arguments.model} has no image processor, so its input size is unknown; save one beside it."
        )
    train, test = _load_data(arguments, pruner.processing_class, pruner.model.config)
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
    missing = "its accuracy, picture or ONNX file may be missing; the same command would prune anew."
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

    if source is None:
        return KDFSConfig(**given), set()
    values = _read_settings(source)
    try:
        config = KDFSConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"--config {source}: {_without_ticks(error, values)}") from error
    except (TypeError, AttributeError) as error:  # of fields that every configuration has
        raise ValueError(
            f"--config {source} holds a value of the wrong kind ({_reason(error, source)}); keep only settings of "
            f"KDFS: {', '.join(RULES)}."
        ) from error
    return KDFSConfig(**{**{name: getattr(config, name) for name in RULES}, **given}), set(values) - set(given)


def _read_settings(source: str) -> dict[str, Any]:
    """What stands in a file of settings, in that of a folder, or in that of a Hub repository."""
    from transformers.utils import cached_file

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
        reason = _reason(error, source)
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


def _reason(error: Exception, name: str) -> str:
    """The first sentence of what a library says; a dot within the name of what it read does not end it."""
    line = (str(error).strip() or type(error).__name__).split("\n")[0]
    forms = "|".join(re.escape(form) for form in (os.path.abspath(name), name))
    spans = [match.span() for match in re.finditer(rf"(?<![\w./-])(?:{forms})(?![\w/-])", line)]
    for end in (match.start() for match in re.finditer(r"\.(?= |$)", line)):
        if not any(start <= end < stop for start, stop in spans):
            return line[:end]
    return line


def _check_classifier(option: str, name: str | None, remote: dict[str, Any]) -> None:
    """Refuse what is no checkpoint of an image classifier before its weights are read."""
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig

    if name is None:
        return
    try:
        config = AutoConfig.from_pretrained(name, **remote)
    except (OSError, ValueError, KeyError) as error:
        where = "holds no configuration" if Path(name).is_dir() else "is no folder here and no Hub id"
        reason = _reason(error, name)
        remedy = "add --trust-remote-code if you trust it" if "trust_remote_code" in str(error) else "name another"
        raise ValueError(f"{option} {name} {where} that could be loaded ({reason}); {remedy}.") from error
    known = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if not known and "AutoModelForImageClassification" not in (getattr(config, "auto_map", None) or {}):
        raise ValueError(f"{option} {name} is no image classifier, but of type {config.model_type!r}; name another.")


def _load_data(arguments: argparse.Namespace, processor: Any, config: Any) -> tuple[Any, Any]:
    """Training and evaluation rows that turn into `pixel_values` and `labels` when they are read."""
    from datasets import Image, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    path = Path(arguments.dataset)
    quiet = getattr(arguments, "quiet", False) and not are_progress_bars_disabled()
    try:
        if quiet:
            disable_progress_bars()
        data = _read(path, arguments)
    except Exception as error:  # datasets and pyarrow have many
        where = "could not be read" if path.exists() else "is no file or folder here and no Hub id that could be read"
        reason = _reason(error, arguments.dataset)
        raise ValueError(
            f"--dataset {arguments.dataset} {where} ({reason}); name a folder with a folder of images per class, or "
            "parquet files."
        ) from error
    finally:
        if quiet:
            enable_progress_bars()
    if arguments.train_split not in data:
        raise ValueError(f"--train-split {arguments.train_split} is not in the dataset; it has {', '.join(data)}.")
    features = data[arguments.train_split].features
    image = arguments.image_column or next((name for name, kind in features.items() if isinstance(kind, Image)), None)
    if image is None:  # bytes of pictures, written by another tool than datasets
        image = next((name for name in ("image", "img", "picture") if _holds_bytes(features.get(name))), None)
    label = arguments.label_column or next(
        (name for name in ("labels", "label", "fine_label", "class") if name in features), None
    )
    if label is None and list(features) == ["image"] and path.is_dir():
        raise ValueError(_no_classes(arguments.dataset))
    for option, name in (("--image-column", image), ("--label-column", label)):
        if name not in features:
            raise ValueError(
                f"--dataset {arguments.dataset} must have a column of images and one of labels, but has "
                f"{', '.join(features)}; name it with {option}."
            )
    if isinstance(features[image], Image) or _holds_bytes(features[image]):
        data = data.cast_column(image, Image(decode=False))  # decoded below, where a broken one can be named
    held_out = arguments.eval_split or next((name for name in ("test", "validation", "val") if name in data), None)
    if held_out is not None and held_out not in data:
        raise ValueError(f"--eval-split {held_out} is not in the dataset; it has {', '.join(data)}.")
    number = _label_numbers(arguments, data[arguments.train_split], label, config)
    if held_out is not None:  # what is wrong there would else show after the training
        _label_numbers(arguments, data[held_out], label, config)

    def prepare(rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [_decode(arguments, picture).convert("RGB") for picture in rows[image]]
        labels = [number(value) for value in rows[label]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": labels}

    test = data[held_out].with_transform(prepare) if held_out else None
    return data[arguments.train_split].with_transform(prepare), test


def _read(path: Path, arguments: argparse.Namespace) -> Any:
    """The dataset by splits."""
    from datasets import load_dataset

    if path.is_file():
        return load_dataset("parquet", data_files={arguments.train_split: str(path)})
    if path.is_dir() and not _is_image_folder(path):
        return load_dataset("parquet", data_files={file.stem: str(file) for file in sorted(path.glob("*.parquet"))})
    if path.is_dir():
        return load_dataset("imagefolder", data_dir=str(path))
    return load_dataset(arguments.dataset)


def _is_image_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.glob("*.parquet"))


def _no_classes(dataset: str) -> str:
    """What is wrong with a folder of pictures in which `datasets` found no classes."""
    from PIL import Image

    endings, classes, stray = Image.registered_extensions(), set(), None
    for file in sorted(file for file in Path(dataset).rglob("*") if file.suffix.lower() in endings):
        folders = file.relative_to(dataset).parts[:-1]
        folders = folders[1:] if folders and folders[0] in SPLIT_FOLDERS else folders
        classes.update(folders[-1:])
        stray = stray or (None if folders else file)
    why = f"{stray} is in no folder of a class" if stray else "their folders lie in folders"
    why = f"all are in one folder, {min(classes)}" if len(classes) == 1 and not stray else why
    name = Path(dataset).as_posix()
    return (
        f"--dataset {dataset} is a folder of pictures without classes: {why}; put every picture into the folder of "
        f"its class, of two classes or more, as {name}/train/<class>/*.jpg and {name}/test/<class>/*.jpg."
    )


def _decode(arguments: argparse.Namespace, picture: Any) -> Any:
    """The picture of a row, or one sentence that names it."""
    from datasets import Image

    if not isinstance(picture, dict):
        return picture
    try:
        return Image().decode_example(picture)
    except (OSError, ValueError, SyntaxError) as error:
        reason = "it breaks off or is no picture" if picture.get("bytes") is None else str(error).split(" <")[0]
        raise ValueError(
            f"--dataset {arguments.dataset} has a picture that cannot be read, {picture.get('path') or 'unnamed'} "
            f"({reason}); repair it or leave it out."
        ) from error


def _holds_bytes(kind: Any) -> bool:
    inner = kind.get("bytes") if isinstance(kind, dict) else kind
    return getattr(inner, "dtype", None) in ("binary", "large_binary")


def _label_numbers(arguments: argparse.Namespace, rows: Any, column: str, config: Any) -> Any:
    """How a label of the dataset becomes a label of the model: by its word where both have words, else as it is."""
    try:
        values = set(rows[column])
    except TypeError as error:  # pictures, lists
        raise ValueError(
            f"--dataset {arguments.dataset} has no classes in `{column}`, but {type(rows[0][column]).__name__}; name "
            "the column of classes with --label-column."
        ) from error
    if values == {None} and _is_image_folder(Path(arguments.dataset)):
        raise ValueError(_no_classes(arguments.dataset))
    if None in values:
        raise ValueError(
            f"--dataset {arguments.dataset}, split {rows.split}, has a row without a label in `{column}`; leave it "
            "out."
        )
    names = dict(enumerate(getattr(rows.features[column], "names", None) or ()))
    words = {word: number for number, word in config.id2label.items()}
    if names and set(names.values()) <= set(words):
        _check_range(arguments, rows, values, len(names))
        return lambda value: words[names[value]]
    known = sorted(set(names.values()) & set(words))
    if known:  # by their numbers they would be other classes of the model
        other = sorted(set(names.values()) - set(words))[0]
        raise ValueError(
            f"--dataset {arguments.dataset} has {known[0]!r}, a label of the model, and {other!r}, which is none; "
            "leave that out, or prune a model that was trained on these classes."
        )
    if any(isinstance(value, str) for value in values):
        if not values <= set(words):
            missing = sorted(values - set(words))[0]
            raise ValueError(
                f"--dataset {arguments.dataset} has classes as words in `{column}`, but the model has no label "
                f"{missing!r}; prune a model that was trained on these classes."
            )
        return lambda value: words[value]
    _check_range(arguments, rows, values, config.num_labels)
    named = config.id2label.get(0) != "LABEL_0" and not any(name.isdigit() for name in names.values())
    if names and named and len(names) != config.num_labels:
        raise ValueError(
            f"--dataset {arguments.dataset} has {len(names)} classes, {names[0]!r} the first, none of which is one of "
            f"the model's {config.num_labels}, {config.id2label[0]!r} the first; name them alike, or prune a model "
            "that was trained on these classes."
        )
    if names and named:
        from transformers.utils import logging

        logging.get_logger(__name__).warning_once(
            f"No class of {arguments.dataset} is named as in the model, so they are taken in order: {names[0]!r} as "
            f"{config.id2label[0]!r}."
        )
    return int


def _check_range(arguments: argparse.Namespace, rows: Any, values: set[int], count: int) -> None:
    """Refuse labels below 0, with which datasets mark rows without one, and those that the model does not have."""
    for extreme in (max(values, default=0), min(values, default=0)):
        if not 0 <= extreme < count:
            remedy = "prune a model that was trained on these classes"
            if extreme < 0:
                remedy = "name a split in which every row has its class, by --train-split or --eval-split"
            raise ValueError(
                f"--dataset {arguments.dataset}, split {rows.split}, has label {extreme}, but the model has {count} "
                f"labels; {remedy}."
            )


class ImageCollator:
    """Stack rows into a batch; flip and shift the images of training batches.

    Args:
        augment (`bool`, *optional*, defaults to `True`): Flip every second image and shift all by up to an eighth.
    """

    def __init__(self, augment: bool = True) -> None:
        self.augment = augment

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            rows (`list[dict]`): With `pixel_values` and `labels`.

        Returns:
            `dict`: `pixel_values` of shape `(batch, channels, height, width)` and `labels` of shape `(batch,)`.
        """
        import torch

        images = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows])
        labels = torch.tensor([int(row["labels"]) for row in rows])
        return {"pixel_values": shift_and_flip(images) if self.augment else images, "labels": labels}


def shift_and_flip(images: Any) -> Any:
    """Flip half of the images and shift each by up to an eighth of its size, reflecting at the border.

    Args:
        images (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Images.

    Returns:
        `torch.FloatTensor` of the same shape.
    """
    import torch

    batch, _, height, width = images.shape
    down, right = height // 8, width // 8
    padded = torch.nn.functional.pad(images, (right, right, down, down), mode="reflect")
    top = torch.randint(0, 2 * down + 1, (batch, 1))
    left = torch.randint(0, 2 * right + 1, (batch, 1))
    columns = torch.arange(width)[None, :]
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns, width - 1 - columns) + left  # (batch, width)
    rows = torch.arange(height)[None, :] + top  # (batch, height)
    index = torch.arange(batch)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


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
