"""What a report shows of an output, from one pass over its units that holds sums and never the rows.

A unit is opened once: its footer and light columns are added up and let go. Then the few rows to show are read whole.
They are drawn by scores that follow from their unit's name: the same output shows the same rows.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline import storage
from pipeline.config import TranscribeConfig, validate
from pipeline.output import RECORD_KEY, Output, RunPlan
from pipeline.report.tally import (
    KINDS,
    TALLIED,
    DrawnAs,
    Histogram,
    Kind,
    Language,
    Position,
    Run,
    Shard,
    Tally,
    kinds_of,
)
from pipeline.sources.sample import IN_PARQUET, IN_TAR
from pipeline.summary import Summary, summarize_records
from pipeline.units import UnitKey

_SHOWN = [*TALLIED, "recording_id", "audio_filepath", "channel", "offset", "text", "text_ref"]
_SLOWEST = 10
_READERS = 16
_READ_AHEAD = 64  # units in memory at once, some kilobytes each


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the output as the page shows it; `row` is its place in its unit."""

    unit: str
    row: int
    kind: Kind
    recording_id: str
    audio_filepath: str
    channel: int | None
    offset: float
    duration: float
    text: str
    text_ref: str | None
    language: str | None
    avg_logprob: float | None
    error: str | None
    filter_reasons: list[str]


@dataclass(frozen=True, slots=True)
class Failure:
    """A reason code with how many rows have it, and some of them."""

    reason: str
    count: int
    examples: list[Row]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the page shows, but for audio. `engine` and `versions` are those of the newest unit, empty before
    the first; `commits` is float64 `[num_units, 3]`: committed_at, busy_s, audio_s, in the order of commit."""

    url: str
    generated_at: float
    config: TranscribeConfig
    config_hash: str
    model_revision: str | None
    plan: RunPlan
    summary: Summary
    engine: dict[str, Any]
    versions: dict[str, str]
    kinds: dict[Kind, int]
    durations: Histogram
    confidence: Histogram
    languages: list[Language]
    filters: dict[str, int]
    failures: list[Failure]
    slowest: list[Shard]
    median_busy_ratio: float | None
    commits: np.ndarray
    runs: list[Run]
    samples: list[tuple[DrawnAs, Row]]


def gather(output: Output, options: storage.Options, num_samples: int) -> Report:
    """Read an output, finished or not. Raises ConfigError when no job has written there."""
    plan, committed = output.read_plan(), output.committed()
    url = storage.join(output.url, "shardscribe.yaml")
    resolved = yaml.safe_load(storage.read_bytes(url, options))
    config = validate(TranscribeConfig, resolved["config"], url)
    read = UnitReader(output.transcripts_url, options)
    tally = Tally(num_samples)
    keys = sorted(key for done in committed.values() for key in done.keys)
    summary = summarize_records(plan, committed, tally.observing(read.units(keys, TALLIED)))

    drawn = tally.draw(num_samples)
    examples = {reason: rows.positions() for reason, rows in tally.failed_by_reason.items()}
    wanted = {position for position, _ in drawn} | {position for rows in examples.values() for position in rows}
    rows = read.rows(wanted)
    timed = sorted((s for s in tally.shards.values() if s.audio_s), key=lambda shard: -shard.busy_ratio)
    for shard in timed[:_SLOWEST]:
        shard.name = read.shard_name(shard.first_unit)
    return Report(
        url=output.url,
        generated_at=time.time(),
        config=config,
        config_hash=resolved["config_hash"],
        model_revision=resolved["model_revision"],
        plan=plan,
        summary=summary,
        engine=tally.newest.get("engine", {}),
        versions=tally.newest.get("versions", {}),
        kinds=dict(zip(KINDS, tally.kinds.tolist(), strict=True)),
        durations=tally.durations,
        confidence=tally.confidence,
        languages=sorted(tally.languages.values(), key=lambda language: (-language.audio_s, language.name)),
        filters=dict(tally.filters.most_common()),
        failures=[
            Failure(reason, count, [rows[position] for position in examples.get(reason, [])])
            for reason, count in summary.errors.items()
        ],
        slowest=timed[:_SLOWEST],
        median_busy_ratio=float(np.median([shard.busy_ratio for shard in timed])) if timed else None,
        commits=np.array(sorted(tally.commits)).reshape(-1, 3),
        runs=_runs(tally.runs, plan),
        samples=[(drawn_as, rows[position]) for position, drawn_as in drawn],
    )


class UnitReader:
    """Reads units of one output, several at a time."""

    def __init__(self, transcripts_url: str, options: storage.Options) -> None:
        self._url, self._options = transcripts_url, options

    def units(self, keys: Iterable[UnitKey], columns: list[str]) -> Iterator[tuple[UnitKey, dict[str, Any], pa.Table]]:
        """Each unit's run record and `columns`, in the order of `keys`."""
        pending: deque[Future[tuple[UnitKey, dict[str, Any], pa.Table]]] = deque()
        with ThreadPoolExecutor(_READERS) as pool:
            for key in keys:
                pending.append(pool.submit(self._read, key, columns))
                if len(pending) == _READ_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def rows(self, positions: Iterable[Position]) -> dict[Position, Row]:
        wanted: dict[UnitKey, list[int]] = {}
        for unit, row in sorted(positions):
            wanted.setdefault(UnitKey.parse(unit), []).append(row)  # type: ignore[arg-type]
        found = {}
        for key, _, table in self.units(wanted, _SHOWN):
            kinds = kinds_of(table)
            for row in wanted[key]:
                (values,) = table.slice(row, 1).drop_columns(["status", "keep"]).to_pylist()
                found[key.name, row] = Row(key.name, row, KINDS[kinds[row]], **values)
        return found

    def shard_name(self, unit: UnitKey) -> str:
        _, _, table = self._read(unit, ["audio_filepath"])
        return shard_name(table["audio_filepath"].unique().to_pylist())

    def _read(self, key: UnitKey, columns: list[str]) -> tuple[UnitKey, dict[str, Any], pa.Table]:
        url = storage.join(self._url, f"{key.name}.parquet")
        try:
            with storage.open_read(url, self._options) as opened:
                file = pq.ParquetFile(opened)
                return key, json.loads(file.metadata.metadata[RECORD_KEY]), file.read(columns, use_threads=False)
        except pa.ArrowInvalid as error:
            raise storage.StorageError(
                f"{url} is no readable unit: {error}; delete it and run the job again"
            ) from error


def shard_name(audio_filepaths: Sequence[str]) -> str:
    """What a unit's audio lies in: a tar, a Parquet file, or else the first of its files."""
    if not audio_filepaths:
        return "(no recordings)"
    first = audio_filepaths[0]
    inside = IN_TAR.match(first) or IN_PARQUET.fullmatch(first)
    if inside:
        return inside[1]
    return first if len(audio_filepaths) == 1 else f"{first} and others"


def _runs(found: dict[str, Run], plan: RunPlan) -> list[Run]:
    """In the order they started; the newest one's own start is known from the plan."""
    if plan.run_id in found:
        run = found[plan.run_id]
        run.started_at = min(run.started_at, plan.started_at)
    return sorted(found.values(), key=lambda run: run.started_at)
