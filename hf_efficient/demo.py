"""`hf-efficient demo`: the four methods in a browser, on the checkpoints beside the package or on those named.

One tab a method. What a tab does stands in `demo_<method>.py`, which knows no Gradio, the page around it in
`demo_page.py`; this file finds the checkpoints and serves the page. No analytics, no network.
"""

import argparse
import os
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from .quickstart import find_checkpoints


LLAVA_CARDS = {"easy-VQA": "dynamic-llava-easy-vqa", "scenes": "dynamic-llava-scenes"}
CARDS = {"toe": "vit-toe-cifar10", "kdfs": "resnet20-kdfs-cifar10", "pix2pix": "pix2pix-cartoon2photo"}
DENSE_CARD = "resnet20-cifar10"  # the network that the card of KDFS was pruned from
PORT = 7860


class Demo:
    """Show the four methods in a browser, on this machine.

    Ask a sparse LLaVA, see which patches ToE trains on, what KDFS cut out of a network, and a cartoon become a
    photograph. The checkpoints are read from model_cards/ of a clone; others are named by id or folder. A tab whose
    checkpoint is missing says so and does what it can. Ctrl-C ends it.

    Examples:
      hf-efficient demo
      hf-efficient demo --port 8000 --no-browser
      hf-efficient demo --host 0.0.0.0 --llava ./sparse-llava --toe google/vit-base-patch16-224
    """

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of `demo` to `parser`."""
        parser.add_argument(
            "--host",
            default="127.0.0.1",
            metavar="ADDRESS",
            help="address to listen on; 0.0.0.0 lets other machines in (default: 127.0.0.1)",
        )
        parser.add_argument("--port", type=int, default=PORT, metavar="N", help=f"port (default: {PORT})")
        parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
        parser.add_argument("--llava", nargs="+", metavar="DIR", help="folders of sparse LLaVAs")
        parser.add_argument("--toe", metavar="MODEL", help="vision transformer, a folder or a Hub id")
        parser.add_argument("--kdfs", metavar="MODEL", help="network pruned by KDFS, a folder or a Hub id")
        parser.add_argument("--kdfs-dense", metavar="MODEL", help="the network it was pruned from")
        parser.add_argument("--pix2pix", metavar="MODEL", help="cartoon-to-photo model, a folder or a Hub id")

    @staticmethod
    def run(arguments: argparse.Namespace) -> dict[str, Any]:
        """Serve the page until it is interrupted."""
        if not 1 <= arguments.port <= 65535:
            raise ValueError(f"--port must be from 1 to 65535, got {arguments.port}.")
        names = {name: getattr(arguments, name) for name in ("toe", "kdfs", "kdfs_dense", "pix2pix")}
        checkpoints = Checkpoints.find(llava=arguments.llava, **names)
        app = launch(checkpoints, host=arguments.host, port=arguments.port, browser=not arguments.no_browser)
        if not arguments.quiet:
            sys.stderr.write(f"The demo runs at {app.local_url} until Ctrl-C.\n")  # standard output is the result's
        app.block_thread()
        return {"url": app.local_url}


@dataclass(frozen=True)
class Checkpoints:
    """Where the four tabs take their checkpoints from; None and empty mean that there is none.

    Args:
        llava (`dict[str, Path]`): Folders of sparse LLaVAs by the name that visitors read.
        toe (`str`, *optional*): Plain vision transformer.
        kdfs (`str`, *optional*): Pruned network.
        kdfs_dense (`str`, *optional*): The network it was pruned from.
        pix2pix (`str`, *optional*): Cartoon-to-photo model.
    """

    llava: dict[str, Path] = field(default_factory=dict)
    toe: str | None = None
    kdfs: str | None = None
    kdfs_dense: str | None = None
    pix2pix: str | None = None

    @classmethod
    def find(cls, llava: list[str] | None = None, **names: str | None) -> "Checkpoints":
        """Take what is named, and the rest from `model_cards/` beside the package.

        Args:
            llava (`list[str]`, *optional*): Folders of sparse LLaVAs.
            **names (`str`, *optional*): Folder or Hub id by field.

        Returns:
            [`Checkpoints`]

        Raises:
            FileNotFoundError: If a folder of `llava` holds no checkpoint.
        """
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
        if not folders:
            folders = {title: Path(path) for title, card in LLAVA_CARDS.items() if (path := beside(card))}
        return cls(llava=folders, **found)


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
    page = import_module(".demo_page", __package__)  # brings torch and the methods, which --help does without
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
