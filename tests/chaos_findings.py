"""What a kill did to a job: rows lost, doubled or different, and units decoded again; and whether that may be."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.counted import Event

Victim = Literal["driver", "engine", "read", "raylet", "store"]
VICTIMS: tuple[Victim, ...] = ("driver", "engine", "read", "raylet", "store")
Row = dict[str, Any]
SAME = ("segment_id", "recording_id", "offset", "duration", "text", "text_raw", "sentences", "language", "token_ids",
        "finish_reason", "status", "error", "text_ref", "language_ref", "unit_id")  # fmt: skip
"""Columns that a kill may not change. Log-probabilities follow, in the last digits, what else was in a batch."""

_HEARD_S = 1.0  # until an actor knows that its driver is gone; a new driver takes longer to come


@dataclass
class Kill:
    """`at` in seconds since the epoch; `moment` says where the job stood, `pids` which processes were killed with it,
    `outcome` what the job did; `redone` are the units that were decoded again and their audio in seconds."""

    number: int
    victim: Victim
    at: float
    moment: str
    pids: list[int]
    outcome: str = "the job went on"
    redone: list[tuple[str, float]] = field(default_factory=list)
    lost: int = 0
    doubled: int = 0
    different: int = 0

    @property
    def redone_s(self) -> float:
        return sum(seconds for _, seconds in self.redone)

    def __str__(self) -> str:
        again = f"; {len(self.redone)} units ({self.redone_s:.1f} s) decoded again" if self.redone else ""
        return f"{self.number:4} {self.victim:<6} {self.moment}: {self.outcome}{again}"


@dataclass
class Difference:
    lost: int
    doubled: int
    different: int

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled or self.different)


def compare(rows: Sequence[Row], expected: Sequence[Row]) -> Difference:
    """How `rows` differ from those of an undisturbed run; a row that is not among those counts as different."""
    right = {row["segment_id"]: row for row in expected}
    found = Counter(row["segment_id"] for row in rows)
    different = sum(
        any(row[name] != right[row["segment_id"]][name] for name in SAME) if row["segment_id"] in right else True
        for row in rows
    )
    return Difference(len(right.keys() - found.keys()), sum(found.values()) - len(found), different)


def blame(events: Sequence[Event], kills: Sequence[Kill]) -> list[str]:
    """Books every unit that was decoded again on the kill that made it so; returns what no kill explains.

    That kill came between the unit's beginning and its end and was the driver's or that of the actor it was in. What
    the driver had sent to an actor may begin a moment after the driver's end.
    """
    unexplained = []
    lives: dict[str, tuple[Event, float]] = {}  # unit -> its newest beginning, and its end
    for event in events:
        if event.what == "ended":
            lives[event.unit] = (lives[event.unit][0], event.at)
            continue
        if event.unit in lives:
            begun, ended_at = lives[event.unit]
            until = min(ended_at, event.at)
            if kill := next((each for each in kills if each.at < until and _hit(each, begun)), None):
                kill.redone.append((event.unit, event.audio_s))
            else:
                unexplained.append(f"unit {event.unit} was decoded again, and no kill says why")
        lives[event.unit] = (event, math.inf)
    return unexplained


def _hit(kill: Kill, begun: Event) -> bool:
    """True when a unit begun so was, at the kill or by its doing, in an actor that the kill ended."""
    if kill.victim == "driver":
        return begun.at < kill.at + _HEARD_S
    return begun.at < kill.at and begun.pid in kill.pids


def may_be_redone(victim: Victim, engines: int, units_in_flight: int) -> int:
    """How many units a kill may cost at most: those in the engines that it ends."""
    return {"driver": engines, "raylet": engines, "engine": 1}.get(victim, 0) * units_in_flight


def most_in_flight(events: Sequence[Event]) -> int:
    """Units that one engine actor had begun and not ended, at most."""
    most = 0
    units: dict[int, set[str]] = defaultdict(set)
    for event in events:
        if event.what == "begun":
            units[event.pid].add(event.unit)
        else:
            units[event.pid].discard(event.unit)
        most = max(most, len(units[event.pid]))
    return most


def table(all_kills: Sequence[Kill]) -> str:
    heads = ("victim", "kills", "run again", "lost", "doubled", "different", "units redone", "audio redone", "most")
    lines = ["  ".join(f"{head:>12}" for head in heads)]
    for victim in (*VICTIMS, "all"):
        kills = [each for each in all_kills if victim in (each.victim, "all")]
        figures = (
            len(kills),
            sum(each.outcome.endswith("run again") for each in kills),
            sum(each.lost for each in kills),
            sum(each.doubled for each in kills),
            sum(each.different for each in kills),
            sum(len(each.redone) for each in kills),
            f"{sum(each.redone_s for each in kills):.1f} s",
            max((len(each.redone) for each in kills), default=0),
        )
        lines.append("  ".join(f"{figure:>12}" for figure in (victim, *figures)))
    return "\n".join(lines)
