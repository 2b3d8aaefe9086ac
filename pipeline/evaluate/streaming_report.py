"""Replays as figures: a row a system and language, and how flat a long stream is."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from pipeline.evaluate.replay import Minute, Replay
from pipeline.machine import cpu_name, versions
from pipeline.metrics import ErrorCounts, unit_name

HEADERS = (
    "system", "language", "error", "GFLOP/s of audio, first", "last", "of it lm_head", "latency p50 / p95",
    "taken back", "refused", "RTF", "streams per core",
)  # fmt: skip
_PACKAGES = ("shardscribe", "torch", "transformers", "qwen-asr", "qwen3-asr-causal")


@dataclass(frozen=True, slots=True)
class Compute:
    """GFLOP a second of audio in minute `number` (from 1), the output layer included and alone."""

    number: int
    gflop: float
    lm_head: float


@dataclass(frozen=True, slots=True)
class Flatness:
    """Of figures by minute: `drift` is how far a line through them rises from the first to the last, `spread` how far
    the highest is above the lowest, both as shares of the mean."""

    first: float
    last: float
    mean: float
    drift: float
    spread: float


@dataclass(frozen=True, slots=True)
class Row:
    """A system on talks of a language. `streams_per_core` is measured, or 1 / RTF where streams take turns."""

    system: str
    language: str
    audio_s: float
    errors: ErrorCounts
    first: Compute | None
    last: Compute | None
    latency_s: tuple[float, float] | None
    num_retractions: int
    num_refused: int
    rtf: float
    peak_rss_bytes: int
    streams_per_core: float | None = None


def rows(replays: Sequence[Replay], streams: Mapping[str, float] | None = None) -> list[Row]:
    """One for each system and language, in the order that they come in; compute is that of the longest talk."""
    groups: dict[tuple[str, str], list[Replay]] = {}
    for each in replays:
        groups.setdefault((each.system, each.language), []).append(each)
    return [_row(*key, members, (streams or {}).get(key[0])) for key, members in groups.items()]


def _row(system: str, language: str, members: Sequence[Replay], streams: float | None) -> Row:
    longest = max(members, key=lambda each: each.audio_s)
    computes = computes_of(longest.minutes)
    audio_s = sum(each.audio_s for each in members)
    return Row(
        system=system,
        language=language,
        audio_s=audio_s,
        errors=sum((each.errors for each in members), ErrorCounts()),
        first=computes[0] if computes else None,
        last=computes[-1] if computes else None,
        latency_s=percentiles([latency for each in members for latency in each.latencies_s or ()]),
        num_retractions=sum(each.num_retractions for each in members),
        num_refused=sum(each.num_refused for each in members),
        rtf=sum(each.rtf * each.audio_s for each in members) / audio_s,
        peak_rss_bytes=max(each.peak_rss_bytes for each in members),
        streams_per_core=streams,
    )


def computes_of(minutes: Sequence[Minute]) -> list[Compute]:
    return [
        Compute(number, minute.flops / minute.audio_s / 1e9, (minute.lm_head_flops or 0) / minute.audio_s / 1e9)
        for number, minute in enumerate(minutes, 1)
        if minute.flops is not None
    ]


def percentiles(latencies_s: Sequence[float]) -> tuple[float, float] | None:
    """The median and the 95th."""
    if not latencies_s:
        return None
    median, late = np.percentile(latencies_s, [50, 95])
    return float(median), float(late)


def flatness(numbers: Sequence[float]) -> Flatness | None:
    """None of fewer than two."""
    if len(numbers) < 2:
        return None
    y = np.array(numbers, float)
    mean = float(y.mean()) or 1.0
    slope, _ = np.polyfit(np.arange(len(y)), y, 1)
    drift = float(slope) * (len(y) - 1) / mean
    return Flatness(float(y[0]), float(y[-1]), float(y.mean()), drift, float(y.max() - y.min()) / mean)


def curves(replay: Replay) -> dict[str, Flatness | None]:
    """Flatness of compute, of time and of memory over a talk's full minutes."""
    full = [minute for minute in replay.minutes if minute.audio_s > 59.9]
    return {
        "GFLOP/s of audio": flatness([compute.gflop for compute in computes_of(full)]),
        "RTF": flatness([minute.compute_s / minute.audio_s for minute in full]),
        "RSS, MB": flatness([minute.rss_bytes / 1e6 for minute in full]),
    }


def cells(row: Row) -> list[str]:
    computes = [f"{each.gflop:.3g} (minute {each.number})" if each else "" for each in (row.first, row.last)]
    head = f"{row.last.lm_head:.3g}" if row.last else ""
    latency = f"{row.latency_s[0]:.2f} / {row.latency_s[1]:.2f} s" if row.latency_s else ""
    streams = "" if row.streams_per_core is None else f"{row.streams_per_core:.0f}"
    error = f"{unit_name(row.language)} {100 * row.errors.rate:.2f} %"
    counts = str(row.num_retractions), str(row.num_refused)
    return [row.system, row.language, error, *computes, head, latency, *counts, f"{row.rtf:.4f}", streams]


def markdown(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [headers, ["---"] * len(headers), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table) + "\n"


def flat_lines(found: Mapping[str, Flatness | None]) -> list[list[str]]:
    return [
        [name, f"{one.first:.4g}", f"{one.last:.4g}", f"{100 * one.drift:+.2f} %", f"{100 * one.spread:.2f} %"]
        for name, one in found.items()
        if one is not None
    ]


def to_json(
    systems: Mapping[str, Mapping[str, Any]], replays: Sequence[Replay], found: Sequence[Row], threads: int
) -> dict[str, Any]:
    """All figures: by system and language, by recording, by minute."""
    return {
        "contract": "streaming",
        "machine": machine(threads),
        "systems": dict(systems),
        "rows": [_with_rate(asdict(row), row.errors) for row in found],
        "recordings": [_recording(each) for each in replays],
    }


def _recording(replay: Replay) -> dict[str, Any]:
    fields = _with_rate(asdict(replay), replay.errors)
    latencies_s = fields.pop("latencies_s")
    return fields | {
        "rtf": replay.rtf,
        "latency_s": percentiles(latencies_s or ()),
        "num_words_timed": len(latencies_s or ()),
        "flatness": {name: one and asdict(one) for name, one in curves(replay).items()},
    }


def _with_rate(fields: dict[str, Any], errors: ErrorCounts) -> dict[str, Any]:
    return fields | {"error_rate": errors.rate if errors.num_reference else None}


def machine(threads: int) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions(_PACKAGES),
    }
