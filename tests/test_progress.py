from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipeline import progress as module
from pipeline.commit import Receipt
from pipeline.progress import LOG_EVERY_S, Progress, duration


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def receipt(audio_s: float, num_failed: int = 0, num_retries: int = 0) -> Receipt:
    return Receipt("unit", True, audio_s, 9, num_failed, num_retries)


def test_the_line_before_and_after_units(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    progress = Progress(Console(file=io.StringIO()), expected_s=1000)
    clock.now += 5
    assert progress.line() == (
        "0 units · 0 s of ~16 min 40 s audio · 0.0x real time · 5 s elapsed · ETA after the first unit"
    )
    progress.add(receipt(150))
    progress.add(receipt(50, num_failed=2))
    clock.now += 5
    assert progress.line() == (
        "2 units · 3 min 20 s of ~16 min 40 s audio · 2 failed · 20.0x real time · 10 s elapsed · ETA 40 s"
    )
    progress.add(receipt(0, num_retries=3))
    progress.add(receipt(0, num_retries=4))
    assert " · 2 failed · 7 storage retries · " in progress.line() and progress.num_retries == 7


def test_an_estimate_that_was_passed_leaves_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    progress = Progress(Console(file=io.StringIO()), expected_s=100)
    progress.add(receipt(150))
    clock.now += 10
    assert progress.line().endswith("ETA 0 s")


def test_a_log_gets_a_plain_line_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    screen = io.StringIO()
    with Progress(Console(file=screen, width=40), expected_s=100) as progress:
        progress.add(receipt(1))
        assert screen.getvalue() == "", "too early"
        clock.now += LOG_EVERY_S
        progress.add(receipt(1))
        progress.add(receipt(1))
        clock.now += LOG_EVERY_S / 2
        progress.add(receipt(1))
    lines = screen.getvalue().splitlines()
    assert len(lines) == 1 and lines[0].startswith("2 units · ") and "\x1b" not in lines[0]


def test_a_terminal_gets_a_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    with Progress(Console(file=screen, force_terminal=True, width=120), expected_s=100) as progress:
        progress.add(receipt(30))
    assert "1 units · 30 s of ~1 min 40 s audio" in screen.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (725, "12 min 5 s"),
        (3599.7, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (3_600_000, "1,000 h 0 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(0, 1e9, allow_subnormal=False))
def test_a_duration_is_never_off_by_more_than_its_last_unit(seconds: float) -> None:
    units = {"h": 3600, "min": 60, "s": 1}
    parts = re.findall(r"([\d,]+) (h|min|s)", duration(seconds))
    read = sum(int(number.replace(",", "")) * units[unit] for number, unit in parts)
    assert abs(read - seconds) <= units[parts[-1][1]]
    assert all(int(number) < 60 for number, unit in parts if unit != "h")
