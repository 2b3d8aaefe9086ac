"""One training an output: a worker may outlive its driver by some seconds."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.distill.worker import TrainingError


@contextmanager
def alone_in(folder: Path, wait_s: float = 120.0) -> Iterator[None]:
    """Within it no other process trains in `folder`. Raises TrainingError when one does so for longer than `wait_s`."""
    with (folder / ".lock").open("w") as file:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TrainingError(
                        f"another process trains in {folder}; end it, or write to a new output"
                    ) from None
                time.sleep(0.2)
        yield
