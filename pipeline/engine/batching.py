"""A thread that owns a model and turns submissions of any size into batches of alike lengths."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from pipeline.attempts import Watchdog
from pipeline.engine.base import Batch, EngineError, EngineFailure, Observer, Result
from pipeline.schema import Segment

Transcribe = Callable[[Sequence[Segment]], list[Result]]

# What one segment can bring about in a model. Anything else is a bug of ours and breaks the engine.
SEGMENT_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError)


@dataclass(slots=True, eq=False)
class Submission:
    """What one `submit` has asked for; `results` in the order of its segments, None where one is missing."""

    future: Future[list[Result]]
    results: list[Result | None]
    num_missing: int


@dataclass(slots=True)
class _Item:
    submission: Submission
    index: int
    segment: Segment


class BatchWorker:
    """Runs `transcribe` on batches of at most `batch_size` segments and `batch_audio_s` seconds, padding included (one
    segment always goes, however long).

    Every batch holds a segment of the oldest submission, so none waits forever, and is filled up with segments of
    the nearest lengths from all the others. A batch that fails is tried again segment by segment (in halves when
    memory ran out); a segment that fails alone becomes an EngineFailure. A failed accelerator (torch.AcceleratorError:
    no later call on it can work) or a bug breaks the engine: every future raises EngineError.
    """

    def __init__(
        self,
        transcribe: Transcribe,
        batch_size: int,
        batch_audio_s: float,
        watchdog: Watchdog | None = None,
        observe: Observer | None = None,
    ) -> None:
        """`watchdog` ends the process over a batch that hangs; `observe` hears of every batch."""
        self._transcribe = transcribe
        self._watchdog = watchdog or Watchdog(math.inf)
        self._observe = observe
        self._batch_size = batch_size
        self._batch_audio_s = batch_audio_s
        self._changed = threading.Condition()  # guards what follows
        self._items: list[_Item] = []  # in the order of submission
        self._closed = False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="asr-engine", daemon=True)
        self._thread.start()

    def submit(self, segments: Sequence[Segment]) -> Future[list[Result]]:
        future: Future[list[Result]] = Future()
        future.set_running_or_notify_cancel()
        submission = Submission(future, [None] * len(segments), len(segments))
        items = [_Item(submission, index, segment) for index, segment in enumerate(segments)]
        with self._changed:
            if self._broken is not None:
                raise EngineError(f"the engine broke earlier: {describe(self._broken)}") from self._broken
            if self._closed:
                raise EngineError("submit() after close(): the engine takes no more segments")
            self._items.extend(items)
            self._changed.notify()
        if not items:
            future.set_result([])
        return future

    def close(self) -> None:
        """Drain what is pending, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _loop(self) -> None:
        batch: list[_Item] = []
        try:
            while batch := self._next_batch():
                results = self._run_observed([item.segment for item in batch])
                for item, result in zip(batch, results, strict=True):
                    _deliver(item, result)
        # The end of the thread: whatever it was, those who wait for a result must hear of it.
        except BaseException as error:
            self._break(error, batch)

    def _next_batch(self) -> list[_Item]:
        """Waits for work. Empty once the worker is closed and drained."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            batch = select_batch(self._items, self._batch_size, self._batch_audio_s)
            taken = {id(item) for item in batch}
            self._items = [item for item in self._items if id(item) not in taken]
            return batch

    def _run_observed(self, segments: list[Segment]) -> list[Result]:
        began = time.monotonic()
        results = self._run(segments)
        if self._observe is not None:
            durations_s = [segment.duration_s for segment in segments]
            padded_s, busy_s = max(durations_s) * len(segments), time.monotonic() - began
            self._observe(Batch(sum(durations_s), padded_s, busy_s, len(self._items)))
        return results

    def _run(self, segments: list[Segment]) -> list[Result]:
        try:
            with self._watchdog.watch(f"a batch of {len(segments)} segments ({segments[0].segment_id}, ...)"):
                return self._transcribe(segments)
        except torch.AcceleratorError:
            raise
        except SEGMENT_ERRORS as error:
            code = "out_of_memory" if is_out_of_memory(error) else "engine_error"
            detail = describe(error)
        # Out of the handler: the exception's frames held the tensors of the batch.
        if code == "out_of_memory" and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(segments) == 1:
            return [EngineFailure(segments[0].segment_id, code, detail)]
        size = (len(segments) + 1) // 2 if code == "out_of_memory" else 1
        parts = [segments[start : start + size] for start in range(0, len(segments), size)]
        return [result for part in parts for result in self._run(part)]

    def _break(self, error: BaseException, batch: list[_Item]) -> None:
        with self._changed:
            self._broken = error
            waiting, self._items = batch + self._items, []
        for future in {id(item.submission): item.submission.future for item in waiting}.values():
            if not future.done():
                broken = EngineError(f"the engine broke: {describe(error)}")
                broken.__cause__ = error
                future.set_exception(broken)


def select_batch(items: Sequence[_Item], batch_size: int, batch_audio_s: float) -> list[_Item]:
    """The next batch of `items` (oldest submission first): the longest segment of the oldest submission, with its
    neighbours in length."""
    if not items:
        return []
    ordered = sorted(items, key=lambda item: -len(item.segment.pcm))  # stable
    anchor = next(i for i, item in enumerate(ordered) if item.submission is items[0].submission)

    def fitting(start: int) -> int:
        longest_s = max(ordered[start].segment.duration_s, 1e-3)
        return max(1, min(batch_size, int(batch_audio_s / longest_s)))

    # Near the short end too few are left to fill a batch from the anchor down: begin with longer ones.
    start = max(0, min(anchor, len(ordered) - batch_size))
    if anchor >= start + fitting(start):
        start = anchor
    return ordered[start : start + fitting(start)]


def _deliver(item: _Item, result: Result) -> None:
    submission = item.submission
    submission.results[item.index] = result
    submission.num_missing -= 1
    if submission.num_missing == 0:
        submission.future.set_result([done for done in submission.results if done is not None])


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a type for it; torch's CPU allocator only a message."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
