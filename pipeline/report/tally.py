"""Sums over an output's units, and the places of the rows worth showing: what a report keeps of rows it lets go."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.funnel import Funnel
from pipeline.units import UnitKey

Kind = Literal["kept", "filtered", "empty", "failed"]
"""What became of a segment: `kept` passed all filters, `filtered` has text that a filter caught."""
KINDS: tuple[Kind, ...] = get_args(Kind)

DrawnAs = Literal["random", "lowest confidence", "filtered", "empty", "failed"]
"""Why a row is among the samples; `random` ones are of those kept."""
DRAWN_AS: tuple[DrawnAs, ...] = get_args(DrawnAs)

TALLIED = ["duration", "avg_logprob", "language", "status", "error", "keep", "filter_reasons"]
"""The columns that a tally needs: numbers and codes, none of the texts and tokens."""

Position = tuple[str, int]
"""Unit name, row in it."""

_EXAMPLES = 3  # of a reason


class Histogram:
    """Counts by kind of values from 0 on, in bins fine enough to be drawn at any width and to read quantiles from.

    `counts` is int64 `[len(KINDS), num_bins]`. Bin `i` holds values in `(i, i + 1] * bin_width`, so that the segments
    of exactly the longest length share a bin with those just below; the first takes 0, the last all beyond it.
    """

    def __init__(self, bin_width: float, num_bins: int) -> None:
        self.bin_width = bin_width
        self.counts = np.zeros((len(KINDS), num_bins), np.int64)
        self.largest = 0.0

    def add(self, values: np.ndarray, kinds: np.ndarray) -> None:
        """Both `[num_values]`; `kinds` are indices into `KINDS`. NaN is not counted."""
        known = ~np.isnan(values)
        bins = np.clip(np.ceil(values[known] / self.bin_width - 1e-6) - 1, 0, self.counts.shape[1] - 1)
        np.add.at(self.counts, (kinds[known], bins.astype(np.int64)), 1)
        self.largest = max(self.largest, float(values[known].max(initial=0.0)))

    def quantile(self, q: float) -> float | None:
        """The middle of the bin where the share `q` of all values is reached; None without values."""
        sums = np.cumsum(self.counts.sum(axis=0))
        if sums[-1] == 0:
            return None
        return float((np.searchsorted(sums, q * sums[-1]) + 0.5) * self.bin_width)


def duration_histogram() -> Histogram:
    return Histogram(0.1, 12_000)  # seconds, up to the longest segment that a configuration allows


def confidence_histogram() -> Histogram:
    return Histogram(0.01, 1_000)  # of -avg_logprob


@dataclass(slots=True)
class Language:
    """Sums over a language's rows, times in seconds."""

    name: str
    audio_s: float = 0.0
    num_segments: int = 0
    num_kept: int = 0
    confidence: Histogram = field(default_factory=confidence_histogram)

    @property
    def median_logprob(self) -> float | None:
        median = self.confidence.quantile(0.5)
        return None if median is None else -median


@dataclass(slots=True)
class Shard:
    """Sums over a split's units, times in seconds; `busy_s` as in the run records."""

    first_unit: UnitKey
    name: str = ""
    num_units: int = 0
    audio_s: float = 0.0
    busy_s: float = 0.0
    num_failed: int = 0

    @property
    def busy_ratio(self) -> float:
        """Busy seconds a second of audio."""
        return self.busy_s / self.audio_s


@dataclass(slots=True)
class Run:
    """The units that one run committed; `started_at` is when its first unit's audio arrived, or earlier."""

    run_id: str
    started_at: float
    ended_at: float
    num_units: int = 0
    audio_s: float = 0.0

    @property
    def rtfx(self) -> float | None:
        wall_s = self.ended_at - self.started_at
        return self.audio_s / wall_s if wall_s > 0 else None


class _Smallest:
    """The positions of the `size` smallest scores among all that are offered."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[float, Position]] = []  # of negative scores: the largest is on top

    def offer(self, unit: str, rows: np.ndarray, scores: np.ndarray) -> None:
        """`scores[row]` for each of `rows`, int `[num_rows]`."""
        for row in rows[np.argsort(scores[rows])][: self._size].tolist():
            item = (-float(scores[row]), (unit, row))
            if len(self._heap) < self._size:
                heapq.heappush(self._heap, item)
            elif item > self._heap[0]:
                heapq.heapreplace(self._heap, item)

    def positions(self) -> list[Position]:
        return [position for _, position in sorted(self._heap, reverse=True)]


class Tally:
    """Sums over units, and the positions of rows to show."""

    def __init__(self, num_samples: int) -> None:
        self.kinds = np.zeros(len(KINDS), np.int64)
        self.durations, self.confidence = duration_histogram(), confidence_histogram()
        self.languages: dict[str, Language] = {}
        self.filters: Counter[str] = Counter()
        self.funnel = Funnel()
        self.shards: dict[str, Shard] = {}
        self.runs: dict[str, Run] = {}
        self.commits: list[tuple[float, float, float]] = []
        self.newest: dict[str, Any] = {"committed_at": 0.0}
        self.failed_by_reason: dict[str, _Smallest] = {}
        self._drawn: dict[DrawnAs, _Smallest] = {drawn_as: _Smallest(num_samples) for drawn_as in DRAWN_AS}

    def observing(self, units: Iterable[tuple[UnitKey, dict[str, Any], pa.Table]]) -> Iterator[dict[str, Any]]:
        """Adds up each unit as it passes, and yields its record."""
        for key, record, table in units:
            self._add_record(key, record)
            self._add_rows(key, table)
            yield record

    def draw(self, num_samples: int) -> list[tuple[Position, DrawnAs]]:
        """Some rows of every sort, a third of them or more random; a sort with too few leaves its place to others."""
        candidates = {drawn_as: rows.positions() for drawn_as, rows in self._drawn.items()}
        chosen: dict[Position, DrawnAs] = {}
        for drawn_as in DRAWN_AS[1:]:
            for position in candidates[drawn_as][: num_samples // 6]:
                chosen.setdefault(position, drawn_as)
        for drawn_as in DRAWN_AS:
            for position in candidates[drawn_as]:
                if len(chosen) < num_samples:
                    chosen.setdefault(position, drawn_as)
        return sorted(chosen.items(), key=lambda item: (DRAWN_AS.index(item[1]), item[0]))

    def _add_record(self, key: UnitKey, record: dict[str, Any]) -> None:
        committed_at, busy_s, audio_s = record["committed_at"], record["busy_s"], record["audio_s"]
        self.commits.append((committed_at, busy_s, audio_s))
        shard = self.shards.setdefault(key.split_id, Shard(key))
        shard.num_units += 1
        shard.audio_s += audio_s
        shard.busy_s += busy_s
        shard.num_failed += record["status"].get("failed", 0)
        run = self.runs.setdefault(record["run_id"], Run(record["run_id"], committed_at - busy_s, committed_at))
        run.started_at = min(run.started_at, committed_at - busy_s)
        run.ended_at = max(run.ended_at, committed_at)
        run.num_units += 1
        run.audio_s += audio_s
        if committed_at > self.newest["committed_at"]:
            self.newest = record

    def _add_rows(self, key: UnitKey, table: pa.Table) -> None:
        kinds = kinds_of(table)
        durations, logprobs = table["duration"].to_numpy(), table["avg_logprob"].to_numpy()
        self.kinds += np.bincount(kinds, minlength=len(KINDS))
        self.durations.add(np.where(durations > 0, durations, np.nan), kinds)  # a failed row may have no audio
        self.confidence.add(-logprobs, kinds)
        self.funnel.add(table)
        for pair in pc.value_counts(pc.list_flatten(table["filter_reasons"])).to_pylist():
            self.filters[pair["values"]] += pair["counts"]
        heard = kinds != KINDS.index("failed")
        for name, rows in _by_value(table["language"]):
            mine = rows & heard
            if mine.any():
                language = self.languages.setdefault(name or "none", Language(name or "none"))
                language.audio_s += float(durations[mine].sum())
                language.num_segments += int(mine.sum())
                language.num_kept += int((kinds[mine] == KINDS.index("kept")).sum())
                language.confidence.add(-logprobs[mine], kinds[mine])

        name, scores = key.name, np.random.default_rng(list(key.name.encode())).random(len(kinds))
        for drawn_as, kind in (("random", "kept"), ("filtered", "filtered"), ("empty", "empty"), ("failed", "failed")):
            self._drawn[drawn_as].offer(name, np.flatnonzero(kinds == KINDS.index(kind)), scores)  # type: ignore[index]
        has_text = kinds <= KINDS.index("filtered")
        self._drawn["lowest confidence"].offer(name, np.flatnonzero(has_text & ~np.isnan(logprobs)), logprobs)
        for reason, mine in _by_value(_reason_codes(table["error"])):
            self.failed_by_reason.setdefault(reason, _Smallest(_EXAMPLES)).offer(name, np.flatnonzero(mine), scores)


def kinds_of(table: pa.Table) -> np.ndarray:
    """Indices into `KINDS`, int `[num_rows]`."""
    status = {name: pc.equal(table["status"], name).to_numpy() for name in ("failed", "empty")}
    caught = [status["failed"], status["empty"], ~table["keep"].to_numpy()]
    return np.select(caught, [KINDS.index(kind) for kind in ("failed", "empty", "filtered")], KINDS.index("kept"))


def _by_value(column: pa.ChunkedArray) -> Iterator[tuple[str, np.ndarray]]:
    """Each value of a string column with the mask of its rows, bool `[num_rows]`; nulls are in none of them."""
    encoded = column.combine_chunks().dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy()
    for code, value in enumerate(encoded.dictionary.to_pylist()):
        yield value, codes == code


def _reason_codes(errors: pa.ChunkedArray) -> pa.ChunkedArray:
    """Of "<reason code>: <detail>" what is before the colon."""
    return pc.struct_field(pc.extract_regex(errors, "(?s)^(?P<code>[^:]*)"), "code")
