"""What ends its process is found and left out; everything else of its unit is done."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from pipeline import read
from pipeline.attempts import CRASHED, EXIT_STALLED, Attempts, Ledger
from pipeline.audio import Channels
from pipeline.config import EngineConfig, SegmentationConfig, TranscribeConfig
from pipeline.engine.base import EngineFailure, Result
from pipeline.read import read_units
from pipeline.schema import SAMPLE_RATE_HZ, Segment
from pipeline.sources.plan import plan
from pipeline.transcribe import Transcriber
from pipeline.units import Done, Recording, Span, Unit, UnitKey
from tests.conftest import write_tar
from tests.rows import INFO, hypothesis


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_ledger_counts_what_was_begun_and_not_ended() -> None:
    ledger = Ledger()
    assert [ledger.begin("a"), ledger.begin("a"), ledger.begin("b")] == [0, 1, 0]
    ledger.end("a")
    assert ledger.begin("a") == 0


def attempts_until_done(path: Path, ledger: Attempts, done: Done = Done()) -> tuple[int, list[Unit]]:  # noqa: B008
    """Reads the split as often as the process dies over it: attempts, and the units of the last."""
    config = TranscribeConfig.model_validate({"inputs": [str(path)], "output": "o", "units": {"target_s": 6}})
    (split,) = plan(config.inputs, {}, config.units.target_s)
    for attempt in range(1, 10):
        try:
            return attempt, list(read_units(split, done, config, ledger))
        except Killed:
            continue
    raise AssertionError("it never came to an end")


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Numbers of the decoded recordings, by length in seconds, over which the process dies."""
    lengths: set[int] = set()
    real = read.decode

    def decode(file: BinaryIO, channels: Channels, offset_s: float, duration_s: float | None) -> Iterator[np.ndarray]:
        size = file.seek(0, 2)
        file.seek(0)
        if size // (2 * SAMPLE_RATE_HZ) in lengths:
            raise Killed
        return real(file, channels, offset_s, duration_s)

    monkeypatch.setattr(read, "decode", decode)
    return lengths


def test_a_process_has_one_watchdog_however_many_splits_it_reads(tmp_path: Path) -> None:
    def num_dogs() -> int:
        return sum(thread.name == "watchdog" for thread in threading.enumerate())

    path = write_tar(tmp_path / "a.tar", [0.5])
    attempts_until_done(path, Ledger())
    before = num_dogs()
    for _ in range(3):
        attempts_until_done(path, Ledger())
    assert num_dogs() == before > 0


def test_memory_that_runs_out_in_a_decoder_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def starving(*_: object) -> Iterator[np.ndarray]:
        yield np.zeros((SAMPLE_RATE_HZ, 1), np.int16)
        raise MemoryError

    def end_process(why: str) -> None:
        raise Killed(why)

    monkeypatch.setattr(read, "decode", starving)
    monkeypatch.setattr(read, "end_process", end_process)
    _, units = attempts_until_done(write_tar(tmp_path / "a.tar", [1.2]), Ledger())
    assert errors(units) == {"clip-000.wav": f"crashed_process: {CRASHED}"}


def errors(units: list[Unit]) -> dict[str, str | None]:
    recordings = [recording for unit in units for recording in unit.recordings]
    return {each.recording_id.rpartition("/")[2]: each.error for each in recordings}


def test_a_poisoned_recording_is_tried_three_times_and_left_out(tmp_path: Path, deadly: set[int]) -> None:
    path = write_tar(tmp_path / "a.tar", [1.2, 2.2, 3.2, 1.2])
    _, healthy = attempts_until_done(path, Ledger())
    deadly.add(3)
    attempts, units = attempts_until_done(path, Ledger())
    assert attempts == 4, "the fourth leaves it out"
    assert [unit.key for unit in units] == [unit.key for unit in healthy]
    assert errors(units) == errors(healthy) | {"clip-002.wav": f"crashed_process: {CRASHED}"}


def test_two_poisoned_recordings_of_one_split(tmp_path: Path, deadly: set[int]) -> None:
    path = write_tar(tmp_path / "a.tar", [1.2, 2.2, 3.2, 4.2])
    deadly.update({2, 4})
    _, units = attempts_until_done(path, Ledger())
    assert [error is None for error in errors(units).values()] == [True, False, True, False]


def test_the_row_of_a_poisoned_recording_goes_into_a_part_that_is_not_committed(
    tmp_path: Path, deadly: set[int]
) -> None:
    path = write_tar(tmp_path / "a.tar", [40.2])
    _, whole = attempts_until_done(path, Ledger())
    assert [unit.key.end for unit in whole] == ["p", "p", "p", "z"], "one recording in four parts"
    deadly.add(40)
    _, units = attempts_until_done(path, Ledger(), Done.of([whole[0].key]))
    assert [(unit.key.part, unit.key.end) for unit in units] == [(1, "z")]
    assert list(errors(units).values()) == [f"crashed_process: {CRASHED}"]
    assert Done.of([whole[0].key, units[0].key]).complete()


def test_a_healthy_split_costs_two_calls(tmp_path: Path) -> None:
    class Counting(Ledger):
        calls = 0

        def begin(self, work: str) -> int:
            self.calls += 1
            return super().begin(work)

        def end(self, work: str) -> None:
            self.calls += 1
            super().end(work)

    ledger = Counting()
    attempts_until_done(write_tar(tmp_path / "a.tar", [0.5] * 20), ledger)
    assert ledger.calls == 2


class DeadlyEngine:
    """Ends the process over any batch that holds the poisoned segment."""

    info = INFO

    def __init__(self, poisoned: str) -> None:
        self.poisoned = poisoned

    def submit(self, segments: Sequence[Segment]) -> Future[list[Result]]:
        if any(segment.segment_id == self.poisoned for segment in segments):
            raise Killed
        future: Future[list[Result]] = Future()
        future.set_result([hypothesis(segment.segment_id) for segment in segments])
        return future

    def close(self) -> None: ...


def test_a_poisoned_segment_fails_and_the_rest_of_its_unit_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.transcribe.create_engine", lambda *_: DeadlyEngine("b@0-1000"))
    recordings = [Recording(name, f"{name}.wav", np.zeros(SAMPLE_RATE_HZ, np.int16)) for name in "abc"]
    unit = Unit(UnitKey("a" * 16, 0, 0, "z"), recordings, [Span(i, 0, SAMPLE_RATE_HZ) for i in range(3)])
    ledger, attempts = Ledger(), 0
    while True:
        attempts += 1
        try:
            # a new process each time
            done = asyncio.run(Transcriber(EngineConfig(), SegmentationConfig(), ledger)(unit))
            break
        except Killed:
            continue
    assert attempts == 4
    assert [row.error for row in done.segments] == [None, f"crashed_process: {CRASHED}", None]
    assert isinstance(done.segments[0].error, type(None)) and not isinstance(done.segments[0].hypothesis, EngineFailure)


def test_the_watchdog_ends_a_process_that_hangs() -> None:
    script = (
        "import time\nfrom pipeline.attempts import Watchdog\n"
        "with Watchdog(0.4).watch('talk.wav'):\n    time.sleep(60)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert run.returncode == EXIT_STALLED
    assert "no sign of life from talk.wav for 0.4 s" in run.stderr


def test_the_watchdog_lets_go_of_what_ends_in_time() -> None:
    script = (
        "import time\nfrom pipeline.attempts import Watchdog\ndog = Watchdog(0.5)\n"
        "for _ in range(8):\n    with dog.watch('talk.wav'):\n        time.sleep(0.1)\ntime.sleep(0.7)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=50).returncode == 0
