"""Model cards rendered from measured results, and pushing a checkpoint to the Hub.

The card of a checkpoint is rendered from the `results.json` beside it, whose fields `hf_efficient.results` lists.
"""

import argparse
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from .results import RESULTS_NAME, check_results, read_results, run_meta, write_whole


logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
HEADINGS = ("Method", "Use", "Results", "How it was measured", "Data", "Limits", "Licence and citation")

# What a checkpoint repository may hold, by ending. Pickles (.bin, .pt, .pth, .pkl, .ckpt) have none of these.
_PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
_PUSHED_SUFFIXES = {".json", ".safetensors", ".py", ".md", ".txt", ".jinja", ".model", *_PICTURES}
_CONFIGS = ("config.json", "adapter_config.json")
_PUSHED_NAMES = {"LICENSE", "NOTICE", ".gitattributes"}
_TRAINING_STATE = {"trainer_state.json", "training_args.json", "all_results.json", "train_results.json"}
_TASK_OF_AUTO_CLASS = {
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForImageToImage": "image-to-image",
    "AutoModelForImageClassification": "image-classification",
}


def write_results(folder: str | os.PathLike, results: dict[str, Any]) -> Path:
    """Check `results`, write them as `results.json` and render the card beside them.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint folder; it must exist and hold the pictures named in `results`.
        results (`dict`): Fields as listed in `hf_efficient.results`.

    Returns:
        `Path`: The card.

    Raises:
        ValueError: If `results` break the schema or hold a value JSON cannot.
        FileNotFoundError: If a picture is missing.
    """
    check_results(results)
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    _check_pictures(Path(folder), results)
    write_whole(Path(folder) / RESULTS_NAME, text)
    return write_card(folder)


# --------------------------------------------------------------------------------------------------------- the card


def render_card(results: dict[str, Any]) -> str:
    """Render a model card, front matter included; the same results always give the same text.

    Args:
        results (`dict`): Contents of a `results.json`, fields as listed in `hf_efficient.results`.

    Returns:
        `str`: The Markdown of `README.md`, with the headings of `HEADINGS` in this order.

    Raises:
        ValueError: If `results` break the schema.
    """
    check_results(results)
    sections = {
        "Method": _method(results),
        "Use": f"```python\n{results['usage'].strip()}\n```",
        "Results": _measured(results),
        "How it was measured": _how_measured(results),
        "Data": _data(results),
        "Limits": "\n".join(f"* {_prose(limit)}" for limit in results["limits"]) or "None are known.",
        "Licence and citation": _citation(results),
    }
    body = "\n\n".join(f"## {heading}\n\n{sections[heading]}" for heading in HEADINGS)
    head = f"# {_plain(results['title'])}\n\n{_prose(results['summary'])}"
    return f"---\n{_front_matter(results)}\n---\n\n{head}\n\n{body}\n"


def write_card(folder: str | os.PathLike) -> Path:
    """Render `README.md` of a checkpoint folder from the `results.json` in it.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint folder.

    Returns:
        `Path`: The card, written whole or not at all.

    Raises:
        FileNotFoundError: If `results.json` or a picture it names is missing.
        ValueError: If `results.json` breaks the schema.
    """
    results = read_results(folder)
    _check_pictures(Path(folder), results)
    card = Path(folder) / CARD_NAME
    write_whole(card, render_card(results))
    return card


def _front_matter(results: dict[str, Any]) -> str:
    names = {dataset["id"]: dataset["name"] for dataset in results["datasets"]}
    evaluations = [
        EvalResult(
            task_type=results["pipeline_tag"],
            dataset_type=metric["dataset"],
            dataset_name=names[metric["dataset"]],
            dataset_split=metric["split"],
            metric_type=metric["type"],
            metric_name=metric["name"],
            metric_value=metric["value"],
        )
        for metric in results["metrics"]
    ]
    data = ModelCardData(
        pipeline_tag=results["pipeline_tag"],
        library_name=results.get("library_name") or "transformers",
        license=results["license"],
        datasets=list(names) or None,
        base_model=results.get("base_model"),
        tags=["hf_efficient", *(tag for tag in results.get("tags") or [] if tag != "hf_efficient")],
        model_name=results["name"],
        eval_results=evaluations or None,
    )
    return data.to_yaml().strip()


def _method(results: dict[str, Any]) -> str:
    paper = results.get("paper")
    return _prose(results["method"]) + (f"\n\nPaper: {_link(paper['title'], paper['url'])}." if paper else "")


def _measured(results: dict[str, Any]) -> str:
    parts = []
    for table in results["tables"]:
        parts.append(f"### {_plain(table['title'])}\n\n{_table(table['columns'], table['rows'])}")
        if table.get("note"):
            parts.append(_prose(table["note"]))
    parts += [
        f"![{_plain(picture['caption'])}]({picture['file']})\n\n*{_plain(picture['caption'])}*"
        for picture in results.get("pictures") or []
    ]
    return "\n\n".join(parts) or "Nothing was measured."


def _how_measured(results: dict[str, Any]) -> str:
    meta, runs = results["meta"], results["runs"]
    versions = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    facts = [
        ("Command", f"`{str(meta['command']).replace('`', chr(39))}`"),
        ("Commit", _plain(meta["commit"] or "outside a clone")),
        ("Hardware", _plain("; ".join([meta["cpu"], *([meta["gpu"]] if meta.get("gpu") else [])]))),
        ("Threads", _plain(meta["threads"])),
        ("Date", _plain(meta["date"])),
        ("Versions", _plain(versions)),
        ("Seeds", _plain(", ".join(map(str, results["seeds"])) or "none")),
    ]
    lines = "\n".join(f"* {name}: {value}" for name, value in facts)
    if not runs:
        return f"{lines}\n\nNo training or measuring run is recorded."
    columns = list(dict.fromkeys(key for run in runs for key in run if not isinstance(run[key], dict | list)))
    table = _table(columns, [[run.get(column) for column in columns] for run in runs])
    return f"{lines}\n\nEvery run ([{RESULTS_NAME}]({RESULTS_NAME}) holds them in full):\n\n{table}"


def _data(results: dict[str, Any]) -> str:
    lines = [
        f"* {_link(dataset['name'], dataset['url']) if dataset.get('url') else _plain(dataset['name'])}"
        f"{', licence: ' + _plain(dataset['license']) if dataset.get('license') else ''}"
        for dataset in results["datasets"]
    ]
    return "\n".join(lines) or "Not stated."


def _citation(results: dict[str, Any]) -> str:
    bibtex = (results.get("paper") or {}).get("bibtex")
    licence, code = _plain(results["license"]), "apache-2.0"  # code of this package lies beside many weights
    text = f"Weights and code of this repository: {licence}."
    if licence != code:
        text = f"Weights: {licence}. Code of hf_efficient that lies beside them: {code}."
    return text + (f"\n\n```bibtex\n{bibtex.strip()}\n```" if bibtex else "")


def _table(columns: list[Any], rows: list[list[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(c if c == "---" else _cell(c) for c in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return _plain(value)


def _plain(value: Any) -> str:
    """Show a string as it is, on one line: no Markdown, no HTML."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)


def _prose(text: str) -> str:
    """Keep Markdown, neutralise HTML outside code spans."""
    pieces = re.split(r"((?<![\\`])`[^`\n]+`(?!`))", text.strip())
    return "".join(piece if i % 2 else piece.replace("<", "&lt;") for i, piece in enumerate(pieces))


def _link(words: str, url: str) -> str:
    return f"[{_plain(words)}]({url})"


def _check_pictures(folder: Path, results: dict[str, Any]) -> None:
    files = [picture["file"] for picture in results.get("pictures") or []]
    files += [results["sample"]["file"]] if results.get("sample") else []
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{RESULTS_NAME} names the picture {name!r}, which is not in {folder}.")


# ---------------------------------------------------------------------------------------------------------- pushing


def push_checkpoint(
    folder_or_model: Any,
    repo_id: str,
    *,
    processor: Any = None,
    results: dict[str, Any] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Push a checkpoint to the Hub: config, safetensors, shipped code, processor, card and pictures, in one commit.

    Pickles, `training_args.bin`, optimizer and trainer states, hidden files and whatever else is no part of a
    checkpoint stay at home. Everything is checked before the first request.

    Args:
        folder_or_model (`str`, `os.PathLike` or `PreTrainedModel`): A checkpoint folder, or a model, which is saved to
            a temporary folder first.
        repo_id (`str`): Repository, `user/name`; it is created where it does not exist.
        processor (*optional*): Processor, tokenizer or image processor saved beside a model.
        results (`dict`, *optional*): Contents of `results.json`; default: the file in the folder. With neither, and
            without a `README.md` in the folder, the card says that nothing was measured.
        private (`bool`, *optional*): Whether a newly created repository is private.
        token (`str` or `bool`, *optional*): Token of the Hub; default: the one of `hf auth login`.
        revision (`str`, *optional*): Branch to push to; it is created where it does not exist. Default: `main`.
        commit_message (`str`, *optional*): Default: "Upload <name> with hf_efficient".

    Returns:
        `str`: URL of the commit.

    Raises:
        ValueError: If the folder holds no config or no safetensors, a file that is not what its name says, or a link
            out of the folder; if the results break the schema.
        FileNotFoundError: If the folder does not exist.
    """
    if isinstance(folder_or_model, str | os.PathLike):
        folder = Path(folder_or_model)
        if processor is not None:
            raise ValueError("processor goes with a model; save it into the folder instead.")
        return _push_folder(folder, repo_id, results, private, token, revision, commit_message)
    if not hasattr(folder_or_model, "save_pretrained"):
        raise ValueError(
            f"folder_or_model must be a checkpoint folder or a model with save_pretrained(), got "
            f"{type(folder_or_model).__name__}."
        )
    with tempfile.TemporaryDirectory() as folder:
        folder_or_model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        return _push_folder(Path(folder), repo_id, results, private, token, revision, commit_message)


def _push_folder(
    folder: Path,
    repo_id: str,
    results: dict[str, Any] | None,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str | None,
) -> str:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"`repo_id` must be user/name, of letters, digits, '.', '_' and '-', got {repo_id!r}: choose another name."
        ) from error
    files = checkpoint_files(folder)
    if results is None and RESULTS_NAME in files:
        results = read_results(folder)
    operations = {name: CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()}
    if results is not None:
        check_results(results)
        _check_pictures(folder, results)
        texts = {RESULTS_NAME: json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"}
        texts[CARD_NAME] = render_card(results)
    else:
        texts = {} if CARD_NAME in files else {CARD_NAME: render_card(_unmeasured(folder, repo_id))}
    for name, text in texts.items():
        operations[name] = CommitOperationAdd(path_in_repo=name, path_or_fileobj=text.encode())

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    message = commit_message or f"Upload {repo_id.split('/')[-1]} with hf_efficient"
    commit = api.create_commit(repo_id, list(operations.values()), commit_message=message, revision=revision)
    return commit.commit_url


def checkpoint_files(folder: str | os.PathLike) -> dict[str, Path]:
    """List the files of a checkpoint folder that belong into its repository.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint folder.

    Returns:
        `dict[str, Path]`: Path inside the repository -> resolved file on disk, sorted by name.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If a file or folder in it is a link that leaves it, no config or no safetensors weights are there,
            or a `.safetensors` or `.json` file is something else inside.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; name one that save_pretrained() wrote.")
    files, left = {}, []
    for parent, folders, names in os.walk(root, followlinks=False):
        inside = Path(parent)
        for name in folders + names:
            if not (inside / name).resolve().is_relative_to(root):
                raise ValueError(
                    f"{(inside / name).relative_to(root)} is a link out of {folder}; copy its target into the folder "
                    "or remove the link."
                )
        folders[:] = sorted(f for f in folders if not f.startswith((".", "checkpoint-", "__pycache__")))
        for name in sorted(names):
            path, key = inside / name, (inside / name).relative_to(root).as_posix()
            suffix = path.suffix.lower()
            wanted = name in _PUSHED_NAMES or (suffix in _PUSHED_SUFFIXES and name[0] != ".")
            if wanted and name not in _TRAINING_STATE and not (inside != root and suffix == ".py"):
                files[key] = path.resolve()
            else:
                left.append(key)
    _check_contents(files, str(folder))
    if left:
        logger.warning("Not pushed, no part of a checkpoint: %s.", ", ".join(left))
    return dict(sorted(files.items()))


def _check_contents(files: dict[str, Path], folder: str) -> None:
    if not set(_CONFIGS) & set(files):
        raise ValueError(f"{folder} holds no config.json; save the model there with save_pretrained() first.")
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(
            f"{folder} holds no .safetensors weights; pickled weights are not pushed, save the model again with "
            "save_pretrained()."
        )
    for name, path in files.items():
        if name.endswith(".safetensors"):
            with path.open("rb") as file:
                start = file.read(9)
            header = int.from_bytes(start[:8], "little")
            if len(start) < 9 or start[8:] != b"{" or header > path.stat().st_size - 8:
                raise ValueError(f"{name} is not a safetensors file (damaged, or a pickle by another name).")
        elif name.endswith(".json"):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{name} is not valid JSON: {error}.") from error
            if name in _CONFIGS and not isinstance(content, dict):
                raise ValueError(f"{name} must hold one JSON object, got {type(content).__name__}.")


def _unmeasured(folder: Path, repo_id: str) -> dict[str, Any]:
    """Results of a checkpoint nobody measured: the card says what it is, how it loads and that numbers are missing."""
    path = next(folder / name for name in _CONFIGS if (folder / name).is_file())
    config = json.loads(path.read_text(encoding="utf-8"))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", repo_id.split("/")[-1]).lstrip(".-_") or "checkpoint"
    auto = next((auto for auto in _TASK_OF_AUTO_CLASS if auto in config.get("auto_map", {})), "AutoModel")
    kind = (config.get("architectures") or [config.get("model_type") or config.get("peft_type") or "model"])[0]
    flag = ", trust_remote_code=True" if "auto_map" in config else ""
    return {
        "name": name,
        "title": name,
        "summary": f"A `{kind}` checkpoint, pushed with `hf_efficient`.",
        "method": f"`model_type`: `{config.get('model_type', 'adapter')}`.",
        "license": "other",
        "datasets": [],
        "pipeline_tag": _TASK_OF_AUTO_CLASS.get(auto, "feature-extraction"),
        "base_model": config.get("base_model_name_or_path") or None,
        "usage": f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({repo_id!r}{flag})",
        "tables": [],
        "metrics": [],
        "runs": [],
        "seeds": [],
        "limits": ["Nothing was measured for this checkpoint; its licence and data are not stated."],
        "meta": run_meta("push_checkpoint"),
    }


class Push:
    """Push a checkpoint folder to the Hub: config, safetensors, shipped code, processor, card and pictures.

    The card is rendered from results.json where the folder has one. Pickles, training state and hidden files stay
    at home. Log in first with `hf auth login`, or set HF_TOKEN.

    Examples:
      hf-efficient push ./sparse-llava user/sparse-llava
      hf-efficient push model_cards/dynamic-llava-scenes user/dynamic-llava-scenes --private --revision v1
    """

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of `push` to `parser`."""
        parser.add_argument("folder", metavar="FOLDER", help="checkpoint folder")
        parser.add_argument(
            "repo_id", metavar="REPO_ID", help="repository, user/name; created where it does not exist"
        )
        parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
        parser.add_argument("--revision", help="branch to push to; created where it does not exist (default: main)")
        parser.add_argument("--message", help="commit message")

    @staticmethod
    def run(arguments: argparse.Namespace) -> dict[str, Any]:
        """Push and say where the commit is."""
        url = push_checkpoint(
            arguments.folder,
            arguments.repo_id,
            private=arguments.private,
            revision=arguments.revision,
            commit_message=arguments.message,
        )
        return {"url": url, "text": f"Pushed: {url}"}
