"""Hears endless inputs and writes their segments as they end, each once, whatever interrupts it.

    inputs -> sources -> live streams of one CausalEngine -> segments -> state file -> Parquet object -> state file

A segment is in its stream's state file before it counts as heard, and in an object before it leaves that file. One
thread reads, writes and keeps the books; the engine has its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event

import numpy as np

from pipeline import listing, redact, storage, vad
from pipeline.audio import AudioError
from pipeline.commit import commit_unit
from pipeline.engine.base import EngineError
from pipeline.engine.causal.engine import CausalEngine, LiveStream
from pipeline.engine.causal.state import ClosedSegment, StreamError, Update
from pipeline.follow.config import FollowConfig, FollowInput
from pipeline.follow.sources import RAW, Fifo, GrowingFile, Source, WholeFile, is_fifo, is_growing
from pipeline.follow.state import StreamState, begun, restored
from pipeline.follow.wav import raw
from pipeline.label import label_unit
from pipeline.output import Output, PlannedSplit, RunPlan
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis
from pipeline.segmentation import speech_samples
from pipeline.sources.sample import AUDIO_SUFFIXES, is_hidden, suffix_of
from pipeline.storage_errors import FileUnavailableError
from pipeline.units import Done, TranscribedSegment, TranscribedUnit

_READ_SAMPLES = 10 * SAMPLE_RATE_HZ  # of one stream at a time, so that others come to their turn
_LEAST_SAMPLES = SAMPLE_RATE_HZ // 2
_PLAN_UNIT_S = 300.0  # what an object about holds


@dataclass(slots=True, eq=False)
class _Followed:
    """A stream and what feeds it. `held` are samples from `first` on that the engine has been given and no row has
    yet; `came` when samples up to a number were there; `late` how late the text came that was heard up to a second;
    `error` why no more of it can be read."""

    state: StreamState
    source: Source
    live: LiveStream
    first: int
    num_read: int
    held: list[np.ndarray] = field(default_factory=list)
    came: deque[tuple[int, float]] = field(default_factory=deque)
    late: dict[float, float] = field(default_factory=dict)
    is_ended: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """What an input gives, and what is committed of it."""

    url: str
    number: int
    given: FollowInput
    done: Done

    @property
    def is_fifo(self) -> bool:
        return self.given.kind == "fifo" or is_fifo(self.url)

    @property
    def is_growing(self) -> bool:
        return self.given.kind == "file" or is_growing(self.url)


@dataclass(slots=True)
class Counts:
    """What this process did: streams `open` now and `waiting` for room, seconds of audio heard, rows by their kind."""

    open: int = 0
    waiting: int = 0
    done: int = 0
    heard_s: float = 0.0
    segments: int = 0
    failed: int = 0


class Follower:
    """`tell(segment)` hears of every segment as it ends; `stop` ends `run` soon, without last words."""

    def __init__(
        self,
        config: FollowConfig,
        engine: CausalEngine,
        output: Output,
        run_id: str,
        tell: Callable[[TranscribedSegment], None],
    ) -> None:
        self._config, self._job, self._engine, self._output = config, config.job, engine, output
        self._run_id, self._tell = run_id, tell
        self._access = config.storage.access
        self.folder = config.state_folder
        self._followed: dict[str, _Followed] = {}
        self._waiting: deque[_Found] = deque()
        self._known: set[str] = set()
        self._plans = {split_id: PlannedSplit(split_id, 0.0) for split_id in output.committed()}
        self._num_planned = 0
        self._started_at = time.time()
        self._updates: SimpleQueue[tuple[Update, float]] = SimpleQueue()
        self.counts = Counts()

    def run(self, stop: Event, until_idle: bool = False, progress: Callable[[Counts], None] = lambda _: None) -> None:
        """Until `stop`, or with `until_idle` until all that is there has been heard to its end."""
        listed_at = -float("inf")
        try:
            while not stop.is_set():
                if time.monotonic() - listed_at >= self._config.list_every_s:
                    listed_at = time.monotonic()
                    self._find()
                self._open_waiting()
                has_read = any([self._feed(each) for each in list(self._followed.values())])
                self._hear(0.0 if has_read else self._config.poll_s)
                self._write_plan()
                self.counts.open, self.counts.waiting = len(self._followed), len(self._waiting)
                progress(self.counts)
                if until_idle and not self._followed and not self._waiting:
                    return
        finally:
            for each in self._followed.values():
                each.live.drop()
                each.source.close()

    # inputs

    def _find(self) -> None:
        """Inputs that are new, or whose stream may come again."""
        new = [(url, given) for given in self._config.inputs for url in self._urls(given) if url not in self._known]
        committed = self._output.committed() if new else {}
        for url, given in new:
            self._known.add(url)
            number = begun(url, committed, is_again=given.kind == "fifo" or is_fifo(url))
            if number is not None:
                done = committed.get(StreamState(url, number).split_id, Done())
                self._waiting.append(_Found(url, number, given, done))

    def _urls(self, source: FollowInput) -> Iterator[str]:
        url = storage.resolve(source.path)
        is_one = source.kind in ("file", "fifo") or (
            source.kind == "auto" and not listing.has_glob(source.path) and (is_fifo(url) or Path(url).is_file())
        )
        if is_one:
            if Path(url).exists():
                yield url
            return
        for info in listing.iter_files(source.path, self._access):
            suffix = suffix_of(info.name)
            if not is_hidden(info.name) and (suffix in AUDIO_SUFFIXES or f".{suffix}" in RAW or is_fifo(info.url)):
                yield info.url

    def _open_waiting(self) -> None:
        for _ in range(len(self._waiting)):
            found = self._waiting.popleft()
            if not found.is_fifo and not found.is_growing and not self._is_whole(found.url):
                self._waiting.append(found)
                continue
            try:
                self._open(found)
            except StreamError as error:
                if error.code != "too_many_streams":
                    raise EngineError(str(error)) from error
                self._waiting.appendleft(found)
                return

    def _is_whole(self, url: str) -> bool:
        """Of a file in a format that has to be; objects always are."""
        if not storage.is_local(url) or self._config.ended_after_s is None:
            return True
        try:
            return time.time() - Path(url).stat().st_mtime >= self._config.ended_after_s
        except OSError:
            return True  # and what is wrong with it shows when it is read

    def _open(self, found: _Found) -> None:
        state = restored(found.url, found.number, self.folder, self._output, found.done)
        self._plans.setdefault(state.split_id, PlannedSplit(state.split_id, 0.0))
        if state.is_over or len(state.rows) >= self._config.segments_per_object:
            self._write(state)
        if state.is_over:  # as a kill between its last row and its last object leaves it
            if found.is_fifo:
                (self.folder / f"{state.split_id}.pcm").unlink(missing_ok=True)
                self._known.discard(found.url)
            return
        live = self._engine.open(state.split_id, self._take, resume=state.resume)
        first, path = state.resume.first_sample, Path(found.url)
        plain = raw(found.given.rate_hz, found.given.channels)
        source: Source
        if found.is_fifo:
            source = Fifo(path, first, plain, self.folder / f"{state.split_id}.pcm")
        elif found.is_growing:
            source = GrowingFile(path, first, plain, self._config.ended_after_s)
        else:
            source = WholeFile(found.url, first, self._access)
        self._followed[state.split_id] = _Followed(state, source, live, first, first)

    # audio

    def _feed(self, followed: _Followed) -> bool:
        """Whether there was something for it."""
        room = 0 if followed.is_ended else min(followed.live.room, _READ_SAMPLES)
        if room < _LEAST_SAMPLES:
            return False
        pcm = np.empty(0, np.int16)
        try:
            pcm = followed.source.read(room)
        except AudioError as error:
            followed.error = str(error)
        except FileUnavailableError as error:
            followed.error = f"{error.code}: {error}"
        if len(pcm):
            followed.num_read += len(pcm)
            followed.came.append((followed.num_read, time.monotonic()))
            followed.held.append(pcm)
        try:
            if len(pcm):
                followed.live.push(pcm)
            if followed.source.is_over or followed.error is not None:
                followed.is_ended = True
                followed.live.end()
        except StreamError as error:
            if error.code != "ended":  # it failed meanwhile, and its last update says why
                raise
        return bool(len(pcm)) or followed.is_ended

    # text

    def _take(self, update: Update) -> None:
        """In the engine's thread."""
        self._updates.put((update, time.monotonic()))

    def _hear(self, wait_s: float) -> None:
        try:
            update, at = self._updates.get(timeout=wait_s) if wait_s else self._updates.get_nowait()
            while True:
                self._update(update, at)
                update, at = self._updates.get_nowait()
        except Empty:
            return

    def _update(self, update: Update, at: float) -> None:
        followed = self._followed.get(update.stream_id)
        if followed is None:
            return
        if update.error is not None and self._engine.broken:
            raise EngineError(f"{self._engine.broken}. What is committed stays; the same command goes on")
        state, heard = followed.state, round(update.heard_s * SAMPLE_RATE_HZ)
        while len(followed.came) > 1 and followed.came[0][0] < heard:
            followed.came.popleft()
        if update.text:
            followed.late[update.heard_s] = max(0.0, at - followed.came[0][1]) if followed.came else 0.0
        if update.segment is not None:
            self._closed(followed, update.segment)
        state.is_over = update.is_last or update.error is not None
        if state.is_over:
            error = str(update.error) if update.error is not None else followed.error
            if error is None and not state.rows and not state.group:
                error = "no_samples: no audio in it"
            if error is not None:
                read_s = followed.num_read / SAMPLE_RATE_HZ if update.error is not None else 0.0
                self._row(followed, _failed(state, error, max(0.0, read_s - state.heard_until_s)))
        elif update.resume is not None:
            state.resume = update.resume
        if update.text or update.segment is not None or state.is_over:
            state.save(self.folder, durable=update.segment is not None or state.is_over)
        if state.is_over or len(state.rows) >= self._config.segments_per_object:
            self._write(state)
        if state.is_over:
            self._over(followed)
        elif update.segment is not None:
            followed.source.forget(state.resume.first_sample)

    def _closed(self, followed: _Followed, segment: ClosedSegment) -> None:
        state = followed.state
        start = round(segment.offset_s * SAMPLE_RATE_HZ)
        num_samples = round(segment.duration_s * SAMPLE_RATE_HZ)
        pcm = self._audio(followed, start, num_samples)
        speech = vad.speech_spans(pcm, self._job.segmentation.vad_threshold, self._job.segmentation.min_silence_ms)
        result = self._engine.result(segment)
        hypothesis = result if isinstance(result, Hypothesis) else None
        if hypothesis is not None:
            late = [followed.late.get(at_s, 0.0) for at_s in segment.published_s]
            published = [a + b for a, b in zip(hypothesis.published_s, late, strict=True)]
            hypothesis = replace(hypothesis, published_s=published)
        followed.late = {}
        first_ms, last_ms = (round(1000 * at_s) for at_s in (segment.offset_s, segment.offset_s + segment.duration_s))
        row = TranscribedSegment(
            f"{redact.names(state.recording_id)}@{first_ms}-{last_ms}",
            redact.names(state.recording_id),
            redact.names(state.url),
            None,
            segment.offset_s,
            segment.duration_s,
            None,
            speech_samples(speech, 0, num_samples) / max(num_samples, 1),
            hypothesis,
            None if isinstance(result, Hypothesis) else result,
            speech,
            is_whole=False,
        )
        self.counts.heard_s += segment.duration_s
        self._row(followed, row)

    def _audio(self, followed: _Followed, start: int, num_samples: int) -> np.ndarray:
        """Of the segment that has ended; what lies before its end is let go."""
        held = np.concatenate([np.empty(0, np.int16), *followed.held])
        end = start + num_samples
        pcm = held[max(0, start - followed.first) : max(0, end - followed.first)]
        followed.held, followed.first = [held[max(0, end - followed.first) :]], end
        return pcm

    def _row(self, followed: _Followed, row: TranscribedSegment) -> None:
        followed.state.rows.append(row)
        self.counts.segments += 1
        self.counts.failed += row.error is not None
        self._tell(row)

    def _write(self, state: StreamState) -> None:
        """One object of the rows that wait."""
        audio_s = sum(row.duration for row in state.rows)
        unit = TranscribedUnit(
            state.key, state.rows, int(state.group == 0), audio_s, audio_s, 0.0, asdict(self._engine.info)
        )
        commit_unit(self._output, unit, label_unit(unit, self._job), self._job, self._run_id)
        state.rows, state.group = [], state.group + 1
        if state.is_over:
            state.forget(self.folder)
        else:
            state.save(self.folder, durable=True)

    def _over(self, followed: _Followed) -> None:
        state = followed.state
        followed.source.close(is_done=True)
        if state.number > 1 or is_fifo(state.url):
            self._known.discard(state.url)  # a FIFO may give another one
        del self._followed[state.split_id]
        self.counts.done += 1

    def _write_plan(self) -> None:
        """The streams so far, for `shardscribe status`."""
        if len(self._plans) != self._num_planned:
            self._num_planned = len(self._plans)
            self._output.write_plan(RunPlan(self._run_id, self._started_at, _PLAN_UNIT_S, list(self._plans.values())))


def _failed(state: StreamState, error: str, duration_s: float) -> TranscribedSegment:
    name = redact.names(state.recording_id)
    return TranscribedSegment(
        f"{name}@failed", name, redact.names(state.url), None, state.heard_until_s, duration_s, None, None, None,
        error, is_whole=False,
    )  # fmt: skip
