"""Intervals and p-values against what theory says of made-up errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pipeline.evaluate.stats import difference, interval, sign_flip_p_value, spread
from pipeline.metrics import ErrorCounts


def counts(errors: list[int], references: list[int] | None = None) -> list[ErrorCounts]:
    return [ErrorCounts(each, 0, 0, num) for each, num in zip(errors, references or [10] * len(errors), strict=True)]


def test_an_interval_is_as_wide_as_the_normal_one_where_that_is_right() -> None:
    errors = np.random.default_rng(5).binomial(10, 0.2, 400).tolist()
    found = interval(counts(errors))
    assert found is not None
    middle, half = np.mean(errors) / 10, 1.96 * np.std(errors) / 10 / math.sqrt(400)
    assert found == pytest.approx((middle - half, middle + half), abs=0.0015)
    assert interval(counts(errors)) == found, "the same items, the same figures"


def test_intervals_hold_the_truth_in_95_of_100_samples() -> None:
    rng = np.random.default_rng(1)
    found = [interval(counts(rng.binomial(10, 0.3, 60).tolist())) for _ in range(120)]
    assert 0.88 <= np.mean([bounds is not None and bounds[0] <= 0.3 <= bounds[1] for bounds in found]) <= 0.99


def test_long_recordings_weigh_more() -> None:
    even = interval(counts([1] * 50 + [3] * 50))
    uneven = interval(counts([1] * 50 + [3] * 50, [5] * 50 + [15] * 50))
    assert even is not None and uneven is not None
    assert uneven[1] - uneven[0] < 0.05 * (even[1] - even[0]), "at equal rates only the sizes differ"


@pytest.mark.parametrize(("errors", "references"), [([3], [10]), ([], []), ([1, 2], [0, 0])])
def test_nothing_to_draw_from(errors: list[int], references: list[int]) -> None:
    assert interval(counts(errors, references)) is None
    assert difference(counts(errors, references), counts(errors, references)) is None


def test_more_recordings_than_fit_in_one_draw() -> None:
    found = interval(counts([0, 1] * 4000))
    assert found == pytest.approx((0.05 - 1.96 * 0.05 / 89.4, 0.05 + 1.96 * 0.05 / 89.4), abs=2e-4)


@pytest.mark.parametrize("differences", [[1, 1, 1, 1], [2, -1, 1, 0, 0, 3], [1, -1], [5], []])
def test_p_of_few_differences_is_exact(differences: list[float]) -> None:
    moved = [each for each in differences if each]
    sums = [
        abs(sum(s * d for s, d in zip(signs, moved, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(moved))
    ]
    expected = np.mean([each >= abs(sum(moved)) for each in sums])
    assert sign_flip_p_value(np.array(differences, float)) == pytest.approx(expected)


def test_p_of_many_differences_is_that_of_the_normal_test() -> None:
    values = np.random.default_rng(3).normal(0.15, 1, 300)
    z = values.sum() / math.sqrt((values**2).sum())
    assert sign_flip_p_value(values) == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.01)


def test_a_difference_is_second_less_first_and_paired() -> None:
    hard = np.random.default_rng(2).integers(0, 8, 100)
    first, second = counts((hard + 1).tolist()), counts(hard.tolist())
    found = difference(first, second)
    assert found is not None and found.difference == pytest.approx(-0.1) == found.interval[0] == found.interval[1]
    assert found.p_value < 0.001, "each recording is one better, however much recordings differ"
    same = difference(first, first)
    assert same is not None and (same.difference, same.interval, same.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_spread_over_seeds() -> None:
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0) and spread([4.0]) == (4.0, 0.0)
