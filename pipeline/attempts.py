"""Finds the recording that kills its process, so that the rest of its unit is done.

A crash says nothing about its cause: the worker is gone, and Ray starts its task again. So work is announced before it
begins and struck off when it is done; what was announced and never struck off died. A task announces itself as a whole,
which costs one call. Only when it finds that an earlier attempt died does it announce recording by recording (or
segment by segment), and leaves out what has died `MAX_ATTEMPTS` times.
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NoReturn, Protocol

MAX_ATTEMPTS = 2  # announced by itself; with the attempt of its whole task it has been tried three times
CRASHED = f"its process died {MAX_ATTEMPTS + 1} times over it"
EXIT_STALLED = 86


class Attempts(Protocol):
    """Counts what was begun and not ended, for all processes of a run."""

    def begin(self, work: str) -> int:
        """Announce `work`; how often it was begun before and not ended."""
        ...

    def end(self, work: str) -> None: ...


class Ledger:
    """`Attempts` in memory; a run keeps one in an actor."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, work: str) -> int:
        before = self._begun[work]
        self._begun[work] += 1
        return before

    def end(self, work: str) -> None:
        del self._begun[work]


def end_process(why: str) -> NoReturn:
    """So that another process tries again, and in the end leaves out what this one met."""
    print(f"{why}: ending the process", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(EXIT_STALLED)


@cache
def watchdog(timeout_s: float) -> Watchdog:
    """The process' own: each has a thread, and a process reads thousands of splits."""
    return Watchdog(timeout_s)


class Watchdog:
    """Ends the process when something takes longer than `timeout_s` seconds without a sign of life: a decoder in an
    endless loop holds a task for ever, a dead process is tried again and in the end left out."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._watched: dict[int, tuple[str, float]] = {}  # number -> what, deadline
        self._number = 0
        self._thread: threading.Thread | None = None

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        with self._lock:
            self._number += 1
            number = self._number
            self._watched[number] = (what, time.monotonic() + self._timeout_s)
            if self._thread is None and self._timeout_s < math.inf:
                self._thread = threading.Thread(target=self._loop, name="watchdog", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                del self._watched[number]

    def _loop(self) -> None:
        while True:
            time.sleep(min(1.0, self._timeout_s / 4))
            with self._lock:
                late = [what for what, deadline in self._watched.values() if time.monotonic() > deadline]
            if late:
                end_process(f"no sign of life from {late[0]} for {self._timeout_s:g} s")
