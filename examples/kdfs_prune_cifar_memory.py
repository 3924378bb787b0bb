"""glibc hands memory back after every layer at large batches, and fetching it again can be half of a forward pass."""

import os
import sys


KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 << 30)}  # glibc reads them at the start


def keep_memory() -> None:
    """Start this process again with memory kept, unless it is or somebody has set it otherwise."""
    if sys.platform == "linux" and not KEEP_MEMORY.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
