"""Progress of a running job: a live line in a terminal, plain lines at intervals in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.commit import Receipt

LOG_EVERY_S = 10.0


class Progress:
    """`with Progress(console, expected_s) as progress: progress.add(receipt)`.

    `expected_s` is the estimated audio that this run has before it, in seconds.
    """

    def __init__(self, console: Console, expected_s: float) -> None:
        self._console = console
        self._expected_s = expected_s
        self._began = self._logged = time.monotonic()
        self._units = self._failed = self.num_retries = 0
        self._audio_s = 0.0
        self._live = Live(get_renderable=self._text, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def add(self, receipt: Receipt) -> None:
        self._units += 1
        self._failed += receipt.num_failed
        self.num_retries += receipt.num_retries
        self._audio_s += receipt.audio_s
        if not self._console.is_terminal and time.monotonic() - self._logged >= LOG_EVERY_S:
            self._logged = time.monotonic()
            self._console.print(self.line(), highlight=False, soft_wrap=True)

    def line(self) -> str:
        elapsed = time.monotonic() - self._began
        rtfx = self._audio_s / elapsed if elapsed else 0.0
        # byte sizes only estimate the audio; near the end the estimate may be passed
        remaining_s = max(self._expected_s - self._audio_s, 0.0)
        eta = duration(remaining_s / rtfx) if rtfx else "after the first unit"
        failed = f" · {self._failed} failed" if self._failed else ""
        retries = f" · {self.num_retries} storage retries" if self.num_retries else ""
        done = f"{duration(self._audio_s)} of ~{duration(self._expected_s)} audio"
        return (
            f"{self._units} units · {done}{failed}{retries} · "
            f"{rtfx:.1f}x real time · {duration(elapsed)} elapsed · ETA {eta}"
        )

    def _text(self) -> Text:
        return Text(self.line())


def duration(seconds: float) -> str:
    """ "45 s", "12 min 5 s", "3 h 20 min" """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
