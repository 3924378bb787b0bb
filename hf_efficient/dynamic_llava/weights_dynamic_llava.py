"""Weights of a checkpoint folder: found and read one by one, written into shards, in place when whole."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging


SHARD_BYTES = 2 * 10**9  # tensors are held until this many bytes are together, then written
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

_WANTED = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
_PICKLES = (".bin", ".pth", ".pt", ".pkl", ".ckpt")


def first_line(error: Exception) -> str:
    """First line of an error's message, or its type."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def resolve_folder(source: str | os.PathLike, revision: str | None = None) -> Path:
    """Folder of `source`, downloaded where it is a Hub id; pickles are not downloaded."""
    if Path(source).is_dir():
        return Path(source)
    try:
        if Path(source).is_file():
            raise FileNotFoundError("it is a file.")
        if os.path.isabs(source):
            raise FileNotFoundError("there is no such folder.")
        return Path(snapshot_download(os.fspath(source), revision=revision, allow_patterns=list(_WANTED)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"`source` must be a folder or a Hub id, got {os.fspath(source)!r}: {_why_not_found(error)}"
        ) from error


def _why_not_found(error: Exception) -> str:
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision."
    if isinstance(
        error, LocalEntryNotFoundError
    ):  # also where there is no connection; a RepositoryNotFoundError is not
        return "there is no such folder, and the Hub could not be asked (no connection, or HF_HUB_OFFLINE is set)."
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such folder and no such repository on the Hub; for a private one run `hf auth login` first."
        )
    if isinstance(error, HFValidationError):
        return "there is no such folder, and a Hub id is `user/name`."
    return first_line(error)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of the source folder.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it holds no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`source` must hold {path.name}, got {path.parent} without it.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`source` must hold valid JSON, got {path}: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`source` must hold a JSON object in {path.name}, got {type(content).__name__}.")
    return content


def find_files(folder: Path, argument: str = "source") -> list[Path]:
    """Safetensors files of a checkpoint folder, in the order of their names."""
    present = sorted(path.name for path in folder.iterdir())
    if (folder / INDEX).is_file():
        table = read_json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ValueError(f"`{argument}` must hold an index with a `weight_map`, got {folder / INDEX} without one.")
        names = sorted(set(map(str, table.values())))
    else:
        names = [name for name in present if name.endswith(".safetensors")]
        names = [WEIGHTS] if WEIGHTS in names else names
        if len(names) > 1:
            raise ValueError(f"`{argument}` must hold {INDEX} beside {len(names)} shards, got {folder} without it.")
    for name in names:
        if PureWindowsPath(name).name != name or not name.endswith(".safetensors"):  # both kinds of separators
            raise ValueError(
                f"`{argument}` must hold an index that names safetensors files of its own folder, got {name!r}."
            )
        if name not in present:
            raise FileNotFoundError(f"`{argument}` must hold every shard of its index, got {folder} without {name}.")
    if not names:
        pickle = next((name for name in present if name.endswith(_PICKLES)), None)
        found = f"with {pickle} only" if pickle else "with no weights"
        raise ValueError(
            f"`{argument}` must hold safetensors weights, got {folder} {found}: pickled weights are never read, save "
            "the checkpoint as safetensors first."
        )
    return [folder / name for name in names]


class Weights:
    """Tensors of a checkpoint folder: all names and shapes at once, contents one by one.

    Args:
        folder (`Path`): Folder with safetensors files.

    Raises:
        FileNotFoundError: If a shard is missing.
        ValueError: If there are no safetensors files, an index names a file outside the folder, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.files = find_files(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, str] = {}
        for path in self.files:
            with self._open(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    part = file.get_slice(name)
                    self.shapes[name], self._kinds[name] = tuple(part.get_shape()), part.get_dtype()

    @contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, "pt") as file:
                yield file
        except SafetensorError as error:
            raise ValueError(f"`source` must hold whole safetensors files, got {path}: {error}.") from error

    def dtype(self, *endings: str) -> torch.dtype:
        """Stored dtype of the first tensor whose name ends with one of `endings`; float32 where there is none."""
        kinds = (kind for ending in endings for name, kind in self._kinds.items() if name.endswith(ending))
        return DTYPES.get(next(kinds, "F32"), torch.float32)

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors, all of them or only `names`."""
        for path in self.files:
            with self._open(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if names is None or name in names:
                        yield name, file.get_tensor(name)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Floating point dtype by its name; None for "auto"."""
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return None if dtype == "auto" else dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"`dtype` must be 'auto' or a floating point dtype such as 'bfloat16', got {dtype!r}.")
    return found


def cast_tensor(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Cast a floating point tensor; None keeps its dtype."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


# ------------------------------------------------------------------------------------------------------------ writing


def check_destination(destination: str | os.PathLike, overwrite: bool) -> None:
    """Raise `FileExistsError` if `destination` is a file, or holds files and `overwrite` is false."""
    path = Path(destination)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"`destination` must be a folder, got the file {path}: choose another path.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(
            f"`destination` must be absent or an empty folder, got {path}, which holds files: choose another folder "
            "or pass `overwrite=True`."
        )


@contextmanager
def staged(destination: str | os.PathLike, overwrite: bool, *sources: str | Path) -> Iterator[Path]:
    """Give a folder beside `destination` that takes its place at the end, or vanishes after an error."""
    destination = Path(destination).absolute()
    for source in sources:
        if isinstance(source, Path) and source.resolve().is_relative_to(destination.resolve()):
            raise FileExistsError(f"`destination` must not hold what is converted, got {destination} for {source}.")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.converting-")
    except OSError as error:
        raise OSError(
            f"`destination` must lie where folders can be made, got {destination} ({error.strerror}): choose another "
            "path."
        ) from error
    with beside as name:
        staging, old = Path(name) / "new", Path(name) / "old"
        staging.mkdir()
        yield staging
        check_destination(destination, overwrite)  # somebody else may have been faster
        if destination.exists():
            os.replace(destination, old)
        try:
            os.replace(staging, destination)
        except OSError:
            if old.exists():
                os.replace(old, destination)
            raise


def write_tensors(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, expected: int) -> None:
    """Write tensors into shards and, where there is more than one, their index."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        shards.append(list(held))
        save_file(held, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        held.clear()
        size = 0

    with logging.tqdm(total=expected, desc="Converting", unit="tensor") as bar:
        for name, tensor in tensors:
            held[name] = tensor.detach().contiguous()
            size, total = size + tensor.nbytes, total + tensor.nbytes
            if size >= SHARD_BYTES:
                flush()
            bar.update()
    if held:
        flush()
    if len(shards) == 1:
        os.replace(folder / "1.safetensors", folder / WEIGHTS)
        return
    table = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"{number}.safetensors", folder / file)
        table |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


__all__ = [
    "Weights",
    "cast_tensor",
    "check_destination",
    "find_files",
    "first_line",
    "parse_dtype",
    "read_json",
    "resolve_folder",
    "staged",
    "write_tensors",
]
