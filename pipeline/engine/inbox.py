"""What has been submitted to an engine, between the threads that submit and those that work."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from pipeline.engine.base import EngineError, Heard, Result
from pipeline.schema import Segment

# What one segment can bring about in a model. Anything else is a bug of ours and breaks the engine.
SEGMENT_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError)


@dataclass(slots=True, eq=False)
class Submission:
    """What one `submit` has asked for; `results` in the order of its segments, None where one is missing: a Result
    each, or `in_parts` a list of Heard."""

    future: Future[list[Any]]
    results: list[Any]
    num_missing: int
    in_parts: bool = False


@dataclass(slots=True, eq=False)
class Item:
    """A segment of a submission."""

    submission: Submission
    index: int
    segment: Segment

    @property
    def is_cancelled(self) -> bool:
        return self.submission.future.cancelled()


I = TypeVar("I", bound=Item)  # noqa: E741


class Inbox(Generic[I]):
    """Items of type `I` that wait for a worker. Whoever reads or changes `waiting`, or waits for a change, holds
    `changed`."""

    def __init__(self, new_item: Callable[[Submission, int, Segment], I]) -> None:
        self._new_item = new_item
        self.changed = threading.Condition()
        self.waiting: deque[I] = deque()
        self.is_closed = False
        self._broken: BaseException | None = None

    @property
    def broken(self) -> str:
        """What broke the engine; nothing while it runs."""
        return "" if self._broken is None else f"the engine broke: {describe(self._broken)}"

    def submit(self, segments: Sequence[Segment], in_parts: bool = False) -> Future[list[Any]]:
        """See AsrEngine and StreamEngine."""
        future: Future[list[Any]] = Future()
        submission = Submission(future, [None] * len(segments), len(segments), in_parts)
        items = [self._new_item(submission, index, segment) for index, segment in enumerate(segments)]
        with self.changed:
            if self._broken is not None:
                raise EngineError(f"the engine broke earlier: {describe(self._broken)}") from self._broken
            if self.is_closed:
                raise EngineError("submit() after close(): the engine takes no more segments")
            self.waiting.extend(items)
            self.changed.notify_all()
        if not items:
            future.set_result([])
        return future

    def close(self) -> None:
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()

    def deliver(self, item: Item, result: Result | list[Heard]) -> None:
        """The result of an item; the last of a submission's sets its future."""
        submission = item.submission
        with self.changed:
            submission.results[item.index] = result
            submission.num_missing -= 1
            is_last = submission.num_missing == 0
        if is_last and submission.future.set_running_or_notify_cancel():
            submission.future.set_result([done for done in submission.results if done is not None])

    def fail(self, error: BaseException, taken: Iterable[I]) -> None:
        """The engine broke: every future of what was `taken`, and of what waits, raises EngineError."""
        with self.changed:
            self._broken = error
            items = [*taken, *self.waiting]
            self.waiting.clear()
        for future in {id(item.submission): item.submission.future for item in items}.values():
            if not future.done() and future.set_running_or_notify_cancel():
                broken = EngineError(f"the engine broke: {describe(error)}")
                broken.__cause__ = error
                future.set_exception(broken)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a type for it; torch's CPU allocator only a message."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
