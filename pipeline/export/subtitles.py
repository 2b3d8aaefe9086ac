"""SubRip and WebVTT: one file a recording, of cues that fit two lines."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.export.folder import Folder, Lines, Row, recording_key_of
from pipeline.text import letters

_LINES = 2
_LINE_WIDTH = 42  # columns, as broadcasters have it; a character of Chinese or Japanese takes two
_BREAKS = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Cue:
    start_s: float
    end_s: float
    lines: list[str]


class SubtitleWriter:
    """NAME-HASH.srt or .vtt of each recording (and channel), and index.jsonl that says which is which.

    Times are those of the audio file. What a subtitle cannot say (confidence, filters, empty and failed segments) is
    left out.
    """

    def __init__(self, folder: Folder, kind: Literal["srt", "vtt"]) -> None:
        self._folder, self._kind = folder, kind
        self._index = Lines(folder, "index-{:05d}.jsonl")
        self._recordings: dict[str, list[Row]] = {}

    def add(self, row: Row, pcm: np.ndarray | None) -> None:
        self._recordings.setdefault(row["recording_id"], []).append(row)

    def end_split(self) -> None:
        for recording_id, rows in self._recordings.items():
            name = f"{recording_key_of(rows[0])}.{self._kind}"
            cues = [cue for row in sorted(rows, key=lambda row: float(row["offset"])) for cue in cues_of(row)]
            text = to_srt(cues) if self._kind == "srt" else to_vtt(cues)
            self._folder.put(name, text.encode())
            self._index.add({"recording_id": recording_id, "audio_filepath": rows[0]["audio_filepath"], "file": name})
        self._recordings = {}

    def close(self) -> None:
        self._index.close()


def cues_of(row: Row) -> list[Cue]:
    """The sentences of a row as cues; a sentence that does not fit one is cut between words.

    A cut within a sentence stands at its word's time where the row has words, else at its share of the letters.
    """
    if not row["text"].strip():
        return []
    whole = {"text": row["text"], "offset": row["offset"], "duration": row["duration"]}
    sentences = row["sentences"] or [whole]
    clock = _Clock(row, sentences)
    cues, position = [], 0
    for sentence in sentences:
        lines = list(_wrapped(sentence["text"]))
        for number in range(0, len(lines), _LINES):
            shown = lines[number : number + _LINES]
            end = position + sum(len(letters(line)) for line in shown)
            cues.append(Cue(clock.start(position), clock.end(end), shown))
            position = end
    return cues


class _Clock:
    """Seconds of the audio file at a number of letters into a row's text."""

    def __init__(self, row: Row, sentences: Sequence[Row]) -> None:
        words = row["words"] or []
        if words:
            spans = [(row["offset"] + each["start"], row["offset"] + each["end"]) for each in words]
            sizes = [len(letters(each["word"])) for each in words]
        else:
            spans = [(each["offset"], each["offset"] + each["duration"]) for each in sentences]
            sizes = [len(letters(each["text"])) for each in sentences]
        num_letters = sum(len(letters(each["text"])) for each in sentences)
        ends = np.cumsum(sizes)
        scale = num_letters / ends[-1] if ends[-1] else 1.0
        self._ends = ends * scale
        self._begins = self._ends - np.array(sizes) * scale
        self._spans = spans

    def start(self, position: float) -> float:
        return self._at(int(np.searchsorted(self._ends, position, side="right")), position)

    def end(self, position: float) -> float:
        return self._at(int(np.searchsorted(self._ends, position - 1e-6, side="left")), position)

    def _at(self, index: int, position: float) -> float:
        index = min(index, len(self._spans) - 1)
        begin, end = self._begins[index], self._ends[index]
        share = (position - begin) / (end - begin) if end > begin else 1.0
        start_s, end_s = self._spans[index]
        return float(start_s + min(max(share, 0.0), 1.0) * (end_s - start_s))


def _wrapped(text: str) -> Iterator[str]:
    """Lines of at most `_LINE_WIDTH` columns, cut at spaces, and anywhere in a word that is longer."""
    line = ""
    for word in filter(None, _BREAKS.split(text)):
        joined = f"{line} {word}" if line else word
        if _width(joined) <= _LINE_WIDTH:
            line = joined
            continue
        if line and _width(word) <= _LINE_WIDTH:
            yield line
            line = word
            continue
        *full, line = _cut_anywhere(joined)
        yield from full
    if line:
        yield line


def _cut_anywhere(text: str) -> list[str]:
    pieces, width = [""], 0
    for char in text:
        width += _width(char)
        if width > _LINE_WIDTH:
            pieces.append("")
            width = _width(char)
        pieces[-1] += char
    return [piece.strip() for piece in pieces]


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def to_srt(cues: Sequence[Cue]) -> str:
    """SubRip."""
    blocks = []
    for number, cue in enumerate(cues, 1):
        shown = "\n".join(cue.lines).replace("-->", "->")
        blocks.append(f"{number}\n{_stamp(cue.start_s, ',')} --> {_stamp(cue.end_s, ',')}\n{shown}\n")
    return "\n".join(blocks)


def to_vtt(cues: Sequence[Cue]) -> str:
    """WebVTT (https://www.w3.org/TR/webvtt1)."""
    blocks = ["WEBVTT\n"]
    for cue in cues:
        shown = html.escape("\n".join(cue.lines), quote=False)
        blocks.append(f"{_stamp(cue.start_s, '.')} --> {_stamp(cue.end_s, '.')}\n{shown}\n")
    return "\n".join(blocks)


def _stamp(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"
