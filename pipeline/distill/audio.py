"""The audio of an example, by its place in a file, a tar or a Parquet file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.audio import AudioError, decode
from pipeline.distill.examples import ExampleRef
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.sources.fetch import fetch
from pipeline.sources.plan import samples
from pipeline.sources.sample import IN_PARQUET, IN_TAR
from pipeline.storage import StorageError
from pipeline.units import Split

_TOLERANCE_S = 0.25  # between a manifest's duration and what a decoder gives


@dataclass(frozen=True, slots=True)
class Example:
    """`pcm` is int16 `[num_samples]`, 16 kHz mono."""

    ref: ExampleRef
    pcm: np.ndarray


class Loader:
    """Reads examples in any order. It keeps where the members of the tars lie that it has met, the last remote file and
    the last row group of Parquet; it can be sent to another process."""

    def __init__(self, options: storage.Options) -> None:
        self._options = options
        self._tars: dict[str, _Tar] = {}
        self._file: tuple[str, bytes] = ("", b"")
        self._group: tuple[str, int, pa.ChunkedArray] | None = None

    def load(self, ref: ExampleRef) -> Example:
        """Raises StorageError that names the example when its audio is gone, or not what it was."""
        try:
            with self._opened(ref) as file:
                pcm = _decoded(file, ref)
        except AudioError as error:
            raise StorageError(f"{ref.example_id}: {ref.audio} cannot be decoded ({error})") from error
        except StorageError as error:
            raise StorageError(f"{ref.example_id}: {error}") from error
        found_s = len(pcm) / SAMPLE_RATE_HZ
        if abs(found_s - ref.duration_s) > _TOLERANCE_S:
            raise StorageError(
                f"{ref.example_id}: {ref.audio} has {found_s:.2f} s of audio from {ref.offset_s:g} s on where "
                f"{ref.duration_s:.2f} s are labelled: it has changed"
            )
        return Example(ref, pcm)

    @contextmanager
    def _opened(self, ref: ExampleRef) -> Iterator[BinaryIO]:
        """The bytes of the recording as a local seekable file."""
        local = storage.is_local(ref.audio)
        if local and Path(ref.audio).is_file():
            with storage.open_read(ref.audio, self._options) as file:
                yield file
        elif in_tar := IN_TAR.match(ref.audio):
            start, num_bytes = self._member(in_tar[1], ref)
            with storage.open_read(in_tar[1], self._options) as file:
                window = _Window(file, start, num_bytes)
                # decoders take a remote file that fails for one that ends
                yield cast(BinaryIO, window) if storage.is_local(in_tar[1]) else storage.spool(cast(BinaryIO, window))
        elif in_parquet := IN_PARQUET.fullmatch(ref.audio):
            with self._cell(in_parquet[1], ref) as file:
                yield file
        elif local:
            with storage.open_read(ref.audio, self._options) as file:
                yield file
        else:
            if self._file[0] != ref.audio:
                with fetch(ref.audio, self._options) as file:
                    self._file = ref.audio, file.read()
            yield io.BytesIO(self._file[1])

    def _member(self, url: str, ref: ExampleRef) -> tuple[int, int]:
        """First byte and number of bytes of a tar's member."""
        if url not in self._tars:
            self._tars[url] = _read_tar(url, self._options)
        tar = self._tars[url]
        if ref.split_id and ref.split_id != tar.split_id:
            raise StorageError(f"{url} has changed since it was transcribed")
        recording_id = ref.recording_id if ref.channel is None else ref.recording_id.removesuffix(f"#ch{ref.channel}")
        if recording_id not in tar.places:
            raise StorageError(f"{url} has no {recording_id.removeprefix(f'{url}/')} any more")
        place = tar.places[recording_id]
        if place is None:
            raise StorageError(
                f"{url} is compressed or sparse, and examples are read in no order: unpack it, or write it as plain tar"
            )
        return place

    @contextmanager
    def _cell(self, url: str, ref: ExampleRef) -> Iterator[BinaryIO]:
        """The audio of a row of Parquet: its bytes, or the file that it names."""
        row = int(ref.audio[len(url) + 1 :].partition("/")[0].partition("#")[0])
        content, path = self._row(url, row, ref.audio_columns)
        if content is not None:
            yield io.BytesIO(content)
        elif path is not None:
            with fetch(storage.join(storage.folder_of(url), path), self._options) as file:
                yield file
        else:
            raise StorageError(f"{url}: row {row} has no audio any more")

    def _row(self, url: str, row: int, columns: tuple[str, ...]) -> tuple[bytes | None, str | None]:
        if self._group is None or self._group[0] != url or not 0 <= row - self._group[1] < len(self._group[2]):
            self._group = self._row_group(url, row, columns)
        value = self._group[2][row - self._group[1]].as_py()
        if isinstance(value, dict):
            return value.get("bytes"), value.get("path")
        return (None, value) if isinstance(value, str) else (value, None)

    def _row_group(self, url: str, row: int, columns: tuple[str, ...]) -> tuple[str, int, pa.ChunkedArray]:
        with storage.open_read(url, self._options) as opened:
            try:
                file = pq.ParquetFile(opened)
                column = next((name for name in columns if name in file.schema_arrow.names), None)
                first = 0
                for group in range(file.metadata.num_row_groups if column else 0):
                    num_rows = file.metadata.row_group(group).num_rows
                    if row < first + num_rows:
                        return url, first, file.read_row_group(group, [column], use_threads=False)[column]
                    first += num_rows
            except pa.ArrowException as error:
                raise StorageError(f"{url} is no readable Parquet file: {error}") from error
        raise StorageError(f"{url} has no row {row} with a column {' or '.join(columns)} any more")


@dataclass(frozen=True, slots=True)
class _Tar:
    split_id: str
    places: dict[str, tuple[int, int] | None]


def _read_tar(url: str, options: storage.Options) -> _Tar:
    with storage.open_read(url, options) as file:
        num_bytes = file.seek(0, io.SEEK_END)
    split = Split("webdataset", [[url, num_bytes]], num_bytes, 0.0, 0)
    return _Tar(split.split_id, {sample.recording_id: sample.place for sample in samples(split, options)})


def _decoded(file: BinaryIO, ref: ExampleRef) -> np.ndarray:
    channels = "mix" if ref.channel is None else "split"
    blocks = list(decode(file, channels, ref.offset_s, ref.duration_s))  # type: ignore[arg-type]
    channel = ref.channel or 0
    if channel >= blocks[0].shape[1]:
        raise StorageError(f"{ref.audio} has no channel {channel} any more")
    pcm: np.ndarray = np.concatenate([block[:, channel] for block in blocks])
    return pcm


class _Window(io.RawIOBase):
    """Bytes `[start, start + num_bytes)` of a file that can seek, as a file."""

    def __init__(self, file: BinaryIO, start: int, num_bytes: int) -> None:
        self._file, self._start, self._num_bytes = file, start, num_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._num_bytes - self._at)
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._start + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
