"""Where lines, bars and labels of the report's charts stand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.report import charts
from pipeline.report.gather import Report, gather
from pipeline.report.tally import KINDS, Histogram, confidence_histogram, duration_histogram
from pipeline.units import UnitKey
from tests.outputs import START, put, row, start

A, B = "a" * 16, "b" * 16


def report(folder: Path, *units: tuple[str, float, float, float], finished: bool = True) -> Report:
    """Of units given as (run id, committed at, busy seconds, audio seconds); START is when "run" was planned."""
    output = start(str(folder), {A: 5000.0})
    for group, (run_id, at, busy_s, audio_s) in enumerate(units):
        key = UnitKey(A, group, 0, "z" if finished and group == len(units) - 1 else "g")
        put(output, key, [row(duration=audio_s)], run_id=run_id, committed_at=START + at, busy_s=busy_s)
    return gather(output, {}, 0)


def numbers(path: str, letter: str) -> list[float]:
    return [float(value) for value in re.findall(rf"{letter}(-?[\d.]+)", path)]


def histogram_of(fine: Histogram, values: list[float], kind: str = "kept") -> Histogram:
    fine.add(np.array(values), np.full(len(values), KINDS.index(kind)))  # type: ignore[arg-type]
    return fine


def test_progress_steps_up_at_each_commit(tmp_path: Path) -> None:
    chart = charts.progress_chart(report(tmp_path, ("run", 25, 10, 30.0), ("run", 100, 10, 70.0)))
    assert numbers(chart.line, "H") == [25.0, 100.0], "percent of the time at work"
    assert numbers(chart.line, "V") == [70.0, 0.0] and chart.y_title == "seconds of audio"
    assert chart.level is None and chart.marks == []
    assert [tick.label for tick in chart.x_ticks] == ["0", "15 s", "30 s", "45 s", "60 s", "75 s", "90 s"]


def test_progress_of_an_unfinished_job_shows_what_is_planned(tmp_path: Path) -> None:
    found = report(tmp_path, ("run", 25, 10, 30.0), finished=False)
    chart = charts.progress_chart(found)
    assert found.summary.audio_planned_s > 3000.0
    assert chart.level is not None and 0 <= chart.level.at < numbers(chart.line, "V")[-1]


def test_the_pause_between_two_runs_is_cut_out(tmp_path: Path) -> None:
    week = 7 * 86_400
    chart = charts.progress_chart(report(tmp_path, ("old", -week, 60, 60.0), ("run", 60, 60, 60.0)))
    assert numbers(chart.line, "H") == [50.0, 100.0]
    assert [(mark.at, mark.label) for mark in chart.marks] == [(50.0, "7 d pause")]
    assert chart.x_ticks[-1].label == "120 s"


def test_two_runs_at_once_are_one_stretch_of_work(tmp_path: Path) -> None:
    chart = charts.progress_chart(report(tmp_path, ("other", 50, 60, 60.0), ("run", 100, 60, 60.0)))
    assert chart.marks == [] and numbers(chart.line, "H") == pytest.approx([60 / 1.1, 100.0], abs=0.01)


def test_speed_spreads_a_unit_over_its_time_and_keeps_its_audio(tmp_path: Path) -> None:
    chart = charts.speed_chart(report(tmp_path, ("run", 40, 40, 400.0), ("run", 60, 20, 800.0)))
    top = float(chart.y_ticks[-1].label.removesuffix("x"))
    speeds = [(100 - y) / 100 * top for y in numbers(chart.line, "V")]
    assert speeds[:40] == pytest.approx([10.0] * 40, abs=0.01) and speeds[40:] == pytest.approx([40.0] * 20, abs=0.01)
    assert chart.level is not None and (100 - chart.level.at) / 100 * top == pytest.approx(1200 / 60)


def test_one_unit_that_took_no_time_gives_charts(tmp_path: Path) -> None:
    found = report(tmp_path, ("run", 0, 0.0, 5.0))
    for chart in (charts.progress_chart(found), charts.speed_chart(found)):
        assert "nan" not in chart.line and "inf" not in chart.line and len(chart.x_ticks) >= 1


def test_a_line_of_many_commits_stays_short(tmp_path: Path) -> None:
    found = report(tmp_path, ("run", 10, 1, 1.0))
    at = START + np.arange(100_000) / 10_000
    commits = np.stack([at, np.ones(100_000), np.ones(100_000)], axis=1)
    object.__setattr__(found, "commits", commits)
    chart = charts.progress_chart(found)
    assert 300 < len(numbers(chart.line, "H")) <= 400 and numbers(chart.line, "V")[-1] == pytest.approx(
        100 - 100 / 3 * 27.78 / 10, abs=0.1
    )


def test_segments_of_the_longest_length_have_no_bar_of_their_own() -> None:
    chart = charts.duration_chart(histogram_of(duration_histogram(), [0.5, 29.5, 30.0, 30.0]))
    assert [bar.title for bar in chart.bars] == ["0 to 1 s: 1 kept", "29 to 30 s: 3 kept"]
    assert chart.bars[-1].x + 100 / 30 == pytest.approx(100.0) and chart.x_ticks[-1].label == "30"


def test_bars_stack_by_kind_without_overlap() -> None:
    histogram = histogram_of(duration_histogram(), [2.5] * 6)
    chart = charts.duration_chart(histogram_of(histogram, [2.5] * 2, "failed"))
    below, above = chart.bars
    assert (below.kind, above.kind) == ("kept", "failed") and below.title == above.title
    assert above.y + above.height == pytest.approx(below.y) and below.y + below.height == pytest.approx(100.0)
    assert below.height == pytest.approx(3 * above.height)


def test_one_among_a_million_is_seen() -> None:
    histogram = duration_histogram()
    histogram.counts[KINDS.index("kept"), 20] = 1_000_000
    chart = charts.duration_chart(histogram_of(histogram, [9.0], "failed"))
    assert min(bar.height for bar in chart.bars) >= 0.8 and chart.y_ticks[-1].label == "1M"


def test_confidence_runs_up_to_zero_with_the_filter_marked_and_the_tail_in_one_bar() -> None:
    histogram = histogram_of(confidence_histogram(), [0.1] * 995 + [1.9] * 4 + [9.0])
    chart = charts.confidence_chart(histogram, -1.0)
    assert chart.x_ticks[-1].label == "0" and chart.x_ticks[-1].at == 100.0
    assert chart.marks == [], "the filter is beyond what is shown"
    assert chart.bars[0].title.endswith(": 5 kept") and "or less" in chart.bars[0].title
    wide = charts.confidence_chart(histogram_of(confidence_histogram(), [0.1] * 90 + [1.9] * 10), -1.0)
    (mark,) = wide.marks
    limit = float(wide.x_ticks[0].label.replace("−", "-")) / (wide.x_ticks[0].at / 100 - 1)
    assert mark.label == "filter −1" and mark.at == pytest.approx(100 * (1 - 1 / limit))


@pytest.mark.parametrize("value", [0.0001, 0.004, 0.3, 1.0, 9.99])
def test_any_confidence_gives_a_chart_with_all_segments(value: float) -> None:
    chart = charts.confidence_chart(histogram_of(confidence_histogram(), [value] * 7), None)
    assert [bar.title.rpartition(": ")[2] for bar in chart.bars] == ["7 kept"]
    assert 0 <= chart.bars[0].x < 100
