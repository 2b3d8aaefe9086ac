"""What `status` says, from committed objects and a plan made by hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline import summary as module
from pipeline.commit import to_parquet
from pipeline.config import ConfigError
from pipeline.output import Output, PlannedSplit, RunPlan
from pipeline.summary import print_summary, summarize, summary_lines
from pipeline.units import End, UnitKey

A, B = "a" * 16, "b" * 16
START = 1_000_000.0


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(str(tmp_path), {})


def plan(output: Output, run_id: str = "run", **splits: float) -> None:
    named = [PlannedSplit({"a": A, "b": B}[name], seconds) for name, seconds in splits.items()]
    output.write_plan(RunPlan(run_id, START, 60.0, named))


def put(output: Output, split: str, group: int, end: End, **record: Any) -> None:
    """Commit a unit with nothing but its record."""
    key = UnitKey(split, group, 0, end)
    values = {
        "run_id": "run",
        "committed_at": START + 10,
        "audio_s": 50.0,
        "num_recordings": 3,
        "num_segments": 4,
        "num_retries": 0,
        "status": {"ok": 4},
        "errors": {},
        "audio_s_by_language": {"English": 50.0},
    }
    output.commit_unit(key, to_parquet([], values | record))


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(module.time, "time", lambda: START + seconds)


def test_nothing_of_ours_there(output: Output) -> None:
    with pytest.raises(ConfigError, match="holds no plan.json"):
        summarize(output)


def test_before_the_first_commit(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(output, a=300.0, b=10.0)
    at(monkeypatch, 30)
    found = summarize(output)
    assert (found.splits_planned, found.splits_complete, found.units_committed) == (2, 0, 0)
    assert found.units_planned == 5 + 1, "300 s in units of 60 s, and at least one"
    assert not found.is_complete and not found.is_exact
    assert found.rtfx is None and found.eta_s is None and found.audio_planned_s == 310.0
    assert "segments   none yet" in summary_lines(found)


def test_sums_over_complete_units(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(output, a=90.0, b=60.0)
    put(output, A, 0, "g", committed_at=START + 5)
    put(output, A, 1, "z", status={"ok": 2, "empty": 1}, audio_s_by_language={"English": 10.0, "Chinese": 60.0})
    put(
        output,
        B,
        0,
        "z",
        status={"ok": 1, "failed": 3},
        errors={"not_audio": 1, "truncated": 2},
        num_retries=3,
        committed_at=START + 25,
    )
    at(monkeypatch, 10_000)
    found = summarize(output)
    assert found.is_complete and found.is_exact and found.eta_s == 0.0
    assert (found.units_planned, found.units_committed, found.splits_complete) == (3, 3, 2)
    assert found.status == {"ok": 7, "empty": 1, "failed": 3} and found.num_failed == 3
    assert list(found.errors.items()) == [("truncated", 2), ("not_audio", 1)], "most frequent first"
    assert found.audio_s_by_language == {"English": 110.0, "Chinese": 60.0}
    assert (found.num_recordings, found.num_segments, found.num_retries) == (9, 12, 3)
    assert "storage    3 requests made again to read the inputs" in summary_lines(found)
    assert found.audio_s == 150.0 == found.audio_planned_s, "no estimate is left once all is there"
    assert found.rtfx == pytest.approx(150 / 25), "until the last commit, not until now"


def test_a_split_in_the_making_is_estimated(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(output, a=300.0, b=60.0)
    put(output, A, 0, "g")
    put(output, A, 1, "g")
    at(monkeypatch, 50)
    found = summarize(output)
    assert not found.is_complete and not found.is_exact
    assert found.units_planned == 5 + 1 and found.units_committed == 2
    assert found.audio_planned_s == pytest.approx(100 + 300 * 3 / 5 + 60)
    assert found.rtfx == pytest.approx(2.0) and found.eta_s == pytest.approx((180 + 60) / 2.0)


def test_more_units_than_expected_mean_at_least_one_more(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(output, a=60.0)
    for group in range(4):
        put(output, A, group, "g")
    at(monkeypatch, 100)
    found = summarize(output)
    assert found.units_planned == 5 and found.audio_planned_s == found.audio_s == 200.0 and found.eta_s == 0.0


def test_a_gap_is_not_complete(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(output, a=180.0)
    put(output, A, 0, "g")
    put(output, A, 2, "z")
    at(monkeypatch, 100)
    found = summarize(output)
    assert not found.is_complete and found.splits_complete == 0


def test_speed_is_that_of_the_newest_run(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(output, run_id="second", a=100.0)
    put(output, A, 0, "g", run_id="first", audio_s=1e6, committed_at=START - 5000)
    at(monkeypatch, 20)
    assert summarize(output).rtfx is None and summarize(output).audio_s == 1e6
    put(output, A, 1, "g", run_id="second", audio_s=50.0)
    assert summarize(output).rtfx == pytest.approx(50 / 20)


def test_what_is_printed(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(output, a=300.0)
    put(output, A, 0, "g", status={"ok": 1234, "failed": 2}, errors={"truncated": 2})
    at(monkeypatch, 25)
    screen = io.StringIO()
    print_summary(summarize(output), Console(file=screen, width=40))
    assert screen.getvalue().splitlines() == [
        "units      1 committed of ~5 planned (0 of 1 splits complete)",
        "audio      50 s of ~4 min 50 s · 3 recordings · 4 segments",
        "segments   2 failed, 1,234 ok",
        "failures   2 truncated",
        "languages  English 50 s",
        "speed      2.0x real time in the newest run · ETA 2 min 0 s",
    ]
    for group in range(1, 5):
        put(output, A, group, "z" if group == 4 else "g")
    lines = summary_lines(summarize(output))
    assert lines[0] == "units      5 committed of 5 planned (1 of 1 splits complete)"
    assert "ETA" not in lines[-1] and "~" not in "".join(lines)
