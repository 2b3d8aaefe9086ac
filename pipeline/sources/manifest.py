"""NeMo manifests: JSON lines with `audio_filepath` and, where there are, `offset`, `duration`, `text`, `lang`."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO, cast

from pipeline import redact, storage
from pipeline.config import ConfigError
from pipeline.listing import FileInfo
from pipeline.redact import printable
from pipeline.sources.fetch import fetch
from pipeline.sources.parquet import UNKNOWN_S
from pipeline.sources.sample import Filler, Sample, UniqueIds, sentences_of, text_or_none
from pipeline.units import Split

_MAX_LINES = 5_000
_MAX_LINE_BYTES = 1 << 20
_MAX_S = 1e9  # 31 years: what is more is no time


@dataclass(frozen=True, slots=True)
class _Line:
    number: int  # from 1
    start: int  # byte in the unzipped file
    text: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class Entry:
    """A line; its `audio_filepath` may be relative to the manifest's folder."""

    audio_filepath: str
    offset_s: float
    duration_s: float | None
    text: str | None
    language: str | None
    sentences: list[dict[str, Any]]


def plan(infos: Iterable[FileInfo], options: storage.Options, target_s: float, input_index: int) -> Iterator[Split]:
    """Items are `[[manifest url, first line, first byte, num_bytes, digest of those bytes]]`."""
    for info in infos:
        filler = Filler(target_s, _MAX_LINES)
        with _readable(info.url), storage.open_read(info.url, options) as file:
            placed = ((filler.run_of(seconds), seconds, line) for seconds, line in _timed(_lines(_unzipped(file))))
            for _, members in groupby(placed, key=lambda item: item[0]):
                first, total_s, num_bytes, digest = None, 0.0, 0, hashlib.blake2b(digest_size=8)
                for _, seconds, line in members:  # never held together: a hostile run is gigabytes of lines
                    first = first or line
                    total_s, num_bytes = total_s + seconds, line.end - first.start
                    digest.update(line.text)
                assert first is not None
                item = [info.url, first.number, first.start, num_bytes, digest.hexdigest()]
                yield Split("manifest", [item], num_bytes, total_s, input_index)


def samples(split: Split, options: storage.Options) -> Iterator[Sample]:
    """A sample for each line; a line that is no manifest entry is one with the error `bad_manifest_line`."""
    url, number, start, num_bytes, digest = split.items[0]
    with _readable(url), storage.open_read(url, options) as file:
        unzipped = _unzipped(file)
        unzipped.seek(start)
        if _digest(_lines(unzipped, number, start, start + num_bytes)) != digest:
            raise storage.StorageError(
                f"{url}: lines from {number} on have changed since the job was planned; start it again"
            )
        unzipped.seek(start)
        yield from _samples(url, _lines(unzipped, number, start, start + num_bytes), options)


def entries(url: str, options: storage.Options) -> Iterator[tuple[int, Entry]]:
    """Every line's number, from 1, and its entry. Raises ConfigError for a line that is none."""
    with _readable(url), storage.open_read(url, options) as file:
        for line in _lines(_unzipped(file)):
            try:
                yield line.number, _parse(line.text)
            except ValueError as error:
                raise ConfigError(f"{url}:{line.number} {error}") from error


def _samples(url: str, lines: Iterable[_Line], options: storage.Options) -> Iterator[Sample]:
    ids = UniqueIds()
    files = _LastFile(options)
    shown = redact.names(url)
    for line in lines:
        try:
            entry = _parse(line.text)
        except ValueError as error:
            name = f"{shown}#{line.number}"
            yield Sample(ids.claim(name), name, UNKNOWN_S, error=f"bad_manifest_line: {shown}:{line.number} {error}")
            continue
        audio = storage.join(storage.folder_of(url), entry.audio_filepath)
        name = redact.names(audio)
        yield Sample(
            recording_id=ids.claim(name + _stretch(entry)),
            audio_filepath=name,
            estimated_s=UNKNOWN_S if entry.duration_s is None else entry.duration_s,
            open=files.opener(audio),
            text_ref=entry.text,
            language=entry.language,
            offset_s=entry.offset_s,
            duration_s=entry.duration_s,
            sentences=entry.sentences,
        )


def _lines(file: BinaryIO, number: int = 1, start: int = 0, end: float = math.inf) -> Iterator[_Line]:
    """The lines that are not blank, from the file's position `start` (line `number`) up to byte `end`."""
    while start < end and (text := file.readline(_MAX_LINE_BYTES)):
        if text.strip():
            yield _Line(number, start, text)
        number, start = number + 1, start + len(text)


def _timed(lines: Iterable[_Line]) -> Iterator[tuple[float, _Line]]:
    for line in lines:
        try:
            seconds = _parse(line.text).duration_s
        except ValueError:
            seconds = None
        yield UNKNOWN_S if seconds is None else seconds, line


def _parse(text: bytes) -> Entry:
    """Raises ValueError with what is wrong with the line."""
    try:
        fields = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"is a JSON {type(fields).__name__}, where an object is right")
    path = fields.get("audio_filepath")
    if not isinstance(path, str) or not path:
        raise ValueError(f"has no audio_filepath; its keys are {', '.join(map(str, fields)) or 'none'}")
    if "\0" in path or printable(path) != path:
        raise ValueError("has an audio_filepath with characters that no name has")
    language = text_or_none(fields.get("language")) or text_or_none(fields.get("lang"))
    return Entry(
        path,
        _seconds(fields, "offset") or 0.0,
        _seconds(fields, "duration"),
        text_or_none(fields.get("text")),
        language,
        sentences_of(fields),
    )


def _seconds(fields: dict[str, Any], key: str) -> float | None:
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_S:
        raise ValueError(f"has {key} {value!r}, where seconds from 0 on are right")
    return float(value)


def _stretch(entry: Entry) -> str:
    if not entry.offset_s and entry.duration_s is None:
        return ""
    end = "" if entry.duration_s is None else _plain(entry.offset_s + entry.duration_s)
    return f"#t={_plain(entry.offset_s)}-{end}"


def _plain(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


def _unzipped(file: BinaryIO) -> BinaryIO:
    magic = file.read(2)
    file.seek(0)
    if magic == b"\x1f\x8b":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    return io.BufferedReader(cast(io.RawIOBase, file))  # fsspec's files cannot bound the length of a line


@contextmanager
def _readable(url: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{url}: its gzip is damaged ({error}); write the manifest anew") from error


def _digest(lines: Iterable[_Line]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for line in lines:
        digest.update(line.text)
    return digest.hexdigest()


class _LastFile:
    """Opens audio, and keeps the last remote file: manifests name one file for many stretches in a row."""

    def __init__(self, options: storage.Options) -> None:
        self._options = options
        self._url: str | None = None
        self._file: BinaryIO | None = None

    def opener(self, url: str) -> Callable[[], AbstractContextManager[BinaryIO]]:
        return lambda: self._open(url)

    def _open(self, url: str) -> AbstractContextManager[BinaryIO]:
        if storage.is_local(url):
            return fetch(url, self._options)
        if self._file is None or url != self._url:
            self._file = fetch(url, self._options)
            self._url = url
        self._file.seek(0)
        return nullcontext(self._file)
