"""What every source yields: one sample per recording, its audio unopened."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from pipeline.redact import printable

_AUDIO = """
    3gp aac ac3 aif aifc aiff amr ape asf au avi caf dsf flac m4a m4b mka mkv mov mp1 mp2 mp3 mp4 mpga oga ogg opus ra
    rf64 snd sph spx tta voc w64 wav weba webm wma wv
"""
AUDIO_SUFFIXES = frozenset(_AUDIO.split())
SIDECAR_SUFFIXES = ("json", "txt", "lang")
"""Files that say something about the recording beside them; a later one overrides what an earlier one said."""

IN_TAR = re.compile(r"(.+\.(?:tar|tar\.gz|tgz))/", re.IGNORECASE | re.DOTALL)
IN_PARQUET = re.compile(r"(.+)#\d+(?:/[^/]*)?", re.DOTALL)
"""The file that an `audio_filepath` lies in, where it is a member or a row of one."""

_TEXT_KEYS = ("text", "transcript", "transcription", "sentence")
_LANGUAGE_KEYS = ("language", "lang")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Sample:
    """One recording of an input, or a stretch of one.

    `recording_id` is unique in the run; `audio_filepath` is its full name (a path or URL, `<tar>/<member>`,
    `<parquet>#<row>`). `estimated_s` decides which unit it falls in and depends on names and sizes alone. `open` gives
    its bytes as a local seekable file, and is valid until the source is asked for the next sample. `place` is where
    they lie in a tar, first and number, if they lie there as they are. `error` says why there is nothing to open.
    `sentences` are the reference's, with `text`, `offset` and `duration`, where a JSON sidecar or manifest has them.
    """

    recording_id: str
    audio_filepath: str
    estimated_s: float
    open: Callable[[], AbstractContextManager[BinaryIO]] | None = None
    text_ref: str | None = None
    language: str | None = None
    offset_s: float = 0.0
    duration_s: float | None = None
    place: tuple[int, int] | None = None
    error: str | None = None
    sentences: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("recording_id", "audio_filepath", "text_ref", "language", "error"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, printable(value))


class UniqueIds:
    """Gives the second recording of one name `~2`, the third `~3`, in the order they are met."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def claim(self, name: str) -> str:
        count = self._seen[name] = self._seen.get(name, 0) + 1
        return name if count == 1 else self.claim(f"{name}~{count}")


class Filler:
    """Numbers the runs of consecutive items that fill `target_s` seconds each: a run closes before the item that would
    take it over, and holds at least one item (and at most `max_items`)."""

    def __init__(self, target_s: float, max_items: int | None = None) -> None:
        self._target_s, self._max_items = target_s, max_items
        self._run = self._num_items = 0
        self._seconds = 0.0

    def run_of(self, seconds: float) -> int:
        """The run that the next item, of `seconds`, belongs to."""
        if self._num_items and (self._seconds + seconds > self._target_s or self._num_items == self._max_items):
            self._run, self._num_items, self._seconds = self._run + 1, 0, 0.0
        self._num_items += 1
        self._seconds += seconds
        return self._run


def suffix_of(name: str) -> str:
    """What follows the last dot of a file name, in lower case; "" without one."""
    return name.rsplit("/", 1)[-1].rpartition(".")[2].lower() if "." in name.rsplit("/", 1)[-1] else ""


def is_hidden(name: str) -> bool:
    """Dot files (macOS writes `._a.wav` beside `a.wav`) are nobody's recordings."""
    return name.rsplit("/", 1)[-1].startswith(".")


def text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def read_sidecars(sidecars: Iterable[tuple[str, bytes]]) -> tuple[str | None, str | None]:
    """The (reference text, language) that sidecars, as (file name, content), hold between them."""
    text = language = None
    for name, content in sorted(sidecars, key=lambda item: SIDECAR_SUFFIXES.index(suffix_of(item[0]))):
        suffix, decoded = suffix_of(name), content.decode("utf-8-sig", errors="replace").strip()
        if suffix == "txt":
            text = decoded
        elif suffix == "lang":
            language = decoded or language
        else:
            fields = _json_object(name, decoded)
            text = next((fields[key] for key in _TEXT_KEYS if isinstance(fields.get(key), str)), text)
            language = next((fields[key] for key in _LANGUAGE_KEYS if isinstance(fields.get(key), str)), language)
    return text, language


def read_sentences(sidecars: Iterable[tuple[str, bytes]]) -> list[dict[str, Any]]:
    """The sentences of a JSON sidecar; none where it has none, or they lack a text or a time."""
    for name, content in sidecars:
        if suffix_of(name) == "json" and b'"sentences"' in content:
            return sentences_of(_json_object(name, content.decode("utf-8-sig", errors="replace")))
    return []


def sentences_of(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Those under `sentences`, if each has its `text`, `offset` and `duration`."""
    found = fields.get("sentences")
    return found if isinstance(found, list) and all(map(_is_sentence, found)) else []


def _is_sentence(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        return False
    times = value.get("offset"), value.get("duration")
    return all(isinstance(time, int | float) and math.isfinite(time) and time >= 0 for time in times)


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        _log.warning("%s is no JSON (%s); its recording goes without reference text", name, error)
        return {}
    return value if isinstance(value, dict) else {}
