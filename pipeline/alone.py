"""One process a folder: who dies may outlive its successor's start by some seconds."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone_in(folder: Path, error: Callable[[str], Exception], wait_s: float = 120.0) -> Iterator[None]:
    """Within it no other process is in `folder`. Raises `error(message)` when one is for longer than `wait_s`."""
    with (folder / ".lock").open("w") as file:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise error(f"another process works in {folder}; end it, or write to a new output") from None
                time.sleep(0.2)
        yield
