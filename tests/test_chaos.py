"""Kill each part of a running job once, on a cluster and an object store; and how the harness judges what it finds."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import radosgw
from tests.chaos import ROOT, deck
from tests.chaos_findings import (
    SAME,
    VICTIMS,
    Difference,
    Kill,
    Victim,
    blame,
    compare,
    may_be_redone,
    most_in_flight,
    table,
)
from tests.counted import Event


def row(segment_id: str, **values: Any) -> dict[str, Any]:
    return dict.fromkeys(SAME, "") | {"segment_id": segment_id} | values


def kill_at(at: float, victim: Victim = "engine", pids: Sequence[int] = ()) -> Kill:
    return Kill(1, victim, at, "", list(pids))


def begun(at: float, unit: str, pid: int = 1) -> Event:
    return Event("begun", at, unit, 5.0, pid)


def ended(at: float, unit: str, pid: int = 1) -> Event:
    return Event("ended", at, unit, 5.0, pid)


@pytest.mark.timeout(1800)  # two minutes on two idle cores
def test_each_victim_once(tmp_path: Path) -> None:
    missing = radosgw.missing_programs()
    if missing:
        pytest.skip(f"radosgw: no {', '.join(missing)} here; apt-get install {radosgw.PACKAGES}")
    command = [sys.executable, "-m", "tests.chaos", "--kills", str(len(VICTIMS)), "--seed", "3", "--out", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        try:
            said, _ = run.communicate()
        finally:
            run.terminate()  # it ends its cluster and its store then; killed, it could not
    print(said)
    assert run.returncode == 0, "no violation, and as many kills as asked for"
    found = json.loads((tmp_path / "kills.json").read_text())
    assert sorted(kill["victim"] for kill in found["kills"]) == sorted(VICTIMS)


def test_rows_are_compared_with_those_of_an_undisturbed_run() -> None:
    expected = [row("a", text="one"), row("b", text="two")]
    assert not compare(expected[::-1], expected)
    assert compare([row("a", text="one")], expected) == Difference(1, 0, 0)
    assert compare([*expected, expected[0]], expected) == Difference(0, 1, 0)
    assert compare([row("a", text="one"), row("b", text="too")], expected) == Difference(0, 0, 1)
    assert compare([*expected, row("c")], expected) == Difference(0, 0, 1), "none of these rows should be there"


def test_a_unit_decoded_again_is_booked_on_the_kill_that_hit_it() -> None:
    kills = [kill_at(5, pids=[1]), kill_at(15, pids=[2])]
    events = [begun(0, "a", 1), begun(6, "b", 2), begun(8, "a", 2), ended(9, "a", 2), begun(17, "b", 3)]
    assert blame(events, kills) == []
    assert [kill.redone for kill in kills] == [[("a", 5.0)], [("b", 5.0)]]
    assert kills[0].redone_s == 5


def test_a_unit_that_two_kills_met_is_booked_on_the_first() -> None:
    kills = [kill_at(5, "driver"), kill_at(6, "raylet", [1])]
    assert blame([begun(0, "a", 1), begun(8, "a", 2)], kills) == []
    assert [len(kill.redone) for kill in kills] == [1, 0]


def test_a_unit_decoded_again_without_need_has_no_excuse() -> None:
    again = [begun(0, "a", 1), begun(8, "a", 2)]
    assert blame(again, [kill_at(5, pids=[3])]), "another actor was killed"
    assert blame(again, [kill_at(9, pids=[1])]), "the kill came later"
    assert blame([again[0], ended(3, "a", 1), again[1]], [kill_at(5, "driver")]), "it was committed before the kill"
    assert not blame([again[0], ended(6, "a", 1), again[1]], [kill_at(5, "driver")]), "the actor outlived its driver"
    assert not blame([begun(5.1, "a"), again[1]], [kill_at(5, "driver")]), "and so began a unit"
    assert blame([begun(5.1, "a"), again[1]], [kill_at(5, pids=[1])]), "which a killed actor cannot"


def test_a_kill_may_cost_what_was_in_the_engines_that_it_ended() -> None:
    costs = [may_be_redone(victim, engines=3, units_in_flight=2) for victim in VICTIMS]
    assert costs == [6, 2, 0, 6, 0]


def test_the_table_sums_up_by_victim() -> None:
    kills = [kill_at(1, "driver"), kill_at(2, "driver"), kill_at(3, "store")]
    kills[0].outcome = "killed, run again"
    kills[1].redone = [("a", 5.0), ("b", 2.5)]
    lines = {line.split()[0]: line.split()[1:] for line in table(kills).splitlines()}
    assert lines["driver"] == ["2", "1", "0", "0", "0", "2", "7.5", "s", "2"]
    assert lines["all"] == ["3", "1", "0", "0", "0", "2", "7.5", "s", "2"]
    assert lines["engine"][0] == "0"


def test_units_in_flight_are_counted_by_actor() -> None:
    events = [begun(0, "a"), begun(1, "b"), begun(1, "c", pid=2), ended(2, "a"), begun(3, "d")]
    assert most_in_flight(events) == 2
    assert most_in_flight([*events, begun(4, "e")]) == 3


def test_the_deck_holds_every_victim_as_often_as_the_others() -> None:
    counts = Counter(deck(103, random.Random(1)))
    assert counts.keys() == set(VICTIMS) and set(counts.values()) == {20, 21}
    assert deck(10, random.Random(1)) == deck(10, random.Random(1)) != deck(10, random.Random(2))
