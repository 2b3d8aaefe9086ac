"""NeMo manifests: JSON lines with `audio_filepath` and, where there are, `offset`, `duration`, `text`, `lang`."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO, cast

from pipeline import storage
from pipeline.listing import FileInfo
from pipeline.sources.parquet import UNKNOWN_S
from pipeline.sources.sample import Filler, Sample, UniqueIds, text_or_none
from pipeline.units import Split

_MAX_LINES = 5_000
_MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _Line:
    number: int  # from 1
    start: int  # byte in the unzipped file
    text: bytes


@dataclass(frozen=True, slots=True)
class _Entry:
    audio_filepath: str
    offset_s: float
    duration_s: float | None
    text: str | None
    language: str | None


def plan(infos: Iterable[FileInfo], options: storage.Options, target_s: float, input_index: int) -> Iterator[Split]:
    """Items are `[[manifest url, first line, first byte, num_bytes, digest of those bytes]]`."""
    for info in infos:
        filler = Filler(target_s, _MAX_LINES)
        with storage.open_read(info.url, options) as file:
            placed = ((filler.run_of(seconds), seconds, line) for seconds, line in _timed(_lines(_unzipped(file))))
            for _, members in groupby(placed, key=lambda item: item[0]):
                run = list(members)
                lines = [line for _, _, line in run]
                end = lines[-1].start + len(lines[-1].text)
                num_bytes = end - lines[0].start
                item = [info.url, lines[0].number, lines[0].start, num_bytes, _digest(lines)]
                yield Split("manifest", [item], num_bytes, sum(seconds for _, seconds, _ in run), input_index)


def samples(split: Split, options: storage.Options) -> Iterator[Sample]:
    """A sample for each line; a line that is no manifest entry is one with the error `bad_manifest_line`."""
    url, number, start, num_bytes, digest = split.items[0]
    with storage.open_read(url, options) as file:
        unzipped = _unzipped(file)
        unzipped.seek(start)
        lines = list(_lines(unzipped, number, start, start + num_bytes))
    if _digest(lines) != digest:
        raise storage.StorageError(
            f"{url}: lines from {number} on have changed since the job was planned; start it again"
        )
    ids = UniqueIds()
    files = _LastFile(options)
    for line in lines:
        try:
            entry = _parse(line.text)
        except ValueError as error:
            name = f"{url}#{line.number}"
            yield Sample(ids.claim(name), name, UNKNOWN_S, error=f"bad_manifest_line: {url}:{line.number} {error}")
            continue
        audio = storage.join(storage.folder_of(url), entry.audio_filepath)
        yield Sample(
            recording_id=ids.claim(audio + _stretch(entry)),
            audio_filepath=audio,
            estimated_s=UNKNOWN_S if entry.duration_s is None else entry.duration_s,
            open=files.opener(audio),
            text_ref=entry.text,
            language=entry.language,
            offset_s=entry.offset_s,
            duration_s=entry.duration_s,
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


def _parse(text: bytes) -> _Entry:
    """Raises ValueError with what is wrong with the line."""
    try:
        fields = json.loads(text.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"is a JSON {type(fields).__name__}, where an object is right")
    path = fields.get("audio_filepath")
    if not isinstance(path, str) or not path:
        raise ValueError(f"has no audio_filepath; its keys are {', '.join(map(str, fields)) or 'none'}")
    language = text_or_none(fields.get("language")) or text_or_none(fields.get("lang"))
    return _Entry(
        path,
        _seconds(fields, "offset") or 0.0,
        _seconds(fields, "duration"),
        text_or_none(fields.get("text")),
        language,
    )


def _seconds(fields: dict[str, Any], key: str) -> float | None:
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"has {key} {value!r}, where seconds from 0 on are right")
    return float(value)


def _stretch(entry: _Entry) -> str:
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


def _digest(lines: Iterable[_Line]) -> str:
    return hashlib.blake2b(b"".join(line.text for line in lines), digest_size=8).hexdigest()


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
            return storage.fetch(url, self._options)
        if self._file is None or url != self._url:
            self._file = storage.fetch(url, self._options)
            self._url = url
        self._file.seek(0)
        return nullcontext(self._file)
