"""Which streams have their state in memory: those that have something to do, first come, first served.

A stream leaves its slot between two segments, when others wait or nothing is left to hear; and within one when it has
been without audio for so long that it keeps others waiting. What it had heard of the segment is encoded again then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from pipeline.engine.causal.state import Stream


class Slots:
    """Of `num_slots`, each free or with its stream. `clock` gives seconds."""

    def __init__(self, num_slots: int, block_frames: int, park_after_s: float, clock: Callable[[], float]) -> None:
        self._block_frames, self._park_after_s, self._clock = block_frames, park_after_s, clock
        self.holders: list[Stream | None] = [None] * num_slots
        self.waiting: deque[Stream] = deque()

    def is_ready(self, stream: Stream) -> bool:
        """Whether it has a block to hear, or has ended."""
        return not stream.is_decoding and stream.has_work(self._block_frames)

    def ready(self) -> list[Stream]:
        return [each for each in self.holders if each is not None and self.is_ready(each)]

    def look(self, stream: Stream) -> None:
        """After something has come for a stream: it may want a slot now."""
        if stream.has_work(self._block_frames):
            self.touch(stream)
            if stream.slot is None and not stream.is_waiting:
                stream.is_waiting = True
                self.waiting.append(stream)

    def touch(self, stream: Stream) -> None:
        """It is not idle."""
        stream.idle_since = self._clock()

    def give(self) -> list[int]:
        """Slots that were given to streams that waited for one."""
        given = []
        while self.waiting and (slot := self.to_give()) is not None:
            stalled = self.holders[slot]
            if stalled is not None:
                self.leave(stalled)
            stream = self.waiting.popleft()
            stream.is_waiting, stream.slot, self.holders[slot] = False, slot, stream
            given.append(slot)
        return given

    def to_give(self) -> int | None:
        """A free slot, else that of the stream that has been without audio for longest, if that is long enough."""
        if None in self.holders:
            return self.holders.index(None)
        before = self._clock() - self._park_after_s
        idle = [
            each
            for each in self.holders
            if each is not None and not each.is_decoding and not self.is_ready(each) and each.idle_since <= before
        ]
        return min(idle, key=lambda each: each.idle_since).slot if idle else None

    def leave(self, stream: Stream) -> None:
        """Its state is lost."""
        if stream.slot is not None:
            self.holders[stream.slot] = None
            stream.slot = None
        stream.segment.start_over()

    def forget(self, stream: Stream) -> None:
        """It wants nothing any more."""
        self.leave(stream)
        if stream.is_waiting:
            self.waiting.remove(stream)
            stream.is_waiting = False
