"""What a followed stream needs to go on after an interruption, in one local file a stream.

The file is replaced whole. Where it and the output disagree, the output is right: an object that is there has taken its
rows, whatever the file says; where the file is gone, a stream goes on behind its last committed row.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.engine.causal.state import Resume
from pipeline.output import Output
from pipeline.schema import Hypothesis
from pipeline.units import Done, TranscribedSegment, UnitKey

_FRAMES_PER_S = 100


@dataclass(slots=True)
class StreamState:
    """Of the stream that `url` gives, the `number`th of its kind (a FIFO may give one after the other). `rows` are
    segments that stand in no object yet; object number `group` will hold them."""

    url: str
    number: int = 1
    group: int = 0
    resume: Resume = Resume()
    rows: list[TranscribedSegment] = field(default_factory=list)
    is_over: bool = False

    @property
    def recording_id(self) -> str:
        return self.url if self.number == 1 else f"{self.url}#{self.number}"

    @property
    def split_id(self) -> str:
        return split_id(self.url, self.number)

    @property
    def key(self) -> UnitKey:
        return UnitKey(self.split_id, self.group, 0, "z" if self.is_over else "g")

    @property
    def heard_until_s(self) -> float:
        """Where the rows end."""
        return self.rows[-1].offset + self.rows[-1].duration if self.rows else self.resume.first_frame / _FRAMES_PER_S

    def save(self, folder: Path, durable: bool) -> None:
        """`durable`: it outlives a crash of the machine, not only of the process."""
        data = asdict(self)
        partial = folder / f".{self.split_id}.part"
        with partial.open("w", encoding="utf-8") as file:
            json.dump(data, file, ensure_ascii=False)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(folder / f"{self.split_id}.json")

    def forget(self, folder: Path) -> None:
        (folder / f"{self.split_id}.json").unlink(missing_ok=True)


def split_id(url: str, number: int) -> str:
    """As of a unit: 16 hex digits."""
    return hashlib.blake2b(f"stream\0{url}\0{number}".encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def is_complete(done: Done | None) -> bool:
    """Whether a stream has said its last."""
    return done is not None and any(key.end == "z" for key in done.keys)


def begun(url: str, committed: dict[str, Done], is_again: bool) -> int | None:
    """The number of the stream that `url` gives now; None when it was heard to its end and does not come `again`."""
    number = 1
    while is_complete(committed.get(split_id(url, number))):
        if not is_again:
            return None
        number += 1
    return number


def restored(url: str, number: int, folder: Path, output: Output, done: Done) -> StreamState:
    """Where the stream stood: the file's word as far as the output does not know better."""
    file = folder / f"{split_id(url, number)}.json"
    state = StreamState(url, number)
    if file.exists():
        state = _from_json(json.loads(file.read_text(encoding="utf-8")))
    num_objects = 1 + max((key.group for key in done.keys), default=-1)
    if num_objects <= state.group:
        return state
    last = next(key for key in done.keys if key.group == num_objects - 1)
    ((_, record, table),) = output.tables([last], ["offset", "duration"])
    if file.exists() and num_objects == state.group + 1:
        return replace(state, group=num_objects, rows=state.rows[table.num_rows :])
    end_s = max((row["offset"] + row["duration"] for row in table.to_pylist()), default=0.0)
    num_segments = sum(record["num_segments"] for record in output.records(sorted(done.keys)))
    return StreamState(url, number, num_objects, Resume(round(end_s * _FRAMES_PER_S), num_segments=num_segments))


def _from_json(data: dict[str, Any]) -> StreamState:
    rows = [_row(row) for row in data["rows"]]
    resume = data["resume"]
    published: Sequence[str] = tuple(resume.pop("published"))
    peak = float(resume.pop("peak"))
    resume = Resume(**resume, published=published, peak=peak)
    return StreamState(data["url"], data["number"], data["group"], resume, rows, data["is_over"])


def _row(data: dict[str, Any]) -> TranscribedSegment:
    hypothesis = data.pop("hypothesis")
    speech = [(start, end) for start, end in data.pop("speech")]
    return TranscribedSegment(
        **data, speech=speech, hypothesis=Hypothesis(**hypothesis) if hypothesis is not None else None
    )
