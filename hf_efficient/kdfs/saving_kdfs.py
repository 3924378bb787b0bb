"""Disks that take no more: every library says it in its own way, here it is one sentence."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


OF_TORCH = ("PytorchStreamWriter", "inline_container", "file write failed")  # how torch.save says it


@contextmanager
def disk_is_named(folder: str | os.PathLike) -> Iterator[None]:
    """Say which folder cannot be written, and what to do.

    Args:
        folder (`str` or `os.PathLike`): What is written inside.

    Raises:
        OSError: If the disk is full or refuses to be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in OF_TORCH):
            raise
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        reason = "the disk took a part only" if isinstance(error, RuntimeError) else reason
        raise OSError(
            f"{os.fspath(folder)} cannot be written ({reason}); make room there, or let it be written, and start the "
            "run again: it goes on from the last checkpoint that is whole."
        ) from error
