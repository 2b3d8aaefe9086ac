"""Audio that is still coming: what of it is there now, as 16 kHz int16.

A growing file can be read again from any sample, so that a stream goes on after an interruption; what comes through a
FIFO comes once, and is kept on disk until the engine needs it no more.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from pipeline import storage
from pipeline.audio import AudioError, Resampler, decode
from pipeline.follow.wav import Layout, is_behind_audio, read_head
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.sources.fetch import fetch

_HEAD_BYTES = 1 << 16
_MOST_BYTES = 1 << 20  # read at once
_WAV = (".wav", ".wave")
RAW = (".pcm", ".raw", ".s16")


class Source(Protocol):
    """`is_over` once nothing more will come, after the last `read`."""

    is_over: bool

    def read(self, most: int) -> np.ndarray:
        """What has come, at most so many samples: int16 [n]. Raises AudioError, FileUnavailableError."""
        ...

    def forget(self, sample: int) -> None:
        """What lies before `sample` of the stream will not be read again, by a later process neither."""
        ...

    def close(self, is_done: bool = False) -> None:
        """`is_done`: no later process will go on with it."""
        ...


class Mono:
    """Bytes of a `layout`, as they come, to 16 kHz int16 mono."""

    def __init__(self, layout: Layout) -> None:
        self._layout, self._rest = layout, b""
        self._resampler = Resampler.following(Resampler(0, 0), layout.rate_hz, 1)

    def feed(self, data: bytes, is_last: bool = False) -> list[np.ndarray]:
        """int16 [n, 1] each."""
        data = self._rest + data
        whole = len(data) // self._layout.frame_bytes * self._layout.frame_bytes
        self._rest = data[whole:]
        found = []
        if whole:
            block = self._layout.decode(data[:whole]).mean(axis=1, keepdims=True, dtype=np.float32)
            found += self._resampler.feed(np.nan_to_num(block))
        return [*found, *(self._resampler.flush() if is_last else ())]


class _Queue:
    """Decoded samples that nobody has read yet."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self.num_samples = 0

    def put(self, block: np.ndarray) -> None:
        self._blocks.append(block.reshape(-1))
        self.num_samples += block.size

    def take(self, most: int) -> np.ndarray:
        samples = np.concatenate([np.empty(0, np.int16), *self._blocks])
        self._blocks = [samples[most:]] if len(samples) > most else []
        self.num_samples = max(0, len(samples) - most)
        return samples[:most]


class GrowingFile:
    """A WAV, or samples without a header, that someone writes to. It is over when it has not grown for `ended_after_s`
    (None: never)."""

    def __init__(
        self,
        path: Path,
        first_sample: int,
        plain: Layout,
        ended_after_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`first_sample` of 16 kHz to begin at, `plain` how samples lie that have no header."""
        self._path, self._first_sample, self._ended_after_s, self._clock = path, first_sample, ended_after_s, clock
        self._is_wav = path.suffix.lower() in _WAV
        self._layout = None if self._is_wav else plain
        self._file: BinaryIO | None = None
        self._mono: Mono | None = None
        self._at = self._size = 0  # bytes of samples that were read, and of the file
        self._queue = _Queue()
        self._grown_at = clock()
        self._is_whole = self.is_over = False

    def read(self, most: int) -> np.ndarray:
        if self._queue.num_samples < most and not self._is_whole:
            self._more(most)
        found = self._queue.take(most)
        self.is_over = self._is_whole and not self._queue.num_samples
        return found

    def forget(self, sample: int) -> None:
        """It can be read again."""

    def close(self, is_done: bool = False) -> None:
        if self._file is not None:
            self._file.close()

    def _more(self, most: int) -> None:
        with storage.explained(str(self._path)):
            self._file = self._file or self._path.open("rb")
            head = os.pread(self._file.fileno(), _HEAD_BYTES if self._is_wav else 0, 0)
            size = os.fstat(self._file.fileno()).st_size
        if size > self._size:
            self._size, self._grown_at = size, self._clock()
        idle = self._ended_after_s is not None and self._clock() - self._grown_at >= self._ended_after_s
        layout = read_head(head) if self._is_wav else self._layout
        if layout is None:
            if idle:
                raise AudioError("empty_file" if not head else "truncated", "it ended before its samples began")
            return
        if self._mono is None:
            self._mono = Mono(layout)
            skipped = round(self._first_sample * layout.rate_hz / SAMPLE_RATE_HZ)
            self._at = skipped * layout.frame_bytes
        end = size - layout.head
        if layout.declared is not None and end > layout.declared:
            behind = os.pread(self._file.fileno(), 4, layout.head + layout.declared)
            end = layout.declared if is_behind_audio(behind) else end
        data = b""
        if end > self._at:
            wanted = min(end - self._at, _MOST_BYTES, max(most, 1) * layout.frame_bytes)
            data = os.pread(self._file.fileno(), wanted, layout.head + self._at)
            self._at += len(data)
        self._is_whole = not data and idle
        for block in self._mono.feed(data, self._is_whole):
            self._queue.put(block)


class WholeFile:
    """A file that is whole when it is named, in any format, at any URL."""

    def __init__(self, url: str, first_sample: int, options: storage.Options) -> None:
        self._url, self._start_s, self._options = url, first_sample / SAMPLE_RATE_HZ, options
        self._file: BinaryIO | None = None
        self._blocks: Iterator[np.ndarray] | None = None
        self._queue = _Queue()
        self._is_whole = self.is_over = False

    def read(self, most: int) -> np.ndarray:
        if self._blocks is None:
            self._file = fetch(self._url, self._options)
            self._blocks = decode(self._file, "mix", self._start_s)
        while self._queue.num_samples < most and not self._is_whole:
            block = next(self._blocks, None)
            if block is None:
                self._is_whole = True
            else:
                self._queue.put(block)
        found = self._queue.take(most)
        self.is_over = self._is_whole and not self._queue.num_samples
        return found

    def forget(self, sample: int) -> None:
        """It can be read again."""

    def close(self, is_done: bool = False) -> None:
        if self._file is not None:
            self._file.close()


class Fifo:
    """What a process writes into a named pipe: a WAV, or samples without a header. It is over when the last writer has
    closed it; before the first one has come it waits. Its samples are kept in the file `spool` until they are
    forgotten; those that a former process has left there come first."""

    def __init__(self, path: Path, first_sample: int, plain: Layout, spool: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._plain = plain
        self._begin = b""
        self._mono: Mono | None = None
        self._spool = Spool(spool)
        self._queue = _Queue()
        self._queue.put(self._spool.since(first_sample))
        self._is_whole = self.is_over = False

    def read(self, most: int) -> np.ndarray:
        if self._queue.num_samples < most and not self._is_whole:
            for block in self._more():
                self._spool.append(block.reshape(-1))
                self._queue.put(block)
        found = self._queue.take(most)
        self.is_over = self._is_whole and not self._queue.num_samples
        return found

    def forget(self, sample: int) -> None:
        self._spool.forget(sample)

    def close(self, is_done: bool = False) -> None:
        os.close(self._fd)
        self._spool.close(is_done)

    def _more(self) -> list[np.ndarray]:
        try:
            data = os.read(self._fd, _MOST_BYTES)
        except BlockingIOError:
            return []
        # without a writer yet there is nothing to read either
        self._is_whole = not data and (self._mono is not None or bool(self._begin))
        if self._mono is None:
            self._begin += data
            data = self._behind_head()
        return self._mono.feed(data, self._is_whole) if self._mono is not None else []

    def _behind_head(self) -> bytes:
        """The samples behind the head, once that is whole."""
        begin = self._begin
        if len(begin) < 4 and not self._is_whole:
            return b""
        layout = read_head(begin) if begin[:4] in (b"RIFF", b"RF64") else self._plain
        if layout is None:
            if self._is_whole:
                raise AudioError("truncated", "it ended before its samples began")
            return b""
        self._mono = Mono(layout)
        return begin[layout.head :]


class Spool:
    """Samples of a stream that cannot be had again, from `first` on, on disk: they survive this process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.first = 0
        self._samples = np.empty(0, np.int16)
        if path.exists():
            data = path.read_bytes()
            self.first = int.from_bytes(data[:8], "little")
            self._samples = np.frombuffer(data[8 : len(data) - len(data) % 2], np.int16)
        self._file = self._rewritten()

    def append(self, pcm: np.ndarray) -> None:
        self._samples = np.concatenate([self._samples, pcm])
        self._file.write(pcm.tobytes())
        self._file.flush()

    def since(self, sample: int) -> np.ndarray:
        return self._samples[max(0, sample - self.first) :]

    def forget(self, sample: int) -> None:
        """What lies before `sample` is not needed any more."""
        if sample > self.first:
            self._samples, self.first = self._samples[sample - self.first :], sample
            self._file.close()
            self._file = self._rewritten()

    def close(self, done: bool = False) -> None:
        self._file.close()
        if done:
            self._path.unlink(missing_ok=True)

    def _rewritten(self) -> BinaryIO:
        partial = self._path.with_suffix(".part")
        partial.write_bytes(self.first.to_bytes(8, "little") + self._samples.tobytes())
        partial.replace(self._path)
        return self._path.open("ab")


def is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(Path(path).stat().st_mode)
    except OSError:
        return False


def is_growing(url: str) -> bool:
    """Whether a file can be read while it is written to; others are read when they are whole."""
    return storage.is_local(url) and url.lower().endswith((*_WAV, *RAW))
