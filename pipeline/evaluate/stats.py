"""How certain an error rate is, and whether two systems differ: by resampling recordings, with a fixed seed.

Words of one recording err together, so that recordings are drawn and never words. Two systems are compared on the same
recordings, pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.metrics import ErrorCounts

RESAMPLES = 10_000
SEED = 0  # the same items give the same figures
_CHUNK = 4_000_000  # items drawn at once, 64 MB

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Difference:
    """Of error rates, `second - first`: below 0 the second system errs less. `p_value` is two-sided."""

    difference: float
    interval: Interval
    p_value: float


def interval(counts: Sequence[ErrorCounts]) -> Interval | None:
    """The 95 % interval of the pooled error rate, by the percentiles of a bootstrap over recordings.

    Source: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004.
    None where there is nothing to draw from: fewer than two recordings, or no reference.
    """
    errors = np.array([each.num_errors for each in counts], float)
    return bootstrap(errors, _references(counts))


def difference(first: Sequence[ErrorCounts], second: Sequence[ErrorCounts]) -> Difference | None:
    """How two systems differ on the same recordings, given in the same order; None as for `interval`.

    The interval is the paired bootstrap's of Bisani and Ney. The p-value is that of the matched-pairs test of Gillick
    and Cox, "Some statistical issues in the comparison of speech recognition algorithms", ICASSP 1989, with a recording
    as the segment; its null distribution comes from random signs of the differences instead of from a normal one, which
    would be wrong for few recordings.
    """
    assert len(first) == len(second)
    gained = np.array([b.num_errors - a.num_errors for a, b in zip(first, second, strict=True)], float)
    references = _references(first)
    bounds = bootstrap(gained, references)
    if bounds is None:
        return None
    return Difference(float(gained.sum() / references.sum()), bounds, sign_flip_p_value(gained))


def sign_flip_p_value(differences: np.ndarray) -> float:
    """The share of random signs that give a sum at least as far from 0; `differences` float `[num_items]`.

    Exact, over all signs, for up to 13 differences that are not 0.
    """
    moved = differences[differences != 0]
    reached = abs(moved.sum()) - 1e-9
    if len(moved) <= 13:
        signs = 1 - 2 * (np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1)
        return float((abs(signs @ moved) >= reached).mean())
    rng, num_beyond = np.random.default_rng(SEED), 0
    for size in _chunks(len(moved)):
        signs = rng.integers(0, 2, (size, len(moved)), np.int8) * 2 - 1
        num_beyond += int((abs(signs @ moved) >= reached).sum())
    return (num_beyond + 1) / (RESAMPLES + 1)


def bootstrap(errors: np.ndarray, references: np.ndarray) -> Interval | None:
    """The 95 % interval of `sum(errors) / sum(references)`, both float `[num_items]`; None as for `interval`."""
    if len(errors) < 2 or not references.any():
        return None
    rng, rates = np.random.default_rng(SEED), []
    for size in _chunks(len(errors)):
        drawn = rng.integers(0, len(errors), (size, len(errors)), np.int32)
        total = references[drawn].sum(axis=1)
        rates.append(errors[drawn].sum(axis=1)[total > 0] / total[total > 0])
    low, high = np.percentile(np.concatenate(rates), (2.5, 97.5)).tolist()
    return low, high


def _references(counts: Sequence[ErrorCounts]) -> np.ndarray:
    return np.array([each.num_reference for each in counts], float)


def _chunks(num_items: int) -> list[int]:
    """Sizes that add up to `RESAMPLES`, so that one draw takes a bounded amount of memory."""
    size = max(1, min(RESAMPLES, _CHUNK // max(num_items, 1)))
    return [size] * (RESAMPLES // size) + [RESAMPLES % size] * bool(RESAMPLES % size)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, as for the seeds of one training; 0 of a single value."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
