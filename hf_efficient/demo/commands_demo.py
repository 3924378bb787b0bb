"""`hf-efficient demo`: serve the page until it is interrupted."""

import argparse
import sys
from typing import Any

from .serve_demo import Checkpoints, launch


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
