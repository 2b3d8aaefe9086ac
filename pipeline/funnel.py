"""The funnel: how many rows, and hours, each filter takes out of an output, by language.

Filters are asked in the order of `schema.REASONS`; a row leaves at the first that catches it, so that what is left
after the last one is what is kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from pipeline.output import Output
from pipeline.progress import duration
from pipeline.schema import REASONS

COLUMNS = ["duration", "language", "filter_reasons"]
ALL = "all"


@dataclass(frozen=True, slots=True)
class Step:
    """A filter: rows that it `caught` whatever others did, rows that left at it, and rows and seconds still there."""

    reason: str
    num_caught: int
    num_removed: int
    num_left: int
    left_s: float


@dataclass(slots=True)
class _Sums:
    """Arrays `[len(REASONS)]` of rows and seconds."""

    num_rows: int
    audio_s: float
    caught: np.ndarray
    removed: np.ndarray
    removed_s: np.ndarray

    @classmethod
    def empty(cls) -> _Sums:
        return cls(0, 0.0, *(np.zeros(len(REASONS), dtype) for dtype in (np.int64, np.int64, np.float64)))


class Funnel:
    """Sums over units; `languages` are by name, "none" for rows without one, and `ALL`."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {ALL: _Sums.empty()}

    def add(self, table: pa.Table) -> None:
        """`table` holds `COLUMNS`."""
        durations = table["duration"].to_numpy()
        reasons = table["filter_reasons"].combine_chunks()
        size = len(REASONS) + 1  # the last: a reason of another version, which is no filter here
        codes = pc.index_in(reasons.flatten(), pa.array(REASONS)).fill_null(len(REASONS)).to_numpy()
        rows = pc.list_parent_indices(reasons).to_numpy()
        first = np.full(len(durations), len(REASONS))
        np.minimum.at(first, rows, codes)
        names = np.array([name or "none" for name in table["language"].to_pylist()], dtype=object)
        for name in (ALL, *dict.fromkeys(names)):
            mine = np.ones(len(names), bool) if name == ALL else names == name
            sums = self._sums.setdefault(name, _Sums.empty())
            sums.num_rows += int(mine.sum())
            sums.audio_s += float(durations[mine].sum())
            sums.caught += np.bincount(codes[mine[rows]], minlength=size)[:-1]
            sums.removed += np.bincount(first[mine], minlength=size)[:-1]
            sums.removed_s += np.bincount(first[mine], durations[mine], minlength=size)[:-1]

    @property
    def languages(self) -> list[str]:
        """`ALL`, then those with the most audio first."""
        return sorted(self._sums, key=lambda name: (name != ALL, -self._sums[name].audio_s, name))

    def total(self, language: str = ALL) -> tuple[int, float]:
        """Rows and seconds before the first filter."""
        return self._sums[language].num_rows, self._sums[language].audio_s

    def steps(self, language: str = ALL) -> list[Step]:
        """One a filter, in order."""
        sums = self._sums[language]
        num_left, left_s = sums.num_rows - np.cumsum(sums.removed), sums.audio_s - np.cumsum(sums.removed_s)
        columns = (REASONS, sums.caught, sums.removed, num_left, left_s)
        return [
            Step(reason, int(caught), int(removed), int(left), max(float(seconds), 0.0))
            for reason, caught, removed, left, seconds in zip(*columns, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """By language: rows and seconds before the filters, and each filter's step."""
        return {
            name: {
                "num_rows": self.total(name)[0],
                "audio_s": round(self.total(name)[1], 3),
                "steps": [asdict(step) | {"left_s": round(step.left_s, 3)} for step in self.steps(name)],
            }
            for name in self.languages
        }


def read_funnel(output: Output) -> Funnel:
    """The funnel of all that is committed. Raises ConfigError when no job has written there."""
    output.read_plan()
    funnel = Funnel()
    keys = sorted(key for done in output.committed().values() for key in done.keys)
    for _, _, table in output.tables(keys, COLUMNS):
        funnel.add(table)
    return funnel


def print_funnel(funnel: Funnel, console: Console) -> None:
    """A table a language; filters that caught nothing anywhere are named below."""
    caught_any = [step.reason for step in funnel.steps() if step.num_caught]
    languages = funnel.languages
    for name in languages[:1] if len(languages) == 2 else languages:
        num_rows, audio_s = funnel.total(name)
        title = "all languages" if name == ALL else name
        table = Table("filter", title=title, title_justify="left", box=None, pad_edge=False)
        for heading in ("caught", "removed", "rows left", "audio left", "%"):
            table.add_column(heading, justify="right")
        table.add_row("", "", "", f"{num_rows:,}", duration(audio_s), "100.0" if num_rows else "")
        for step in funnel.steps(name):
            if step.reason in caught_any:
                share = f"{100 * step.num_left / num_rows:.1f}"
                counts = (f"{number:,}" for number in (step.num_caught, step.num_removed, step.num_left))
                table.add_row(step.reason, *counts, duration(step.left_s), share)
        console.print(table)
        console.print()
    nothing = [reason for reason in REASONS if reason not in caught_any]
    console.print(f"caught nothing: {', '.join(nothing) or 'none'}", highlight=False, soft_wrap=True)
