"""The engine of streams: a thread that owns a StreamBatch, live streams of other threads, and recordings as streams."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TypeVar

import numpy as np

from pipeline.attempts import Watchdog
from pipeline.config import EngineConfig
from pipeline.engine.base import Batch, EngineError, EngineFailure, Heard, Observer, Result
from pipeline.engine.causal.batch import StreamBatch
from pipeline.engine.causal.load import load_causal
from pipeline.engine.causal.outcome import hypothesis, in_parts, whole
from pipeline.engine.causal.settings import Settings
from pipeline.engine.causal.state import ClosedSegment, Resume, Stream, StreamError, Update, check_audio
from pipeline.engine.inbox import Inbox, Item, describe
from pipeline.engine.mel import HOP, NUM_FFT
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis, Segment

T = TypeVar("T")
_LOOK_S = 0.5  # how long a stalled stream may keep others waiting beyond its time
_RECORDINGS_A_SLOT = 2  # are open at once, so that one is there as soon as another ends


class LiveStream:
    """A stream whose audio comes from elsewhere. One thread pushes; updates come in the engine's own."""

    def __init__(
        self, engine: CausalEngine, stream: Stream, take: Callable[[Update], None], settings: Settings
    ) -> None:
        self._engine, self._stream, self._take = engine, stream, take
        self._most_samples = int(settings.max_waiting_s * SAMPLE_RATE_HZ)
        # beside what makes no block yet, and so waits for more
        self._most_at_once = self._most_samples - settings.geometry.block_frames * HOP - NUM_FFT
        self._num_pushed = self._num_heard = stream.num_heard_samples
        self._is_over = False
        self._changed = threading.Condition()

    def push(self, pcm: np.ndarray, sample_rate_hz: int = SAMPLE_RATE_HZ, timeout_s: float | None = 0.0) -> None:
        """More audio, int16 [n]. Waits for room as long as `timeout_s` (None: for ever). Raises StreamError, and then
        has taken none of it: `overrun` when there is no room."""
        check_audio(pcm, sample_rate_hz)
        if len(pcm) > self._most_at_once:
            most_s = self._most_at_once / SAMPLE_RATE_HZ
            raise StreamError("overrun", f"a chunk of {len(pcm) / SAMPLE_RATE_HZ:.1f} s; {most_s:.1f} s go at once")
        with self._changed:
            has_room = self._changed.wait_for(lambda: self._is_over or self._has_room(len(pcm)), timeout_s)
            if self._is_over:
                raise StreamError("ended", f"stream {self._stream.stream_id!r} has ended and takes no more audio")
            if not has_room:
                most_s = self._most_samples / SAMPLE_RATE_HZ
                raise StreamError("overrun", f"stream {self._stream.stream_id!r} has {most_s:.0f} s waiting")
            self._num_pushed += len(pcm)
        self._engine._later(partial(self._engine._push, self._stream, pcm))

    def end(self) -> None:
        """No more audio comes: what is held back will be said."""
        with self._changed:
            self._is_over = True
        self._engine._later(partial(self._engine._end, self._stream))

    def drop(self) -> None:
        """Forgets the stream without its last words; another one may go on where its last update says."""
        with self._changed:
            self._is_over = True
        self._engine._later(partial(self._engine._drop, self._stream))

    @property
    def room(self) -> int:
        """Samples that it takes at once now; 0 when it is over."""
        with self._changed:
            left = self._most_samples - (self._num_pushed - self._num_heard)
            return 0 if self._is_over else max(0, min(left, self._most_at_once))

    def _has_room(self, num_samples: int) -> bool:
        return self._num_pushed - self._num_heard + num_samples <= self._most_samples

    def _hear(self, update: Update) -> None:
        with self._changed:
            self._num_heard = round(update.heard_s * SAMPLE_RATE_HZ)
            self._is_over = self._is_over or update.is_last or update.error is not None
            self._changed.notify_all()
        self._take(update)


@dataclass(slots=True, eq=False)
class _Recording:
    """A submitted segment as a stream: how much of it was pushed, for how much more room the next push waits, and what
    it has said."""

    item: Item
    stream: Stream
    worth_pushing: float
    num_pushed: int = 0
    text: str = ""
    segments: list[ClosedSegment] = field(default_factory=list)


class CausalEngine:
    """See StreamEngine, and `open` for live streams. Raises as `load_causal` does."""

    def __init__(self, config: EngineConfig, observe: Observer | None = None) -> None:
        causal = load_causal(config)
        self.info, self._languages = causal.info, causal.languages
        self._settings, self._observe = causal.settings, observe
        self._batch = StreamBatch(causal.loaded, causal.settings, languages=causal.languages)
        self._most_recordings = min(causal.settings.max_streams, _RECORDINGS_A_SLOT * config.slots)
        self._inbox = Inbox(Item)
        self._commands: deque[Callable[[], None]] = deque()
        self._recordings: dict[str, _Recording] = {}
        self._live: dict[str, LiveStream] = {}
        self._numbers = count()
        self._heard_s: dict[str, float] = {}
        self._watchdog = Watchdog(config.stall_timeout_s)
        self._thread = threading.Thread(target=self._loop, name="asr-streams", daemon=True)
        self._thread.start()

    def submit(self, segments: Sequence[Segment]) -> Future[list[Result]]:
        """See AsrEngine; a segment may be of any length."""
        return self._inbox.submit(segments)

    def stream(self, recordings: Sequence[Segment]) -> Future[list[list[Heard]]]:
        """See StreamEngine."""
        return self._inbox.submit(recordings, in_parts=True)

    @property
    def broken(self) -> str:
        """Why streams have ended that nobody ended; nothing while the engine runs."""
        return self._inbox.broken

    def result(self, segment: ClosedSegment) -> Hypothesis | str:
        """What a segment of a live stream says, or why it is refused ("<code>: <detail>")."""
        found = hypothesis(segment, self._languages, "")
        return found if isinstance(found, Hypothesis) else str(found)

    def open(
        self,
        stream_id: str,
        take: Callable[[Update], None],
        language: str | None = None,
        context: str = "",
        resume: Resume | None = None,
    ) -> LiveStream:
        """A live stream, whose updates go to `take`; that is called in the engine's thread, must be quick and must not
        raise. Raises StreamError."""
        return self._call(partial(self._open, stream_id, take, language, context, resume))

    def close(self) -> None:
        """Ends what is live, finishes what was submitted."""
        self._inbox.close()
        self._thread.join()

    # from other threads to the engine's

    def _later(self, command: Callable[[], None]) -> None:
        with self._inbox.changed:
            self._commands.append(command)
            self._inbox.changed.notify_all()

    def _call(self, work: Callable[[], T]) -> T:
        future: Future[T] = Future()

        def command() -> None:
            try:
                future.set_result(work())
            except StreamError as error:
                future.set_exception(error)

        with self._inbox.changed:
            if not self._thread.is_alive() or self._inbox.is_closed:
                raise EngineError("the engine is closed or broke earlier: it takes no more streams")
            self._commands.append(command)
            self._inbox.changed.notify_all()
        return future.result()

    # the thread

    def _open(
        self,
        stream_id: str,
        take: Callable[[Update], None],
        language: str | None,
        context: str,
        resume: Resume | None,
    ) -> LiveStream:
        stream = self._batch.open(stream_id, language, context, resume)
        self._live[stream_id] = LiveStream(self, stream, take, self._settings)
        return self._live[stream_id]

    def _push(self, stream: Stream, pcm: np.ndarray) -> None:
        if not stream.is_done:  # it may have failed meanwhile
            self._batch.push(stream, pcm)

    def _end(self, stream: Stream) -> None:
        if not stream.is_done:
            self._batch.end(stream)

    def _drop(self, stream: Stream) -> None:
        self._batch.drop(stream)
        self._live.pop(stream.stream_id, None)
        self._heard_s.pop(stream.stream_id, None)

    def _loop(self) -> None:
        try:
            while self._wait():
                with self._watchdog.watch("a turn of the streams"):
                    self._turn()
        except BaseException as error:  # the end of the thread: those who wait must hear of it
            self._inbox.fail(error, [recording.item for recording in self._recordings.values()])
            for stream_id, live in self._live.items():
                failure = EngineFailure(stream_id, "engine_error", describe(error))
                live._hear(Update(stream_id, "", "", "", self._heard_s.get(stream_id, 0.0), error=failure))

    def _wait(self) -> bool:
        """Until there is something to do. False when closed and drained."""
        inbox = self._inbox
        with inbox.changed:
            while not (self._commands or self._batch.has_work or self._has_recordings_to_begin() or self._to_feed()):
                if inbox.is_closed:
                    if not len(self._batch):
                        return False
                    for live in self._live.values():
                        self._batch.end(live._stream)
                    continue
                inbox.changed.wait(_LOOK_S if self._batch.num_waiting else None)
            commands = [self._commands.popleft() for _ in range(len(self._commands))]
        for command in commands:
            command()
        return True

    def _has_recordings_to_begin(self) -> bool:
        return bool(self._inbox.waiting) and len(self._recordings) < self._most_recordings

    def _turn(self) -> None:
        began = time.monotonic()
        self._drop_cancelled()
        self._begin_recordings()
        for recording in self._to_feed():
            self._feed(recording)
        updates = self._batch.turn()
        audio_s = 0.0
        for update in updates:
            audio_s += update.heard_s - self._heard_s.get(update.stream_id, 0.0)
            self._heard_s[update.stream_id] = update.heard_s
        if self._observe is not None and audio_s > 0:
            num_waiting = len(self._inbox.waiting) + self._batch.num_waiting
            self._observe(Batch(audio_s, audio_s, time.monotonic() - began, num_waiting))
        for update in updates:
            self._give_out(update)

    def _begin_recordings(self) -> None:
        while True:
            with self._inbox.changed:
                if not self._has_recordings_to_begin():
                    return
                item = self._inbox.waiting.popleft()
            if item.is_cancelled:
                continue
            stream_id, segment = f"segment-{next(self._numbers)}", item.segment
            try:
                stream = self._batch.open(stream_id, segment.language, segment.context)
            except StreamError as error:
                failure = EngineFailure(segment.segment_id, error.code, error.detail)
                in_parts = item.submission.in_parts
                self._inbox.deliver(item, [Heard(0, len(segment.pcm), failure)] if in_parts else failure)
                continue
            half = int(self._settings.max_waiting_s * SAMPLE_RATE_HZ) // 2
            self._recordings[stream_id] = _Recording(item, stream, min(len(segment.pcm), half))

    def _to_feed(self) -> list[_Recording]:
        """Recordings of which a good deal more can be pushed."""
        return [each for each in self._recordings.values() if self._batch.room(each.stream) >= each.worth_pushing]

    def _feed(self, recording: _Recording) -> None:
        pcm, stream, start = recording.item.segment.pcm, recording.stream, recording.num_pushed
        end = min(len(pcm), start + self._batch.room(stream))
        self._batch.push(stream, pcm[start:end])
        recording.num_pushed = end
        if end == len(pcm):
            recording.worth_pushing = math.inf
            self._batch.end(stream)
        else:
            recording.worth_pushing = min(len(pcm) - end, recording.worth_pushing)

    def _drop_cancelled(self) -> None:
        for stream_id, recording in list(self._recordings.items()):
            if recording.item.is_cancelled:
                self._batch.drop(recording.stream)
                self._heard_s.pop(stream_id, None)
                del self._recordings[stream_id]

    def _give_out(self, update: Update) -> None:
        is_over = update.is_last or update.error is not None
        if is_over:
            self._heard_s.pop(update.stream_id, None)
        if update.stream_id in self._live:
            live = self._live.pop(update.stream_id) if is_over else self._live[update.stream_id]
            live._hear(update)
            return
        recording = self._recordings[update.stream_id]
        recording.text += update.text
        recording.segments += [update.segment] if update.segment is not None else []
        if is_over:
            del self._recordings[update.stream_id]
            segment, segments = recording.item.segment, recording.segments
            told = (update.error, self._languages, segment.segment_id)
            if recording.item.submission.in_parts:
                self._inbox.deliver(recording.item, in_parts(segments, len(segment.pcm), *told))
            else:
                self._inbox.deliver(recording.item, whole(segments, recording.text, *told))
