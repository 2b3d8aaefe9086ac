"""What a report shows of an output, from one pass over its units that holds sums and never the rows.

A unit is opened once: its footer and light columns are added up and let go. Then the few rows to show are read whole.
They are drawn by scores that follow from their unit's name: the same output shows the same rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from pipeline import storage
from pipeline.config import TranscribeConfig, validate
from pipeline.output import Output, RunPlan
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
from pipeline.schema import REASONS
from pipeline.sources.sample import IN_PARQUET, IN_TAR
from pipeline.summary import Summary, summarize_records
from pipeline.units import UnitKey

_SHOWN = [*TALLIED, "recording_id", "audio_filepath", "channel", "offset", "text", "text_ref"]
_SLOWEST = 10


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
    the first; `commits` is float64 `[num_units, 3]`: committed_at, busy_s, audio_s, in the order of commit. `filters`
    are rows by reason, in the order in which filters are asked, and `left_s` the audio that is left after each."""

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
    left_s: dict[str, float]
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
    read = _UnitReader(output)
    tally = Tally(num_samples)
    keys = sorted(key for done in committed.values() for key in done.keys)
    summary = summarize_records(plan, committed, tally.observing(output.tables(keys, TALLIED)))

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
        filters=dict(sorted(tally.filters.items(), key=lambda item: _place(item[0]))),
        left_s={step.reason: step.left_s for step in tally.funnel.steps()},
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


def _place(reason: str) -> int:
    return REASONS.index(reason) if reason in REASONS else len(REASONS)


class _UnitReader:
    """Reads rows of one output."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def rows(self, positions: Iterable[Position]) -> dict[Position, Row]:
        wanted: dict[UnitKey, list[int]] = {}
        for unit, row in sorted(positions):
            wanted.setdefault(UnitKey.parse(unit), []).append(row)  # type: ignore[arg-type]
        found = {}
        for key, _, table in self._output.tables(wanted, _SHOWN):
            kinds = kinds_of(table)
            for row in wanted[key]:
                (values,) = table.slice(row, 1).drop_columns(["status", "keep"]).to_pylist()
                found[key.name, row] = Row(key.name, row, KINDS[kinds[row]], **values)
        return found

    def shard_name(self, unit: UnitKey) -> str:
        ((_, _, table),) = self._output.tables([unit], ["audio_filepath"])
        return shard_name(table["audio_filepath"].unique().to_pylist())


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
