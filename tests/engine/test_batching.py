from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from pipeline.engine.base import EngineError, EngineFailure, Result
from pipeline.engine.batching import BatchWorker
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis, Segment

TIMEOUT_S = 10


def silence(segment_id: str, seconds: float) -> Segment:
    return Segment(segment_id, np.zeros(int(seconds * SAMPLE_RATE_HZ), np.int16))


def hypothesis(segment: Segment) -> Hypothesis:
    return Hypothesis(segment.segment_id, segment.segment_id, "English", [1], [0.0], "stop")


class Recorder:
    """A model that answers with the segment's name. Until `open` is set it holds its batch, so that submissions can
    pile up behind it."""

    def __init__(self, fails: Callable[[Sequence[Segment]], Exception | None] = lambda _: None) -> None:
        self.batches: list[list[str]] = []
        self.entered = threading.Event()
        self.open = threading.Event()
        self._fails = fails

    def __call__(self, segments: Sequence[Segment]) -> list[Result]:
        self.batches.append([segment.segment_id for segment in segments])
        self.entered.set()
        assert self.open.wait(TIMEOUT_S)
        if error := self._fails(segments):
            raise error
        return [hypothesis(segment) for segment in segments]


@contextmanager
def working(recorder: Recorder, batch_size: int = 4, batch_audio_s: float = 1000) -> Iterator[BatchWorker]:
    worker = BatchWorker(recorder, batch_size, batch_audio_s)
    try:
        yield worker
    finally:
        recorder.open.set()
        worker.close()


def occupy(worker: BatchWorker, recorder: Recorder) -> None:
    worker.submit([silence("gate", 1)])
    assert recorder.entered.wait(TIMEOUT_S)


def texts(results: list[Result]) -> list[str]:
    return [result.text if isinstance(result, Hypothesis) else result.code for result in results]


def test_batches_cross_submissions_and_hold_alike_lengths() -> None:
    recorder = Recorder()
    with working(recorder) as worker:
        occupy(worker, recorder)
        futures = [
            worker.submit([silence(f"{unit}-{seconds}", seconds) for seconds in (3, 20, 4, 21)]) for unit in "ab"
        ]
        recorder.open.set()
        assert [texts(future.result(TIMEOUT_S)) for future in futures] == [
            ["a-3", "a-20", "a-4", "a-21"],
            ["b-3", "b-20", "b-4", "b-21"],
        ]
    assert [sorted(batch) for batch in recorder.batches] == [
        ["gate"],
        ["a-20", "a-21", "b-20", "b-21"],
        ["a-3", "a-4", "b-3", "b-4"],
    ]


def test_padded_audio_bounds_a_batch_but_never_stops_a_long_segment() -> None:
    recorder = Recorder()
    with working(recorder, batch_size=8, batch_audio_s=30) as worker:
        future = worker.submit([silence(str(seconds), seconds) for seconds in (50, 15, 14, 13, 1)])
        recorder.open.set()
        future.result(TIMEOUT_S)
    assert recorder.batches == [["50"], ["15", "14"], ["13", "1"]]


def test_the_oldest_submission_is_in_every_batch() -> None:
    recorder = Recorder()
    with working(recorder, batch_size=2) as worker:
        occupy(worker, recorder)
        old = worker.submit([silence("old-1", 1), silence("old-2", 2)])
        worker.submit([silence(f"new-{seconds}", seconds) for seconds in (30, 29, 28, 27)])
        recorder.open.set()
        old.result(TIMEOUT_S)
    assert recorder.batches[1] == ["old-2", "old-1"]


def test_the_last_short_segment_of_the_oldest_submission_takes_longer_ones_along() -> None:
    recorder = Recorder()
    with working(recorder, batch_size=3) as worker:
        occupy(worker, recorder)
        worker.submit([silence("old", 1)])
        worker.submit([silence("new-9", 9), silence("new-8", 8)])
        recorder.open.set()
    assert recorder.batches[1] == ["new-9", "new-8", "old"]


def test_a_segment_that_fails_takes_no_other_down() -> None:
    def poison(segments: Sequence[Segment]) -> Exception | None:
        return ValueError("bad mel") if any(segment.segment_id == "b" for segment in segments) else None

    recorder = Recorder(poison)
    recorder.open.set()
    with working(recorder) as worker:
        results = worker.submit([silence(name, 1) for name in "abc"]).result(TIMEOUT_S)
    assert texts(results) == ["a", "engine_error", "c"]
    failure = results[1]
    assert isinstance(failure, EngineFailure)
    assert str(failure) == "engine_error: ValueError: bad mel"
    assert failure.segment_id == "b"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
    ],
)
def test_out_of_memory_halves_the_batch(error: Exception) -> None:
    recorder = Recorder(lambda segments: error if len(segments) > 2 else None)
    recorder.open.set()
    with working(recorder, batch_size=8) as worker:
        results = worker.submit([silence(str(index), 1) for index in range(8)]).result(TIMEOUT_S)
    assert texts(results) == [str(index) for index in range(8)]
    assert [len(batch) for batch in recorder.batches] == [8, 4, 2, 2, 4, 2, 2]


def test_out_of_memory_alone_is_a_failure_of_that_segment() -> None:
    recorder = Recorder(lambda segments: MemoryError() if segments[0].segment_id == "long" else None)
    recorder.open.set()
    with working(recorder) as worker:
        results = worker.submit([silence("long", 9), silence("short", 1)]).result(TIMEOUT_S)
    assert texts(results) == ["out_of_memory", "short"]


@pytest.mark.parametrize("error", [torch.AcceleratorError("device-side assert"), TypeError("a bug")])
def test_a_broken_engine_tells_everyone(error: Exception) -> None:
    recorder = Recorder(lambda _: error)
    with working(recorder, batch_size=1) as worker:
        futures = [worker.submit([silence(name, 1)]) for name in "ab"]
        recorder.open.set()
        for future in futures:
            with pytest.raises(EngineError, match=f"broke: {type(error).__name__}: {error}"):
                future.result(TIMEOUT_S)
        with pytest.raises(EngineError, match="broke earlier"):
            worker.submit([silence("c", 1)])


def test_close_drains_and_then_refuses() -> None:
    recorder = Recorder()
    worker = BatchWorker(recorder, batch_size=1, batch_audio_s=10)
    future = worker.submit([silence(name, 1) for name in "abc"])
    recorder.open.set()
    worker.close()
    assert texts(future.result(0)) == ["a", "b", "c"]
    worker.close()
    with pytest.raises(EngineError, match="after close"):
        worker.submit([])


def test_an_empty_submission_is_done_at_once() -> None:
    with working(Recorder()) as worker:
        assert worker.submit([]).result(0) == []


def test_an_observer_hears_of_every_batch() -> None:
    recorder, batches = Recorder(fails=lambda segments: ValueError("no") if len(segments) == 3 else None), []
    worker = BatchWorker(recorder, 3, 1000, observe=batches.append)
    try:
        worker.submit([silence("gate", 1)])
        assert recorder.entered.wait(TIMEOUT_S)
        future = worker.submit([silence("a", 4), silence("b", 3), silence("c", 2), silence("d", 1.5)])
        recorder.open.set()
        future.result(TIMEOUT_S)
    finally:
        recorder.open.set()
        worker.close()
    told = [(batch.audio_s, batch.padded_s, batch.num_waiting) for batch in batches]
    assert told == [(1, 1, 4), (9, 12, 1), (1.5, 1.5, 0)], "one that is tried again segment by segment counts once"
    assert all(batch.busy_s >= 0 for batch in batches) and batches[0].busy_s > 0
