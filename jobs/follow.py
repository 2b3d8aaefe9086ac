"""`shardscribe follow`: endless inputs in, one Parquet object for every so many segments of a stream out."""

from __future__ import annotations

import signal
import threading
import time
import types

from rich.console import Console

from pipeline import redact
from pipeline.alone import alone_in
from pipeline.config import ConfigError
from pipeline.engine.causal.engine import CausalEngine
from pipeline.engine.causal.tower_file import local_weights
from pipeline.follow.config import FollowConfig
from pipeline.follow.follower import Counts, Follower
from pipeline.output import Output, new_run_id
from pipeline.progress import duration
from pipeline.units import TranscribedSegment

EXIT_OK, EXIT_SOME_FAILED = 0, 3
_PROGRESS_EVERY_S = 10.0
_WAIT_FOR_LOCK_S = 5.0


def run(config: FollowConfig, until_idle: bool, text: Console, console: Console) -> int:
    """Until SIGINT or SIGTERM, or with `until_idle` until all that is there was heard; segments go to `text` as they
    end. Returns the exit code: 3 when segments failed.

    Raises ConfigError, CheckpointError and StorageError for what cannot be run as configured.
    """
    output = Output(config.output, config.storage.access)
    output.claim(config.job, local_weights(config.engine))
    folder = config.state_folder
    folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    with alone_in(folder, ConfigError, _WAIT_FOR_LOCK_S):
        streams = CausalEngine(config.engine)
        follower = Follower(config, streams, output, new_run_id(), lambda segment: _tell(segment, text))
        before = {number: signal.signal(number, _stopper(stop)) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            console.print(
                f"following {len(config.inputs):,} inputs; Ctrl-C stops, the same command goes on. Output: "
                f"{redact.names(output.url)}",
                highlight=False,
                soft_wrap=True,
            )
            follower.run(stop, until_idle, _Progress(console))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            streams.close()
    counts = follower.counts
    console.print(f"{_line(counts)}{'; stopped' if stop.is_set() else ''}", highlight=False, soft_wrap=True)
    return EXIT_SOME_FAILED if counts.failed else EXIT_OK


def _stopper(stop: threading.Event) -> signal._HANDLER:
    def handle(number: int, frame: types.FrameType | None) -> None:
        if stop.is_set():  # asked again: at once
            raise KeyboardInterrupt
        stop.set()

    return handle


def _tell(segment: TranscribedSegment, console: Console) -> None:
    said = segment.hypothesis.text if segment.hypothesis else f"({segment.error})"
    if said:
        at = time.strftime("%H:%M:%S", time.gmtime(segment.offset))
        console.print(
            f"{segment.recording_id}  {at}  {' '.join(said.split())}", highlight=False, markup=False, soft_wrap=True
        )


def _line(counts: Counts) -> str:
    failed = f", {counts.failed:,} failed" if counts.failed else ""
    waiting = f", {counts.waiting:,} waiting" if counts.waiting else ""
    return (
        f"{counts.open:,} streams open{waiting}, {counts.done:,} heard to their end; "
        f"{counts.segments:,} segments{failed}, {duration(counts.heard_s)}"
    )


class _Progress:
    """A line every so often, when something has changed."""

    def __init__(self, console: Console) -> None:
        self._console, self._said_at, self._said = console, time.monotonic(), ""

    def __call__(self, counts: Counts) -> None:
        if time.monotonic() - self._said_at >= _PROGRESS_EVERY_S and _line(counts) != self._said:
            self._said_at, self._said = time.monotonic(), _line(counts)
            self._console.print(self._said, highlight=False, soft_wrap=True)
