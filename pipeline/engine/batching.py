"""A thread that owns a model and turns submissions of any size into batches of alike lengths."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from pipeline.attempts import Watchdog
from pipeline.engine.base import Batch, EngineFailure, Observer, Result
from pipeline.engine.inbox import SEGMENT_ERRORS, Inbox, Item, describe, is_out_of_memory
from pipeline.schema import Segment

Transcribe = Callable[[Sequence[Segment]], list[Result]]


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
        self._inbox = Inbox(Item)
        self._thread = threading.Thread(target=self._loop, name="asr-engine", daemon=True)
        self._thread.start()

    def submit(self, segments: Sequence[Segment]) -> Future[list[Result]]:
        """See AsrEngine."""
        return self._inbox.submit(segments)

    def close(self) -> None:
        """Drain what is pending, then end the thread."""
        self._inbox.close()
        self._thread.join()

    def _loop(self) -> None:
        batch: list[Item] = []
        try:
            while batch := self._next_batch():
                results = self._run_observed([item.segment for item in batch])
                for item, result in zip(batch, results, strict=True):
                    self._inbox.deliver(item, result)
        # The end of the thread: whatever it was, those who wait for a result must hear of it.
        except BaseException as error:
            self._inbox.fail(error, batch)

    def _next_batch(self) -> list[Item]:
        """Waits for work. Empty once the worker is closed and drained."""
        inbox = self._inbox
        with inbox.changed:
            while True:
                inbox.changed.wait_for(lambda: inbox.waiting or inbox.is_closed)
                left = [item for item in inbox.waiting if not item.is_cancelled]
                batch = select_batch(left, self._batch_size, self._batch_audio_s)
                taken = {id(item) for item in batch}
                inbox.waiting.clear()
                inbox.waiting.extend(item for item in left if id(item) not in taken)
                if batch or inbox.is_closed:
                    return batch

    def _run_observed(self, segments: list[Segment]) -> list[Result]:
        began = time.monotonic()
        results = self._run(segments)
        if self._observe is not None:
            durations_s = [segment.duration_s for segment in segments]
            padded_s, busy_s = max(durations_s) * len(segments), time.monotonic() - began
            self._observe(Batch(sum(durations_s), padded_s, busy_s, len(self._inbox.waiting)))
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


def select_batch(items: Sequence[Item], batch_size: int, batch_audio_s: float) -> list[Item]:
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
