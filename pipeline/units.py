"""Units of work: what one is, what it is called, and how its audio travels.

A run's inputs become *splits* (one tar shard, one group of files, a run of Parquet row groups or manifest lines). One
task reads a split and yields *units* of bounded audio. A unit's name says where it stands, so that a listing of the
output alone proves what is complete:

    <split_id>-<group:05d>-<part:03d><end>.parquet

`group` counts runs of recordings whose estimated length (from byte sizes alone, no decoding) fills a unit; `part`
counts the pieces that a group turned out to hold when its recordings are longer than their bytes suggested; `end` is
`p` when more parts of the group follow, `g` when the group ends here and another follows, `z` when the split ends here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis

End = Literal["p", "g", "z"]
_UNIT_NAME = re.compile(r"(?P<split>[0-9a-f]{16})-(?P<group>\d{5,})-(?P<part>\d{3,})(?P<end>[pgz])")

BYTES_PER_SECOND = {
    "wav": 32_000,
    "flac": 16_000,
    "mp3": 12_000,
    "m4a": 12_000,
    "ogg": 6_000,
    "opus": 4_000,
}
"""Assumed bytes per second of audio by file suffix. Only unit sizes depend on it, never what is read."""


def estimated_seconds(name: str, num_bytes: int) -> float:
    """Seconds of audio that a file of this name and size probably holds."""
    return num_bytes / BYTES_PER_SECOND.get(name.rsplit(".", 1)[-1].lower(), 12_000)


@dataclass(frozen=True, slots=True)
class Split:
    """What one read task works off, small enough to travel in a row: `kind` names the source that reads it, `items`
    what to read (JSON values, the source's own), `num_bytes` its size for ordering and estimates."""

    kind: str
    items: list[Any]
    num_bytes: int
    estimated_s: float
    input_index: int

    @property
    def split_id(self) -> str:
        """16 hex digits from kind and items: the same inputs give the same units."""
        text = json.dumps([self.kind, self.items], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Split:
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True, order=True)
class UnitKey:
    split_id: str
    group: int
    part: int
    end: End

    @property
    def name(self) -> str:
        return f"{self.split_id}-{self.group:05d}-{self.part:03d}{self.end}"

    @classmethod
    def parse(cls, name: str) -> UnitKey | None:
        """The key that a file name (with or without `.parquet`) stands for, or None when it is no unit's."""
        match = _UNIT_NAME.fullmatch(name.removesuffix(".parquet"))
        if match is None:
            return None
        return cls(match["split"], int(match["group"]), int(match["part"]), match["end"])  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class DoneParts:
    """What is committed of one group: part -> its end."""

    ends: dict[int, End]

    def all_from(self, part: int) -> bool:
        """True when every part from `part` on is there, up to one that ends the group."""
        last = next((number for number, end in self.ends.items() if end != "p"), None)
        return last is not None and all(number in self.ends for number in range(part, last + 1))


@dataclass(frozen=True, slots=True)
class Done:
    """What is committed of one split."""

    keys: frozenset[UnitKey] = frozenset()

    @classmethod
    def of(cls, keys: Iterable[UnitKey]) -> Done:
        return cls(frozenset(keys))

    def parts(self, group: int) -> DoneParts:
        return DoneParts({key.part: key.end for key in self.keys if key.group == group})

    def complete(self, num_groups: int | None = None) -> bool:
        """True when every unit of the split, or of its first `num_groups`, is there, proven by the names alone."""
        last = next((key.group + 1 for key in self.keys if key.end == "z"), None)
        wanted = min((number for number in (last, num_groups) if number is not None), default=None)
        return wanted is not None and all(self.parts(group).all_from(0) for group in range(wanted))


@dataclass(slots=True)
class Recording:
    """A recording, or the part of one that a unit holds.

    `pcm` is int16 `[num_samples]`, 16 kHz mono; `offset_s` is where it starts in the audio file. A recording that could
    not be read has `error` ("<reason code>: <detail>") and whatever audio came before it. `continues` is True where a
    former unit holds its beginning, `goes_on` where a later one holds its end. `speech` are the `[start, end)` samples
    where someone speaks, in order (after the segment step).
    """

    recording_id: str
    audio_filepath: str
    pcm: np.ndarray
    channel: int | None = None
    offset_s: float = 0.0
    language: str | None = None
    text_ref: str | None = None
    error: str | None = None
    continues: bool = False
    goes_on: bool = False
    speech: list[tuple[int, int]] = field(default_factory=list)

    @property
    def duration_s(self) -> float:
        return len(self.pcm) / SAMPLE_RATE_HZ


@dataclass(slots=True)
class Unit:
    """A unit's audio on its way to the engine: recordings, then (after the segment step) spans of them. `num_retries`
    counts the storage requests that were made again to read it."""

    key: UnitKey
    recordings: list[Recording]
    spans: list[Span] = field(default_factory=list)
    num_retries: int = 0

    @property
    def audio_s(self) -> float:
        return sum(recording.duration_s for recording in self.recordings)


@dataclass(frozen=True, slots=True)
class Span:
    """Samples `[start, start + num_samples)` of `recordings[recording].pcm`."""

    recording: int
    start: int
    num_samples: int

    @property
    def bounds(self) -> tuple[int, int]:
        return self.start, self.start + self.num_samples


@dataclass(frozen=True, slots=True)
class TranscribedSegment:
    """One row to be: a stretch of a recording with what the engine said, or why there is nothing.

    `offset` and `duration` in seconds of the audio file; `speech` as in `Recording`, from the segment's start on;
    `error` is "<reason code>: <detail>", and then there is no hypothesis; `language_ref` is the input's own; `second`
    is what `agree_with` made of it; `is_whole` says that the unit holds its recording from beginning to end.
    """

    segment_id: str
    recording_id: str
    audio_filepath: str
    channel: int | None
    offset: float
    duration: float
    text_ref: str | None
    speech_ratio: float | None
    hypothesis: Hypothesis | None
    error: str | None
    speech: list[tuple[int, int]] = field(default_factory=list)
    language_ref: str | None = None
    second: Hypothesis | None = None
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class TranscribedUnit:
    """A unit's rows to be. `num_recordings` counts those that begin here, `decoded_s` the audio that the engine decoded
    (some of it twice where windows roll at sentences), `busy_s` is the wall time from the audio's arrival to its last
    hypothesis, `engine` holds the fields of the engine's `EngineInfo`, `agree_with` the second one's (or None),
    `num_retries` is the unit's."""

    key: UnitKey
    segments: list[TranscribedSegment]
    num_recordings: int
    audio_s: float
    decoded_s: float
    busy_s: float
    engine: dict[str, Any]
    num_retries: int = 0
    agree_with: dict[str, Any] | None = None


_RECORDING = pa.struct(
    [
        ("recording_id", pa.string()),
        ("audio_filepath", pa.string()),
        ("channel", pa.int16()),
        ("offset_s", pa.float64()),
        ("language", pa.string()),
        ("text_ref", pa.string()),
        ("error", pa.string()),
        ("continues", pa.bool_()),
        ("goes_on", pa.bool_()),
        ("speech", pa.list_(pa.list_(pa.int64()))),
        ("pcm", pa.large_binary()),
    ]
)
_SPAN = pa.struct([("recording", pa.int32()), ("start", pa.int64()), ("num_samples", pa.int64())])
UNIT_ROW = pa.schema(
    [
        ("unit", pa.string()),
        ("recordings", pa.list_(_RECORDING)),
        ("spans", pa.list_(_SPAN)),
        ("num_retries", pa.int32()),
    ]
)
"""How a unit travels between processes: one row, its recordings and spans nested, audio as int16 bytes."""


def to_table(unit: Unit) -> pa.Table:
    """A unit as one `UNIT_ROW`; its audio is copied once, and not at all where there is one recording.

    Built from buffers, because `Table.from_pylist` never lets go of a memoryview (pyarrow 26).
    """
    audio = [recording.pcm for recording in unit.recordings]
    samples = audio[0] if len(audio) == 1 else np.concatenate([np.empty(0, np.int16), *audio])
    ends = np.cumsum([0, *(pcm.nbytes for pcm in audio)], dtype=np.int64)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(samples)]
    pcm = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(audio), buffers)
    columns = [
        pcm if field.name == "pcm" else pa.array([getattr(each, field.name) for each in unit.recordings], field.type)
        for field in _RECORDING
    ]
    nested = pa.StructArray.from_arrays(columns, fields=list(_RECORDING))
    recordings = pa.ListArray.from_arrays(pa.array([0, len(audio)], pa.int32()), nested)
    spans = pa.array([[asdict(span) for span in unit.spans]], pa.list_(_SPAN))
    num_retries = pa.array([unit.num_retries], pa.int32())
    return pa.Table.from_arrays([pa.array([unit.key.name]), recordings, spans, num_retries], schema=UNIT_ROW)


def from_table(table: pa.Table) -> Unit:
    """The unit of a one-row table. Its audio are read-only views of the table's buffers, never copies."""
    key = UnitKey.parse(table["unit"][0].as_py())
    assert key is not None and table.num_rows == 1
    (row,) = (chunk for chunk in table["recordings"].chunks if len(chunk))  # combine_chunks() would copy
    nested = row.flatten()
    fields = {name: column for name, column in zip(_RECORDING.names, nested.flatten(), strict=True)}
    audio = _pcm_views(fields.pop("pcm"))
    speech = fields.pop("speech")
    recordings = [
        Recording(
            pcm=pcm,
            speech=[(start, end) for start, end in speech[index].as_py()],
            **{name: column[index].as_py() for name, column in fields.items()},
        )
        for index, pcm in enumerate(audio)
    ]
    spans = [Span(**span) for span in table["spans"][0].as_py()]
    return Unit(key, recordings, spans, table["num_retries"][0].as_py())


def _pcm_views(column: pa.LargeBinaryArray) -> list[np.ndarray]:
    """Views of the column's data buffer; the buffer of a scalar of it would be a copy (Arrow makes it one)."""
    if len(column) == 0:
        return []
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1].tolist()
    return [np.frombuffer(data.slice(start, end - start), np.int16) for start, end in itertools.pairwise(bounds)]
