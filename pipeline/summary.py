"""What an output folder says about its job, from its own contents alone: works while the job runs elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from pipeline.output import Output, RunPlan
from pipeline.progress import duration
from pipeline.units import Done


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts and sums over the committed units; times in seconds.

    A split's units are known for certain once its last one is committed; until then `units_planned` takes the largest
    number seen plus an estimate from its bytes, and `is_exact` is False. `rtfx` is audio seconds per wall second of the
    newest run, None before its first commit; `num_retries` counts the storage requests made again to read the inputs.
    """

    splits_planned: int
    splits_complete: int
    units_planned: int
    units_committed: int
    is_exact: bool
    audio_s: float
    audio_planned_s: float
    num_recordings: int
    num_segments: int
    num_retries: int
    status: dict[str, int]
    errors: dict[str, int]
    audio_s_by_language: dict[str, float]
    rtfx: float | None
    eta_s: float | None

    @property
    def is_complete(self) -> bool:
        return self.splits_complete == self.splits_planned

    @property
    def num_failed(self) -> int:
        return self.status.get("failed", 0)


def summarize(output: Output) -> Summary:
    """Read names and footers of everything committed. Raises ConfigError when no job has written there."""
    plan, committed = output.read_plan(), output.committed()
    keys = sorted(key for done in committed.values() for key in done.keys)
    return summarize_records(plan, committed, output.records(keys))


def summarize_records(plan: RunPlan, committed: Mapping[str, Done], records: Iterable[dict[str, Any]]) -> Summary:
    """`records` are those of all `committed` units, in any order; they are consumed one by one."""
    status: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    audio_s = run_audio_s = 0.0
    recordings = segments = retries = 0
    last_commit = plan.started_at
    for record in records:
        status.update(record["status"])
        errors.update(record["errors"])
        for language, seconds in record["audio_s_by_language"].items():
            languages[language] += seconds
        audio_s += record["audio_s"]
        recordings += record["num_recordings"]
        segments += record["num_segments"]
        retries += record["num_retries"]
        if record["run_id"] == plan.run_id:
            run_audio_s += record["audio_s"]
            last_commit = max(last_commit, record["committed_at"])

    units_planned = complete = 0
    remaining_s = 0.0
    for split in plan.splits:
        done = committed.get(split.split_id)
        if done is not None and done.complete():
            complete += 1
            units_planned += len(done.keys)
            continue
        num_seen = len(done.keys) if done is not None else 0
        expected = max(1, round(split.estimated_s / plan.unit_s))
        units_planned += max(expected, num_seen + 1)
        remaining_s += split.estimated_s * (1 - min(num_seen, expected) / expected)
    finished = complete == len(plan.splits)
    wall_s = (last_commit if finished else time.time()) - plan.started_at
    rtfx = run_audio_s / wall_s if run_audio_s and wall_s > 0 else None
    return Summary(
        splits_planned=len(plan.splits),
        splits_complete=complete,
        units_planned=units_planned,
        units_committed=sum(len(done.keys) for done in committed.values()),
        is_exact=finished,
        audio_s=audio_s,
        audio_planned_s=audio_s + remaining_s,
        num_recordings=recordings,
        num_segments=segments,
        num_retries=retries,
        status=dict(status),
        errors=dict(errors.most_common()),
        audio_s_by_language=dict(languages.most_common()),
        rtfx=rtfx,
        eta_s=0.0 if finished else remaining_s / rtfx if rtfx else None,
    )


def print_summary(summary: Summary, console: Console) -> None:
    for line in summary_lines(summary):
        console.print(line, highlight=False, soft_wrap=True)


def summary_lines(summary: Summary) -> list[str]:
    """The figures of an output in a few lines."""
    about = "" if summary.is_exact else "~"
    lines = [
        f"units      {summary.units_committed:,} committed of {about}{summary.units_planned:,} planned "
        f"({summary.splits_complete:,} of {summary.splits_planned:,} splits complete)",
        f"audio      {duration(summary.audio_s)} of {about}{duration(summary.audio_planned_s)} · "
        f"{summary.num_recordings:,} recordings · {summary.num_segments:,} segments",
        "segments   "
        + (", ".join(f"{count:,} {name}" for name, count in sorted(summary.status.items())) or "none yet"),
    ]
    if summary.errors:
        lines.append("failures   " + ", ".join(f"{count:,} {reason}" for reason, count in summary.errors.items()))
    if summary.audio_s_by_language:
        by_language = (f"{name} {duration(seconds)}" for name, seconds in summary.audio_s_by_language.items())
        lines.append("languages  " + ", ".join(by_language))
    if summary.num_retries:
        lines.append(f"storage    {summary.num_retries:,} requests made again to read the inputs")
    if summary.rtfx is not None:
        eta = "" if summary.eta_s is None or summary.is_complete else f" · ETA {duration(summary.eta_s)}"
        lines.append(f"speed      {summary.rtfx:.1f}x real time in the newest run{eta}")
    return lines
