"""Rows that repeat themselves, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.engine.loops import LoopFinder


def found_at(tokens: Sequence[int]) -> int | None:
    """Which token of a row makes it a loop; None when none does."""
    finder = LoopFinder(3)
    finder.begin(np.array([1]), np.array(tokens[:1]))
    for number, token in enumerate(tokens[1:], start=1):
        if finder.add(np.array([-number, token, number]))[1]:
            return number
    return None


@pytest.mark.parametrize("period", [1, 2, 7, 12, 13, 20, 32])
def test_a_loop_is_found_after_some_repeats(period: int) -> None:
    lead = [1000 + i for i in range(17)]
    tokens = lead + [i % period for i in range(400)]
    first_round = len(lead) + period
    assert found_at(tokens) == first_round + max(4 * period, 48) - 1


@pytest.mark.parametrize(
    "tokens",
    [
        [7] * 40,
        [1, 2, 3] * 16,
        list(range(20)) * 4,
        [i // 2 for i in range(300)],
        [*([5] * 30), 6, *([5] * 30)],
        list(range(33)) * 9,
    ],
    ids=["one token 40 times", "three 16 times", "twenty 4 times", "each twice", "broken in the middle", "too long"],
)
def test_what_is_no_loop(tokens: list[int]) -> None:
    assert found_at(tokens) is None


def test_a_new_row_does_not_go_on_with_the_last_ones_loop() -> None:
    finder = LoopFinder(1)
    finder.begin(np.array([0]), np.array([3]))
    for _ in range(40):
        assert not finder.add(np.array([3]))[0]
    finder.begin(np.array([0]), np.array([3]))
    assert [bool(finder.add(np.array([3]))[0]) for _ in range(48)] == [False] * 47 + [True]


def test_rows_take_their_history_along() -> None:
    finder, other = LoopFinder(2), LoopFinder(1)
    finder.begin(np.array([0, 1]), np.array([1, 2]))
    for number in range(40):
        finder.add(np.array([number, 2]))
    finder.move(np.array([1]), np.array([0]))
    other.move(np.array([0]), np.array([0]), finder)
    for row in (finder, other):
        assert [bool(row.add(np.array([2]))[0]) for _ in range(8)] == [False] * 7 + [True]
