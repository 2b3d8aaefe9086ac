"""The read step: from a split to units of decoded audio, in constant memory.

Which recordings form a group follows from the split's own order and byte sizes alone; only a group with something left
to commit is opened. A group that decodes to more than twice the target goes out in parts, and a recording that crosses
the limit is cut at its longest pause before it and goes on in the next part.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline import retry, segmentation, vad
from pipeline.attempts import CRASHED, MAX_ATTEMPTS, Attempts, Ledger, Watchdog, end_process, watchdog
from pipeline.audio import AudioError, Channels, decode
from pipeline.config import TranscribeConfig
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.sources.plan import samples
from pipeline.sources.sample import Filler, Sample
from pipeline.storage import FileUnavailableError
from pipeline.units import Done, End, Recording, Split, Unit, UnitKey

_CUT_WITHIN_S = 60.0
_CUT_WITHIN_SHARE = 0.2
_SAMPLE_BYTES = 2


def read_units(
    split: Split,
    done: Done,
    config: TranscribeConfig,
    attempts: Attempts | None = None,
    num_groups: int | None = None,
) -> Iterator[Unit]:
    """Yields the units of `split` that are not in `done`, in order; a split without samples is one empty unit.

    `num_groups` reads no more than its first groups. A recording that cannot be read travels as one with `error`. What
    may be better on another day (a store that refuses or fails, a split that has changed) raises. `attempts` are the
    run's, to find what ends the process.
    """
    before = retry.num_retries()
    for unit in _units(split, done, config, attempts or Ledger(), num_groups):
        unit.num_retries, before = retry.num_retries() - before, retry.num_retries()
        yield unit


def _units(
    split: Split, done: Done, config: TranscribeConfig, attempts: Attempts, num_groups: int | None
) -> Iterator[Unit]:
    filler = Filler(config.units.target_s)
    guard = _Guard(attempts, attempts.begin(split.split_id) > 0, watchdog(config.ray.read_stall_timeout_s))
    group = _Group(split.split_id, 0, done, config, guard)
    for sample in samples(split, config.storage.access):
        number = filler.run_of(sample.estimated_s)
        if number != group.number:
            yield from group.flush("g")
            if number == num_groups:
                attempts.end(split.split_id)
                return
            group = _Group(split.split_id, number, done, config, guard)
        yield from group.add(sample)
    yield from group.flush("z")
    attempts.end(split.split_id)


class _Guard:
    """Between a decoder and the process it may end: announces recordings where an earlier attempt died, and ends the
    process over one that hangs."""

    def __init__(self, attempts: Attempts, one_by_one: bool, watchdog: Watchdog) -> None:
        self._attempts, self._one_by_one, self._watchdog = attempts, one_by_one, watchdog

    def admits(self, recording_id: str) -> bool:
        return not self._one_by_one or self._attempts.begin(recording_id) < MAX_ATTEMPTS

    def decode(self, sample: Sample, channels: Channels) -> Iterator[np.ndarray]:
        assert sample.open is not None
        with sample.open() as file:
            blocks = decode(file, channels, sample.offset_s, sample.duration_s)
            while True:
                try:
                    with self._watchdog.watch(sample.recording_id):
                        block = next(blocks, None)
                except MemoryError:  # of this recording's doing or not: a process of its own will show
                    end_process(f"no memory left to decode {sample.recording_id}")
                if block is None:
                    break
                yield block

    def ended(self, recording_id: str) -> None:
        if self._one_by_one:
            self._attempts.end(recording_id)


class _Group:
    """One group on its way into parts: the part being filled, and which parts are wanted."""

    def __init__(self, split_id: str, number: int, done: Done, config: TranscribeConfig, guard: _Guard) -> None:
        self.number = number
        self._guard = guard
        self._split_id, self._config = split_id, config
        self._done = done.parts(number)
        self._limit = max(int(2 * config.units.target_s * SAMPLE_RATE_HZ), 1)
        self._part = 0
        self._recordings: list[Recording] = []
        self._num_samples = 0

    @property
    def _pending(self) -> bool:
        """False when all parts from the current one on are committed."""
        return not self._done.all_from(self._part)

    def add(self, sample: Sample) -> Iterator[Unit]:
        """Decodes a sample into the part being filled, and yields the parts that it overfills."""
        if not self._pending:
            return
        current = _Decoding(sample, self._config.audio.channels)
        error = sample.error
        if sample.open is not None and error is None:
            if not self._guard.admits(sample.recording_id):
                while self._part in self._done.ends:  # a part that is committed does not have this row
                    yield from self.flush("p")
                self._collect(current, 0, f"crashed_process: {CRASHED}")
                return
            try:
                for block in self._guard.decode(sample, self._config.audio.channels):
                    current.append(block)
                    while current.num_frames > self._room(current):
                        yield from self._overflow(current)
                    if not self._pending:
                        break
            except AudioError as failure:
                error = str(failure)
            except FileUnavailableError as failure:
                error = f"{failure.code}: {failure}"
            self._guard.ended(sample.recording_id)
        if self._pending:
            self._collect(current, current.num_frames, error)

    def flush(self, end: End) -> Iterator[Unit]:
        """Yields the part being filled, unless it is committed, and starts the next."""
        unit = Unit(UnitKey(self._split_id, self.number, self._part, end), self._recordings)
        wanted = self._pending and self._part not in self._done.ends
        self._part, self._recordings, self._num_samples = self._part + 1, [], 0
        if wanted:
            yield unit

    def _room(self, current: _Decoding) -> int:
        """Frames of the current recording that the part still has room for."""
        return (self._limit - self._num_samples) // max(current.num_channels, 1)

    def _overflow(self, current: _Decoding) -> Iterator[Unit]:
        room = self._room(current)
        stretch_s = min(_CUT_WITHIN_S, _CUT_WITHIN_SHARE * 2 * self._config.units.target_s / current.num_channels)
        stretch = max(int(stretch_s * SAMPLE_RATE_HZ), 1)
        if room > stretch or not self._recordings:
            cut = self._pause(current, max(room - stretch, 0), max(room, 1))
            self._collect(current, cut, None, goes_on=True)
        # else the end of the recording before is the better place, and this one starts the next part
        yield from self.flush("p")

    def _pause(self, current: _Decoding, lo: int, hi: int) -> int:
        options = self._config.segmentation
        spans = vad.speech_spans(current.mixed(lo, hi), options.vad_threshold, options.min_silence_ms)
        return segmentation.cut_at_pause([(lo + start, lo + end) for start, end in spans], lo, hi)

    def _collect(self, current: _Decoding, num_frames: int, error: str | None, goes_on: bool = False) -> None:
        pieces = current.take(num_frames, error)
        for piece in pieces:
            piece.goes_on = goes_on
        self._recordings.extend(pieces)
        self._num_samples += sum(len(piece.pcm) for piece in pieces)


class _Decoding:
    """A recording being decoded: what of it no part has taken yet, one growing buffer a channel.

    bytearrays, because they grow in place: a list of blocks to join would hold a long recording twice.
    """

    def __init__(self, sample: Sample, channels: Channels) -> None:
        self._sample, self._channels = sample, channels
        self._buffers: list[bytearray] = []
        self._num_taken = 0

    @property
    def num_channels(self) -> int:
        return len(self._buffers)

    @property
    def num_frames(self) -> int:
        return len(self._buffers[0]) // _SAMPLE_BYTES if self._buffers else 0

    def append(self, block: np.ndarray) -> None:
        """`block` is int16 `[num_frames, num_channels]`."""
        self._buffers = self._buffers or [bytearray() for _ in range(block.shape[1])]
        for buffer, channel in zip(self._buffers, block.T, strict=True):
            buffer += channel.tobytes()

    def mixed(self, lo: int, hi: int) -> np.ndarray:
        """A copy of frames `[lo, hi)`, int16 `[hi - lo]`, the mean of the channels."""
        channels = [np.frombuffer(buffer, np.int16, hi - lo, lo * _SAMPLE_BYTES) for buffer in self._buffers]
        mean: np.ndarray = np.mean(channels, axis=0).astype(np.int16)
        return mean

    def take(self, num_frames: int, error: str | None) -> list[Recording]:
        """The first `num_frames` as recordings, one a channel; the rest stays."""
        if not self._buffers:
            return [self._recording(np.empty(0, np.int16), None, error)]
        recordings = []
        for channel, buffer in enumerate(self._buffers):
            self._buffers[channel] = buffer[num_frames * _SAMPLE_BYTES :]
            del buffer[num_frames * _SAMPLE_BYTES :]
            recordings.append(self._recording(np.frombuffer(buffer, np.int16), channel, error))
        self._num_taken += num_frames
        return recordings

    def _recording(self, pcm: np.ndarray, channel: int | None, error: str | None) -> Recording:
        sample = self._sample
        if self._channels == "mix":
            channel = None
        return Recording(
            recording_id=sample.recording_id if channel is None else f"{sample.recording_id}#ch{channel}",
            audio_filepath=sample.audio_filepath,
            pcm=pcm,
            channel=channel,
            offset_s=sample.offset_s + self._num_taken / SAMPLE_RATE_HZ,
            language=sample.language,
            text_ref=sample.text_ref,
            error=error,
            continues=self._num_taken > 0,
        )
