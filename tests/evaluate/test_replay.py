"""Replays under the streaming contract, of fakes: the clock, what is published and when, what is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.evaluate import streaming_report as report
from pipeline.evaluate.contract import Contract, Update, without_tail
from pipeline.evaluate.replay import Minute, Talk, count, counted_minutes, measure, replay

SECOND = 16_000
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
SENTENCES = [{"text": " ".join(WORDS), "offset": 0.0, "duration": 8.0}]


class Clock:
    """Seconds of work that fakes do."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """Says the words of each second of audio once it is over, after `work_s` (of the number of the chunk) of work."""

    name = "fake"
    about: dict[str, Any] = {}

    def __init__(self, clock: Clock, work_s: Callable[[int], float] = lambda _: 0.0) -> None:
        self.lm_head = nn.Linear(4, 8, bias=False)
        self._clock, self._work_s = clock, work_s

    def begin(self, language: str) -> None:
        self.num_samples = self.num_chunks = 0

    def hear(self, pcm: np.ndarray) -> list[Update]:
        self._clock.now += self._work_s(self.num_chunks)
        self.num_chunks += 1
        self.num_samples += len(pcm)
        with torch.no_grad():
            self.lm_head(torch.ones(3, 4))
        return [self.update(self.num_samples // SECOND)] if self.num_samples % SECOND == 0 else []

    def end(self) -> list[Update]:
        self._clock.now += 2.0
        return [replace(self.update(len(WORDS)), is_final=True)]

    def update(self, seconds: int) -> Update:
        return Update(0.0, float(seconds), " ".join(WORDS[:seconds]), word_ends_s=self.ends(seconds))

    def ends(self, seconds: int) -> list[float]:
        return [second - 0.3 for second in range(1, seconds + 1)]


def talk(seconds: float = 8.0, sentences: Any = SENTENCES) -> Talk:
    return Talk("talk", "English", " ".join(WORDS), np.zeros(int(seconds * SECOND), np.int16), sentences)


def published_at(found: Fake, clock: Clock) -> list[float]:
    """When the words of a talk come out."""
    result = replay(found, talk(), 1.0, clock)
    assert result.text == " ".join(WORDS) and result.errors.rate == 0
    spoken = np.cumsum([len(word) for word in WORDS]) / len("".join(WORDS)) * 8
    assert result.latencies_s is not None
    return [round(float(latency + end), 6) for latency, end in zip(result.latencies_s, spoken, strict=True)]


def test_work_begins_when_its_audio_is_there_and_what_came_before_is_done() -> None:
    clock = Clock()
    assert published_at(Fake(clock), clock) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert published_at(Fake(clock, lambda _: 0.25), clock) == [1.25, 2.25, 3.25, 4.25, 5.25, 6.25, 7.25, 8.25]
    stalls = Fake(clock, lambda number: 3.5 if number == 1 else 0.5)
    assert published_at(stalls, clock) == [1.5, 5.5, 6, 6.5, 7, 7.5, 8, 8.5], (
        "3.5 s behind, it catches up half a s each"
    )


def test_time_is_by_minute_and_the_end_is_its_own() -> None:
    clock = Clock()
    result = replay(Fake(clock, lambda number: 0.5 if number < 60 else 0.25), talk(90.0), 1.0, clock)
    assert [(minute.audio_s, minute.compute_s) for minute in result.minutes] == [(60.0, 30.0), (30.0, 7.5)]
    assert result.end_s == 2.0 and result.rtf == pytest.approx(39.5 / 90)
    assert (
        all(minute.rss_bytes > 1e7 for minute in result.minutes)
        and result.peak_rss_bytes >= result.minutes[0].rss_bytes
    )


def test_words_that_end_in_the_newest_250_ms_come_with_the_next_update() -> None:
    class Late(Fake):
        def ends(self, seconds: int) -> list[float]:
            return [second - 0.2 for second in range(1, seconds + 1)]

    clock = Clock()
    assert published_at(Late(clock), clock) == [2, 3, 4, 5, 6, 7, 8, 10.0], "the last one with the end"


def test_what_was_rewritten_is_counted_and_not_shown() -> None:
    class Rewrites(Fake):
        def update(self, seconds: int) -> Update:
            said = super().update(seconds)
            return replace(said, text=said.text.replace("two", "too")) if seconds in (4, 5) else said

    clock = Clock()
    result = replay(Rewrites(clock), talk(), 1.0, clock)
    assert (result.num_retractions, result.num_refused, result.num_updates) == (2, 2, 9)
    assert result.text == " ".join(WORDS) and result.errors.rate == 0

    class Retracts(Fake):
        def end(self) -> list[Update]:
            return [Update(0.0, 8.0, "one two four", is_final=True)]

    result = replay(Retracts(clock), talk(), 1.0, clock)
    assert (result.num_retractions, result.num_refused) == (1, 0), "the last update counts, too"
    assert result.text.startswith(" ".join(WORDS))


def test_a_system_may_hold_back_more_than_the_contract() -> None:
    held = Update(3.0, 3.0, "one two three", held_from=3)
    assert held.offered == "one" and without_tail(held) == "one"
    assert without_tail(replace(held, word_ends_s=[2.8, 2.9, 3.0])) == "", "and the contract more than a system"
    assert Contract().take(replace(held, is_final=True)) == "one two three", "the end flushes"


def test_operations_are_counted_in_some_minutes_by_a_second_pass() -> None:
    clock = Clock()
    meters = count(Fake(clock), talk(180.0), [0, 2], 1.0)
    a_chunk = 2 * 3 * 4 * 8
    assert {number: (meter.total, meter.lm_head) for number, meter in meters.items()} == {
        0: (60 * a_chunk, 60 * a_chunk),
        2: (60 * a_chunk, 60 * a_chunk),
    }
    assert counted_minutes(61, 60, 10) == [0, 9, 19, 29, 39, 49, 59]
    assert counted_minutes(1, 0, 10) == [0] and counted_minutes(3, 2, 10) == [0, 1]
    found = measure(Fake(Clock()), talk(130.0))
    assert [minute.flops for minute in found.minutes] == [600 * a_chunk, 600 * a_chunk, None]


def test_flat_is_flat() -> None:
    flat = report.flatness([2.0, 2.0, 2.0])
    assert flat is not None and (flat.first, flat.drift, flat.spread) == (2.0, pytest.approx(0), 0.0)
    rising = report.flatness([1.0, 2.0, 3.0])
    assert rising is not None and (rising.drift, rising.spread) == (pytest.approx(1.0), 1.0)
    assert report.flatness([1.0]) is None
    assert report.computes_of([Minute(60.0, flops=int(6e10), lm_head_flops=int(6e9)), Minute(60.0)]) == [
        report.Compute(1, 1.0, 0.1)
    ]
