"""`hf-efficient demo`: the four methods in a browser, on the checkpoints beside the package or on those named.

One tab a method. Reading order: `commands_demo` (the command), `serve_demo` (checkpoints, the server), `page_demo`
(the page around the tabs), `dynamic_llava_demo`, `toe_demo`, `kdfs_demo` and `pix2pix_demo` (what a tab does; they
know no Gradio), `pictures_demo` (what the tabs share).
"""

from importlib import import_module


_EXPORTS = {"Checkpoints": "serve_demo", "launch": "serve_demo"}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
