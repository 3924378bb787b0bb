"""Find the checkpoints of the demo and serve its page, without analytics and without network."""

import os
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from hf_efficient.quickstart import find_checkpoints


LLAVA_CARDS = {"easy-VQA": "dynamic-llava-easy-vqa", "scenes": "dynamic-llava-scenes"}
CARDS = {"toe": "vit-toe-cifar10", "kdfs": "resnet20-kdfs-cifar10", "pix2pix": "pix2pix-cartoon2photo"}
DENSE_CARD = "resnet20-cifar10"  # the network that the card of KDFS was pruned from


@dataclass(frozen=True)
class Checkpoints:
    """Where the four tabs take their checkpoints from; None and empty mean that there is none.

    Args:
        llava (`dict[str, Path]`): Folders of sparse LLaVAs by the name that visitors read.
        toe (`str` or `Path`, *optional*): Plain vision transformer.
        kdfs (`str` or `Path`, *optional*): Pruned network.
        kdfs_dense (`str` or `Path`, *optional*): The network it was pruned from.
        pix2pix (`str` or `Path`, *optional*): Cartoon-to-photo model.
    """

    llava: dict[str, Path] = field(default_factory=dict)
    toe: str | None = None
    kdfs: str | None = None
    kdfs_dense: str | None = None
    pix2pix: str | None = None

    def __post_init__(self) -> None:
        for name in ("toe", "kdfs", "kdfs_dense", "pix2pix"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else os.fspath(value))

    @classmethod
    def find(cls, llava: list[str] | None = None, **names: str | None) -> "Checkpoints":
        """Take what is named, and the rest from `model_cards/` beside the package.

        Args:
            llava (`list[str]`, *optional*): Folders of sparse LLaVAs.
            **names (`str`, *optional*): Folder or Hub id by field.

        Returns:
            [`Checkpoints`]

        Raises:
            FileNotFoundError: If what is named is neither a checkpoint folder nor the id of one (`llava`: a folder).
            ValueError: If two folders of `llava` have one name.
        """
        for name, given in names.items():
            if given:
                _check_named(f"--{name.replace('_', '-')}", given)
        try:
            cards = find_checkpoints()
        except FileNotFoundError:  # a wheel carries none
            cards = None

        def beside(name: str) -> str | None:
            there = cards is not None and (cards / name / "config.json").is_file()
            return str(cards / name) if there else None

        found = {name: names.get(name) or beside(card) for name, card in CARDS.items()}
        own = None if names.get("kdfs") else beside(DENSE_CARD)  # it belongs to our pruned network alone
        found["kdfs_dense"] = names.get("kdfs_dense") or own
        folders = {Path(folder).name: Path(folder) for folder in llava or []}
        for name, folder in folders.items():
            if not (folder / "config.json").is_file():
                raise FileNotFoundError(f"--llava {folder}: {name} holds no config.json; name a checkpoint folder.")
        if len(folders) < len(llava or []):
            twice = [name for name in folders if sum(Path(folder).name == name for folder in llava) > 1]
            raise ValueError(f"--llava names two folders {twice[0]}: rename one of them.")
        if not folders:
            folders = {title: Path(path) for title, card in LLAVA_CARDS.items() if (path := beside(card))}
        return cls(llava=folders, **found)


def _check_named(option: str, name: str) -> None:
    """Refuse what can be no checkpoint; whether the Hub has an id shows when its tab is used first."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    remedy = "name a checkpoint folder or an id of the Hub."
    if Path(name).exists():
        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(f"{option} {name} holds no config.json; {remedy}")
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(f"{option} {name} is no folder here and no Hub id; {remedy}") from error


def launch(
    checkpoints: Checkpoints | None = None, *, host: str | None = None, port: int | None = None, browser: bool = False
) -> Any:
    """Build the page and serve it in the background.

    Args:
        checkpoints ([`Checkpoints`], *optional*): Default: those beside the package.
        host (`str`, *optional*): Address to listen on; default: what Gradio takes from its environment.
        port (`int`, *optional*): Port; likewise.
        browser (`bool`, defaults to `False`): Whether to open a browser.

    Returns:
        `gradio.Blocks`: Running; `local_url` is its address, `block_thread()` waits, `close()` ends it.

    Raises:
        ImportError: If Gradio is not installed.
        OSError: If the port is taken.
    """
    gradio = import_gradio()
    page = import_module(".page_demo", __package__)  # brings torch and the methods, which --help does without
    app = page.build_demo(Checkpoints.find() if checkpoints is None else checkpoints, gradio)
    app.queue(default_concurrency_limit=1)
    app.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=2 * page.MAX_BYTES,  # a little too large is answered in words, far too large is not taken at all
        theme=page.make_theme(gradio),
        css=page.STYLE,
    )
    return app


def import_gradio() -> Any:
    """Import Gradio with its telemetry off.

    Returns:
        The module.

    Raises:
        ImportError: If it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported, and by its threads
    try:
        import gradio
    except ImportError as error:
        raise ImportError('The demo needs Gradio; run pip install "hf-efficient[demo]".') from error
    return gradio
