"""`results.json` of a checkpoint, the facts that go with every measured number, and tables of numbers in a terminal.

Beside every checkpoint lies a `results.json`, written by the script that measured it; the card (`README.md`) is
rendered from that file alone, never typed. Fields (`*` = required):

| field | type | what it holds |
|---|---|---|
| `name` * | str | folder and repository name: letters, digits, `.`, `_`, `-` |
| `title` * | str | first heading of the card |
| `summary` * | str | one to three sentences under it (Markdown) |
| `method` * | str | what the checkpoint does differently and what gets cheaper (Markdown, one paragraph) |
| `paper` | dict | `{"title", "url", "bibtex"}` of the method; the last is optional |
| `license` * | str | licence id of the weights in the Hub's spelling, e.g. `apache-2.0` |
| `datasets` * | list of dict | `{"id", "name", "url", "license"}`; `id` = Hub id or slug, the last two optional |
| `pipeline_tag` * | str | the Hub's task, e.g. `image-text-to-text` |
| `library_name` | str | default `transformers` |
| `base_model` | str | Hub id of the checkpoint this one was made from; leave out when trained from scratch |
| `tags` | list of str | more tags; `hf_efficient` is always added |
| `usage` * | str | Python code that loads and uses the checkpoint; runs as it stands |
| `tables` * | list of dict | `{"title", "columns", "rows", "note"}`; cells are text or numbers, `note` optional |
| `pictures` | list of dict | `{"file", "caption"}`; `file` is a plain file name in the same folder |
| `metrics` * | list of dict | for the `model-index`, see below |
| `runs` * | list of dict | every run; its numbers and words become a table, nested values stay in the file |
| `seeds` * | list of int | seeds used |
| `limits` * | list of str | what it cannot do or was not tested for (Markdown, one or two sentences each) |
| `sample` | dict | `{"file", "text", "truth"}`: a picture in the folder and its prompt; optional: the true answer |
| `details` | dict | anything else worth keeping; not rendered |
| `meta` * | dict | block of `run_meta`: `command, commit, date, cpu, threads, versions`, optional `gpu` |

A metric is `{"dataset", "split", "type", "name", "value"}`: `dataset` is an `id` of `datasets`, `type` the id of a
metric such as `accuracy`, `name` says it in words, `value` is a finite number.

`tables`, `metrics`, `runs`, `seeds` may be empty lists where nothing was measured; the card then says so. Number cells
are written with four significant digits, whole numbers in full; a cell that needs other digits is given as a string.

`run_meta` makes the `meta` block, for `results.json` as for the `--json` files of the benchmarks. Call it when the run
starts, so that the commit is the one that ran:

    meta = run_meta("python examples/dynamic_llava_easy_vqa.py --seed 0")
    ...
    hf_efficient.hub.write_results(folder, {"name": ..., "meta": meta, ...})   # results.json and README.md, checked
"""

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


RESULTS_NAME = "results.json"

_VERSIONED = ("hf-efficient", "torch", "transformers", "huggingface-hub", "accelerate", "peft", "datasets", "numpy")
# field -> (type, required)
_FIELDS: dict[str, tuple[type, bool]] = {
    "name": (str, True),
    "title": (str, True),
    "summary": (str, True),
    "method": (str, True),
    "paper": (dict, False),
    "license": (str, True),
    "datasets": (list, True),
    "pipeline_tag": (str, True),
    "library_name": (str, False),
    "base_model": (str, False),
    "tags": (list, False),
    "usage": (str, True),
    "tables": (list, True),
    "pictures": (list, False),
    "metrics": (list, True),
    "runs": (list, True),
    "seeds": (list, True),
    "limits": (list, True),
    "sample": (dict, False),
    "details": (dict, False),
    "meta": (dict, True),
}
# list or dict field -> (required keys, optional keys) of its dicts
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "paper": (("title", "url"), ("bibtex",)),
    "datasets": (("id", "name"), ("url", "license")),
    "tables": (("title", "columns", "rows"), ("note",)),
    "pictures": (("file", "caption"), ()),
    "metrics": (("dataset", "split", "type", "name", "value"), ()),
    "sample": (("file", "text"), ("truth",)),
    "meta": (("command", "commit", "date", "cpu", "threads", "versions"), ("gpu",)),
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


# --------------------------------------------------------------------------------------------- how it was measured


def run_meta(command: str | None = None) -> dict[str, Any]:
    """Describe the run that is going on: what a measured number needs beside it.

    Args:
        command (`str`, *optional*): The command a reader types to repeat the run. Default: rebuilt from `sys.argv`,
            the script relative to the repository, absolute paths reduced to their last part.

    Returns:
        `dict`: `command`, `commit` (12 digits, `+changes` where the package or the examples differ from it, `None`
        outside a clone), `date` (UTC day), `cpu` (model and number of cores), `threads` (of torch), `versions`, and
        `gpu` where torch sees one.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    meta = {
        "command": command or _command_line(),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": f"{_cpu_model()}, {cores} core{'s' if cores != 1 else ''}",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
    }
    if torch.cuda.is_available():
        meta["gpu"] = torch.cuda.get_device_name()
    return meta


def _repository() -> Path:
    return Path(__file__).resolve().parent.parent


def _command_line() -> str:
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(_repository()) if script.is_relative_to(_repository()) else Path(script.name)
    folders = r"(?:(?<==)|^)(?:/|[A-Za-z]:[\\/])(?:.*[\\/])?(?=.)"  # of an absolute path, also of Windows
    arguments = [re.sub(folders, "", argument) for argument in sys.argv[1:]]
    start = ["python", shown.as_posix()] if shown.suffix == ".py" else [shown.as_posix()]
    return shlex.join([*start, *arguments])


def _commit() -> str | None:
    if not (_repository() / ".git").exists():
        return None
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--", "hf_efficient", "examples", "setup.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_repository()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_model() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# ------------------------------------------------------------------------------------------------------ the results


def check_results(results: dict[str, Any]) -> None:
    """Check the contents of a `results.json` against the table at the top of this module.

    Args:
        results (`dict`): The parsed file.

    Raises:
        ValueError: With one sentence that names the field, the rule and the value.
    """
    if not isinstance(results, dict):
        raise ValueError(f"{RESULTS_NAME} must hold one JSON object, got {type(results).__name__}.")
    unknown = sorted(set(results) - set(_FIELDS))
    if unknown:
        raise ValueError(f"{RESULTS_NAME} has no field {unknown[0]!r}; put what the schema lacks under 'details'.")
    for field, (kind, required) in _FIELDS.items():
        value = results.get(field)
        if value is None:
            if required:
                raise ValueError(f"{RESULTS_NAME} needs the field {field!r} ({kind.__name__}), which is missing.")
            continue
        if not isinstance(value, kind) or (kind is str and not value.strip()):
            rule = "non-empty str" if kind is str else kind.__name__
            raise ValueError(f"{RESULTS_NAME}: {field!r} must be a {rule}, got {value!r}.")
        if field in _KEYS:
            for item in value if kind is list else [value]:
                _check_keys(field, item)
    _check_values(results)


def _check_keys(field: str, item: Any) -> None:
    required, optional = _KEYS[field]
    if not isinstance(item, dict):
        raise ValueError(f"{RESULTS_NAME}: {field!r} must hold dicts with {', '.join(required)}, got {item!r}.")
    missing = [key for key in required if key not in item]
    extra = sorted(set(item) - {*required, *optional})
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has no key {extra[0]!r}"
        keys = ", ".join(required + optional)
        raise ValueError(f"{RESULTS_NAME}: an entry of {field!r} {what}; its keys are {keys}.")


def _check_values(results: dict[str, Any]) -> None:
    files = [picture["file"] for picture in results.get("pictures") or []]
    files += [results["sample"]["file"]] if results.get("sample") else []
    for name in [results["name"], *files]:
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"{RESULTS_NAME}: a name is letters, digits, '.', '_', '-' and no folder, got {name!r}.")
    for table in results["tables"]:
        rows = table["rows"] if isinstance(table["rows"], list) else [None]
        if not all(isinstance(line, list | tuple) for line in [table["columns"], *rows]):
            raise ValueError(f"{RESULTS_NAME}: table {table['title']!r} must hold lists under 'columns' and 'rows'.")
        for row in rows:
            if len(row) != len(table["columns"]):
                raise ValueError(
                    f"{RESULTS_NAME}: table {table['title']!r} has {len(table['columns'])} columns, but the row "
                    f"{row!r} has {len(row)} cells."
                )
    urls = [results["paper"]["url"]] if results.get("paper") else []
    urls += [dataset["url"] for dataset in results["datasets"] if dataset.get("url")]
    for url in urls:
        if not re.fullmatch(r"https?://[^\s()<>\"'`\\]+", url):
            raise ValueError(f"{RESULTS_NAME}: a url starts with https:// and has no spaces or brackets, got {url!r}.")
    known = {dataset["id"] for dataset in results["datasets"]}
    for metric in results["metrics"]:
        value = metric["value"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{RESULTS_NAME}: metric {metric['name']!r} must be a finite number, got {value!r}.")
        if metric["dataset"] not in known:
            raise ValueError(
                f"{RESULTS_NAME}: metric {metric['name']!r} names the dataset {metric['dataset']!r}, which is not an "
                f"id of 'datasets' ({', '.join(sorted(known)) or 'none'})."
            )
    for run in results["runs"]:
        if not isinstance(run, dict):
            raise ValueError(f"{RESULTS_NAME}: 'runs' must hold one dict per run, got {run!r}.")
    if not isinstance(results["meta"]["versions"], dict):
        raise ValueError(f"{RESULTS_NAME}: meta['versions'] must map packages to versions; use run_meta().")


def read_results(folder: str | os.PathLike) -> dict[str, Any]:
    """Read and check `results.json` of a checkpoint folder.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint folder.

    Returns:
        `dict`: The checked contents.

    Raises:
        FileNotFoundError: If the folder holds no `results.json`.
        ValueError: If the file is not JSON or breaks the schema.
    """
    path = Path(folder) / RESULTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it is written by the script that measures the checkpoint.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    check_results(results)
    return results


def check_target(option: str, file: str | os.PathLike) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    Whether its folder can be written is tried, not asked: to an administrator every folder says yes.

    Args:
        option (`str`): The option as it is typed, for the sentence.
        file (`str` or `os.PathLike`): What was given for it.

    Raises:
        OSError: If the folder is missing or takes no file, or `file` is a folder.
    """
    folder = Path(file).absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {file}: the folder does not exist; create it first.")
    if Path(file).is_dir():
        raise IsADirectoryError(f"{option} {file} is a folder; name a file in it.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = f"nothing can be written into {folder} ({error.strerror})"
        raise PermissionError(f"{option} {file}: {why}; name another file.") from error


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write a text file so that it appears whole or not at all.

    Args:
        path (`str` or `os.PathLike`): Where to; a file there is replaced.
        text (`str`): Its contents, stored as UTF-8.
    """
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary file beside `path` to write to, which takes its place at the end or vanishes after an error.

    Args:
        path (`str` or `os.PathLike`): Where to; a file there is replaced.

    Yields:
        `Path`: The temporary file, not yet there; its name ends like `path`.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- in a terminal


def format_table(columns: list[str], rows: list[list[Any]]) -> str:
    """Set a table in columns of equal width for a terminal.

    Args:
        columns (`list[str]`): Headings.
        rows (`list[list]`): Cells; a column of numbers is set right, floats with four significant digits; control
            characters are dropped.

    Returns:
        `str`: The table, no line break at its end.
    """
    texts = [[_format_cell(value) for value in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(columns))]
    right = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
    lines = [
        "  ".join(text.rjust(width) if flush else text.ljust(width) for text, width, flush in zip(row, widths, right))
        for row in texts
    ]
    return "\n".join(
        [lines[0].rstrip(), "  ".join("-" * width for width in widths), *(line.rstrip() for line in lines[1:])]
    )


def _format_cell(value: Any) -> str:
    return "".join(character for character in format_number(value) if character.isprintable())


def format_number(value: Any) -> str:
    """Write a cell of a table.

    Args:
        value (`Any`): Text as it is, whole numbers in groups of three, floats with four significant digits.

    Returns:
        `str`
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
