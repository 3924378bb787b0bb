"""The Pix2Pix subcommands of `hf-efficient`."""

import argparse
import logging
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any


_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_WITH_ALPHA = (".png", ".webp", ".tif", ".tiff")
logger = logging.getLogger(__name__)


class Cartoonize:
    """Turn the photographs of a folder into cartoons.

    SOURCE is a picture or a folder of pictures, subfolders included. Each cartoon gets the name of its photograph, as
    PNG, in the folder DEST; for one picture DEST may also name the file to write, such as cartoon.jpg. Transparency is
    kept where the format has it. Files of a folder that end like no picture are passed over in one line; a picture
    that cannot be read, and pictures that differ only in their ending, are named at the end and stop nothing: exit
    code 3. Of a moving picture the first frame is taken.

    Examples:
      hf-efficient cartoonize ./photos ./cartoons
      hf-efficient cartoonize photo.jpg cartoon.png
      hf-efficient cartoonize ./photos ./cartoons --method palette --strength 5
    """

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of `cartoonize` to `parser`."""
        parser.add_argument("source", metavar="SOURCE", help="picture or folder of pictures")
        parser.add_argument("dest", metavar="DEST", help="folder to write; for one picture also a file")
        parser.add_argument(
            "--method", default="bilateral", help="bilateral, palette or mean_shift (default: bilateral)"
        )
        parser.add_argument("--strength", type=int, default=3, help="0 (the photograph) to 5 (default: 3)")

    @staticmethod
    def run(arguments: argparse.Namespace) -> dict[str, Any]:
        """Cartoonize every picture and say how many there are."""
        from PIL import Image

        from .cartoonize_pix2pix import cartoonize
        from .figures_pix2pix import read_picture

        how = {"method": arguments.method, "strength": arguments.strength}
        cartoonize(Image.new("RGB", (8, 8)), **how)  # wrong settings show before the first picture

        def outputs(files: list[Path]) -> Iterator[Any]:
            for path in files:
                try:
                    cartoon = cartoonize(read_picture(path), **how)
                except ValueError as error:
                    yield _Failed(str(error).removeprefix(f"{path} is "))
                    continue
                yield cartoon

        return _write_all(arguments, outputs, "cartoon")


class Translate:
    """Translate pictures with an image-to-image model, such as cartoons to photographs.

    MODEL is a Hub id or a folder. SOURCE is a picture or a folder of pictures of any sizes, subfolders included. Each
    result has the size of its picture and its name, as PNG, in the folder DEST; for one picture DEST may also name the
    file to write, such as photo.jpg. The model sees what is transparent over white, and the result gets the alpha
    channel of its picture back where the format has one. Files of a folder that end like no picture are passed over in
    one line; a picture that cannot be read, and pictures that differ only in their ending, are named at the end and
    stop nothing: exit code 3, and --json lists them with the reasons under "failed", the results under "files". Of a
    moving picture the first frame is taken.

    Examples:
      hf-efficient translate ./model_cards/pix2pix-cartoon2photo ./cartoons ./photos
      hf-efficient translate user/pix2pix-cartoon2photo cartoon.png photo.png
    """

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of `translate` to `parser`."""
        parser.add_argument("model", metavar="MODEL", help="Hub id or folder of an image-to-image model")
        parser.add_argument("source", metavar="SOURCE", help="picture or folder of pictures")
        parser.add_argument("dest", metavar="DEST", help="folder to write; for one picture also a file")
        parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="pictures at a time (default: 1)")
        parser.add_argument("--device", help="such as cpu or cuda:0 (default: the first accelerator)")

    @staticmethod
    def run(arguments: argparse.Namespace) -> dict[str, Any]:
        """Translate every picture and say how many there are."""
        from .pipeline_pix2pix import ImageToImageError

        if arguments.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {arguments.batch_size}.")
        _find_pictures(Path(arguments.source), results=Path(arguments.dest))  # before the model is loaded
        _is_file(Path(arguments.source), arguments.dest)
        translate = _load_pipeline(arguments.model, arguments.device)

        def outputs(files: list[Path]) -> Iterator[Any]:
            stream = translate((str(path) for path in files), batch_size=arguments.batch_size)
            try:
                for output in stream:
                    yield _Failed("") if output is None else output
            except ImageToImageError as error:
                reasons.update(error.failures)

        reasons: dict[int, str] = {}
        return _write_all(arguments, outputs, "translation", reasons)


class Robustness:
    """Measure how well a cartoon-to-photo model survives other cartoons.

    MODEL is a Hub id or a folder, or several for the matrix of models and cartoonizers; each goes by the last part of
    its path, or by the name given to it as NAME=MODEL. DATA is a folder of photographs or a parquet file with an image
    column. Writes a page that opens from disk (index.html), its figures (robustness.json), a plot and sample sheets. A
    photograph that cannot be read or has fewer than 11 pixels on a side is named at the end, by its file or its row,
    and stops nothing: exit code 3.

    Examples:
      hf-efficient robustness ./model_cards/pix2pix-cartoon2photo ./photos --output ./robustness
      hf-efficient robustness bilateral=./run-a palette=./run-b --data test.parquet --severities 0 3 5 --limit 50
    """

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of `robustness` to `parser`."""
        parser.add_argument("model", nargs="+", metavar="MODEL", help="model, or NAME=MODEL several times, then DATA")
        parser.add_argument("--data", help="photographs: a folder or a parquet file (default: the last MODEL)")
        parser.add_argument(
            "--column",
            dest="image_column",
            metavar="NAME",
            default="image",
            help="image column of a parquet file (default: image)",
        )
        parser.add_argument(
            "--output", metavar="DIR", default="robustness", help="folder to write (default: ./robustness)"
        )
        parser.add_argument("--methods", nargs="+", metavar="NAME", help="cartoonizers (default: all three)")
        parser.add_argument("--severities", nargs="+", type=int, metavar="N", help="strengths 0 to 5 (default: all)")
        parser.add_argument("--features", metavar="FILE", help="weights of tf_efficientnet_lite0, for KID and cosine")
        parser.add_argument(
            "--trained-on",
            nargs="+",
            metavar="NAME=CARTOONIZER",
            help="what each model was trained on; of a single model the cartoonizer alone will do",
        )
        parser.add_argument("--limit", type=int, metavar="N", help="use only the first photographs")
        parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures at a time (default: 8)")
        parser.add_argument("--device", help="such as cpu or cuda:0 (default: the first accelerator)")

    @staticmethod
    def run(arguments: argparse.Namespace) -> dict[str, Any]:
        """Measure, write the report and show its table."""
        from .cartoonize_pix2pix import METHODS
        from .robustness_pix2pix import check_grid, evaluate_robustness

        names = list(arguments.model)
        data = arguments.data or (names.pop() if len(names) > 1 else None)
        if data is None:
            raise ValueError("DATA is missing: name a folder of photographs or a parquet file after the model.")
        for option, value in (("--batch-size", arguments.batch_size), ("--limit", arguments.limit)):
            if value is not None and value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}.")
        _check_folder("--output", Path(arguments.output))
        models = dict(_named(name) for name in names)
        if len(models) != len(names):
            raise ValueError("Several models need names of their own, such as a=./run-a b=./run-b.")
        settings: dict[str, Any] = {"image_column": arguments.image_column, "limit": arguments.limit}
        for name in ("methods", "severities"):
            if getattr(arguments, name):
                settings[name] = getattr(arguments, name)
        check_grid(**{name: settings[name] for name in ("methods", "severities") if name in settings})
        trained_on = {}
        for entry in arguments.trained_on or ():
            name, sign, method = entry.rpartition("=")
            trained_on[name if sign else next(iter(models)) if len(models) == 1 else entry] = method
        unknown = sorted(trained_on.keys() - models.keys())
        if unknown:
            raise ValueError(
                f"--trained-on names {unknown[0]!r}, which is none of the models {', '.join(models)}; of "
                "several models write NAME=CARTOONIZER."
            )
        for method in trained_on.values():
            if method not in METHODS:
                raise ValueError(f"--trained-on must name a cartoonizer ({', '.join(METHODS)}), got {method!r}.")
        failed: list[dict[str, str]] = []
        photos = _load_photos(Path(data), arguments.image_column, failed)
        report = evaluate_robustness(
            {name: _load_pipeline(model, arguments.device) for name, model in models.items()},
            photos,
            features=arguments.features,
            trained_on=trained_on,
            batch_size=arguments.batch_size,
            **settings,
        )
        page = report.save(arguments.output)
        result = {
            **report.to_dict(),
            "page": str(page),
            "failed": failed,
            "text": f"{report}\n\n{page}: the report, with plots and samples.",
        }
        if failed:
            result["incomplete"] = f"{report.images} photographs were measured; left out: {_listed(failed)}"
        return result


class ConvertPix2Pix:
    """Convert a generator file of the widely used PyTorch implementation.

    SOURCE is its latest_net_G.pth (or a safetensors file with the same keys): unet_128, unet_256, resnet_6blocks or
    resnet_9blocks. Pickled files are read as plain weights and nothing else. DEST must be absent or empty unless
    --overwrite is given; it appears when it is whole.

    Examples:
      hf-efficient convert-pix2pix ./checkpoints/facades/latest_net_G.pth ./facades
      hf-efficient convert-pix2pix latest_net_G.pth ./facades --overwrite
    """

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of `convert-pix2pix` to `parser`."""
        parser.add_argument("source", metavar="SOURCE", help="generator file, .pth or .safetensors")
        parser.add_argument("destination", metavar="DEST", help="folder to write; absent or empty")
        parser.add_argument("--overwrite", action="store_true", help="replace DEST if it holds something")

    @staticmethod
    def run(arguments: argparse.Namespace) -> dict[str, Any]:
        """Convert and say what was found in the file."""
        from .configuration_pix2pix import Pix2PixConfig
        from .convert_pix2pix import convert_pix2pix_checkpoint

        folder = convert_pix2pix_checkpoint(arguments.source, arguments.destination, overwrite=arguments.overwrite)
        config = Pix2PixConfig.from_pretrained(folder)
        depth = f" with {config.num_levels} levels" if config.generator == "unet" else ""
        found = f"{config.generator}{depth}, {config.base_channels} channels, {config.norm} norm"
        return {"folder": str(folder), "generator": found, "text": f"Wrote {folder}: {found}."}


class _Failed:
    """Takes the place of a picture that could not be read."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _load_pipeline(model: str, device: str | None) -> Any:
    """The pipeline of `model`, or one sentence that says why there is none."""
    import torch
    from safetensors import SafetensorError
    from transformers import pipeline

    try:
        if device is not None:
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device must be one that torch can use here, such as cpu, got {device!r}.") from error
    try:
        return pipeline("image-to-image", model=model, device=device)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        kind = "holds no image-to-image model that loads" if Path(model).is_dir() else "is no folder here"
        other = "" if Path(model).is_dir() else " and no Hub id that could be loaded"
        reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
        raise ValueError(f"MODEL {model} {kind}{other} ({reason}).") from error


def _find_pictures(source: Path, name: str = "SOURCE", results: Path | None = None) -> tuple[list[Path], list[Path]]:
    """The pictures to read and the other files there, both without those of an earlier run, in `results`."""
    if source.is_file():
        return [source], []
    if not source.is_dir():
        what = "is neither a picture nor a folder" if source.exists() else "does not exist"
        raise FileNotFoundError(f"{name} {source} {what}; name a picture or a folder of pictures.")
    files = sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith("."))
    if results is not None and results.resolve() != source.resolve():
        files = [path for path in files if results.resolve() not in path.resolve().parents]
    pictures = [path for path in files if path.suffix.lower() in _ENDINGS]
    if not pictures:
        raise FileNotFoundError(f"{name} {source} holds no picture ({', '.join(_ENDINGS)}).")
    return pictures, [path for path in files if path.suffix.lower() not in _ENDINGS]


def _say_skipped(source: Path, skipped: list[Path]) -> None:
    if skipped:
        names = [str(path.relative_to(source)) for path in skipped[:3]]
        names += [f"{len(skipped) - 3} more"] if len(skipped) > 3 else []
        what = "1 file" if len(skipped) == 1 else f"{len(skipped)} files"
        logger.warning(f"Passed over {what} of {source}, not of the kinds {', '.join(_ENDINGS)}: {', '.join(names)}")


def _write_all(
    arguments: argparse.Namespace, outputs: Any, noun: str, reasons: dict[int, str] | None = None
) -> dict[str, Any]:
    """Write each output under its picture's name; list beside them what could not be read or has no name to go by."""
    from transformers.utils import logging

    from .figures_pix2pix import save_picture

    source, dest = Path(arguments.source), Path(arguments.dest)
    files, skipped = _find_pictures(source, results=dest)
    single = _is_file(source, arguments.dest)
    targets, clashes = _targets(files, source if source.is_dir() else source.parent, dest, single)
    _say_skipped(source, skipped)
    todo = list(targets)
    written, moving, failed = [], [], {}
    for number, output in enumerate(logging.tqdm(outputs(todo), total=len(todo), desc=noun.capitalize())):
        path = todo[number]
        if isinstance(output, _Failed):
            failed[path] = output.reason
            continue
        written.append(str(save_picture(_with_alpha(output, path, targets[path]), targets[path])))
        moving += [str(path)] if _is_moving(path) else []
    for number, reason in (reasons or {}).items():
        failed[todo[number]] = reason.removeprefix(f"{todo[number]}: ")
    failed.update(clashes)
    left_out = [{"file": str(path), "reason": failed[path]} for path in files if path in failed]
    if not written:
        verb = "written" if clashes else "read"
        raise ValueError(f"None of {len(files)} pictures could be {verb}: {_listed(left_out)}")
    if moving:
        logger.warning(f"Only the first frame was taken of {', '.join(moving)}")
    plural = noun if len(written) == 1 else f"{noun}s"
    report = {
        "files": written,
        "failed": left_out,
        "skipped": [str(path) for path in skipped],
        "text": f"Wrote {len(written)} {plural} to {dest}.",
    }
    if failed:
        done = f"{len(written)} of {len(files)} pictures were written to {dest}"
        report["incomplete"] = f"{done}; left out: {_listed(left_out)}"
    return report


def _listed(failed: list[dict[str, str]]) -> str:
    return "; ".join(f"{entry['file']}: {entry['reason']}" for entry in failed)


def _with_alpha(output: Any, path: Path, target: Path) -> Any:
    """Give a result the alpha channel of its picture, or say that the format of its file has none."""
    from PIL import Image, ImageOps

    from .image_processing_pix2pix import to_rgb

    alpha = None
    with Image.open(path) as picture:
        if picture.has_transparency_data and not picture.mode.startswith(("I", "F")):  # the pipeline ignores these
            alpha = ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A")
    if alpha is not None and alpha.getextrema()[0] == 255:
        alpha = None
    if target.suffix.lower() not in _WITH_ALPHA:
        if alpha is not None:
            logger.warning(f"{target} cannot hold the transparency of {path}: it was laid over white")
        return output if output.mode in ("RGB", "L") else to_rgb(output)
    if alpha is not None and not output.has_transparency_data:
        output = output.copy()
        output.putalpha(alpha.resize(output.size) if alpha.size != output.size else alpha)
    return output


def _is_moving(path: Path) -> bool:
    """Whether a picture has more frames than the one that was taken; those a phone adds to a photograph are none."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.format != "MPO" and getattr(picture, "is_animated", False)
    except (OSError, SyntaxError, ValueError):  # damaged behind its first frame
        return False


def _is_file(source: Path, given: str) -> bool:
    """Whether DEST names the one file to write; refuse what cannot be written before the work starts."""
    from PIL import Image

    dest = Path(given)
    ending = dest.suffix.lower()
    folder = dest.is_dir() or not ending or given.endswith(("/", os.sep))
    if folder or (not source.is_file() and ending not in Image.registered_extensions()):
        _check_folder("DEST", dest)
        return False
    if not source.is_file():
        raise ValueError(f"DEST {dest} ends like a picture, but SOURCE {source} is a folder; name a folder.")
    if ending not in _ENDINGS:
        raise ValueError(
            f"DEST {dest} must end in one of {', '.join(_ENDINGS)}, or name a folder: one that is there, has no "
            "ending, or is written with a / at its end."
        )
    _check_folder("DEST", dest.parent)
    return True


def _check_folder(name: str, folder: Path) -> None:
    """Refuse a folder that cannot be written before the work starts. Twin: `check_folder` of `pruner_kdfs.py`."""
    if folder.is_file():
        raise ValueError(f"{name} {folder} is a file; name a folder.")
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:  # tried, not asked: to an administrator every folder says yes
        os.rmdir(tempfile.mkdtemp(prefix=".hf_efficient_", dir=above))
    except OSError as error:
        why = "cannot be written" if above.is_dir() else "is a file"
        raise ValueError(f"{name} {folder} cannot be made: {above} {why}; name another folder.") from error


def _targets(files: list[Path], root: Path, dest: Path, single: bool) -> tuple[dict[Path, Path], dict[Path, str]]:
    """Picture -> file to write, and picture -> why there is none, where several would be written to one file."""
    users: dict[Path, list[Path]] = {}
    for path in files:
        target = dest if single else dest / path.relative_to(root).with_suffix(".png")
        if target.resolve() == path.resolve():
            raise ValueError(f"{path} would be replaced by its own result; name another DEST.")
        users.setdefault(target, []).append(path)
    targets, clashes = {}, {}
    for target, paths in users.items():
        names = [path.name for path in paths]
        which = f"{', '.join(names[:-1])} and {names[-1]} would {'both' if len(names) == 2 else 'all'}"
        for path in paths if len(paths) > 1 else ():
            clashes[path] = f"{which} be written to {target.name}; rename one of them"
        if len(paths) == 1:
            targets[paths[0]] = target
    return targets, clashes


def _named(entry: str) -> tuple[str, str]:
    """Name and model of one MODEL: what stands before the sign of equality, or the last part of the path."""
    name, sign, model = entry.partition("=")
    return (name, model) if sign and not Path(entry).exists() else (Path(entry).resolve().name or "model", entry)


def _load_photos(data: Path, column: str, failed: list[dict[str, str]]) -> Any:
    """Rows of photographs; what cannot be measured is noted in `failed` as the rows are read."""
    import datasets

    from .figures_pix2pix import read_picture
    from .robustness_pix2pix import SMALLEST

    if data.suffix == ".parquet" and data.is_file():
        try:
            table = datasets.Dataset.from_parquet(str(data))
        except Exception as error:  # datasets and pyarrow have many
            raise ValueError(f"DATA {data} is no parquet file that can be read: write it again.") from error
        if column not in table.column_names:
            raise ValueError(f"--column must be one of {', '.join(table.column_names)}, got {column!r}.")
        table = table.select_columns([column]).cast_column(column, datasets.Image())
        names = [f"{data}, row {row}" for row in range(len(table))]
        readers = [partial(_read_row, table, row, column) for row in range(len(table))]
    elif column != "image":
        raise ValueError(f"--column {column} is for a parquet file, but DATA {data} is none: leave it out.")
    else:
        files, skipped = _find_pictures(data, "DATA")
        _say_skipped(data, skipped)
        names, readers = [str(path) for path in files], [partial(read_picture, path) for path in files]

    def photos() -> Iterator[dict[str, Any]]:
        for name, read in zip(names, readers):
            try:
                photo = read()
            except ValueError as error:
                failed.append({"file": name, "reason": str(error).removeprefix(f"{name} is ")})
                continue
            if min(photo.size) >= SMALLEST:
                yield {column: photo}
            else:
                reason = f"{photo.width}x{photo.height} pixels, at least {SMALLEST} are needed"
                failed.append({"file": name, "reason": reason})
        if names and len(failed) == len(names):
            raise ValueError(f"DATA {data} holds no picture that can be measured: {_listed(failed)}")

    return photos()


def _read_row(table: Any, row: int, column: str) -> Any:
    """The photograph of one row; a `ValueError` says what it is instead."""
    from .figures_pix2pix import UNREADABLE, say_unreadable

    try:
        photo = table[row][column]
    except UNREADABLE as error:
        raise ValueError(say_unreadable(error)) from error
    if photo is None:
        raise ValueError("no picture")
    return photo
