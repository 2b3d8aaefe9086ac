"""Finds rows that repeat themselves while they are decoded."""

from __future__ import annotations

import numpy as np

_LONGEST_PERIOD = 32
_MIN_TOKENS = 48
_MIN_REPEATS = 4


class LoopFinder:
    """A row loops when its newest tokens have been the same again after some period of up to 32 tokens: four times
    over, and for 48 tokens at least (so that somebody may say no ten times)."""

    def __init__(self, num_slots: int) -> None:
        periods = np.arange(1, _LONGEST_PERIOD + 1)
        self._needed = np.maximum(_MIN_REPEATS * periods, _MIN_TOKENS)
        self._newest = np.full((num_slots, _LONGEST_PERIOD), -1, dtype=np.int64)  # the last token first
        self._runs = np.zeros((num_slots, _LONGEST_PERIOD), dtype=np.int64)  # tokens equal to the one a period before

    def begin(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """New rows in `slots` (int64 [R]) with their first tokens."""
        self._newest[slots] = -1
        self._newest[slots, 0] = tokens
        self._runs[slots] = 0

    def move(self, sources: np.ndarray, targets: np.ndarray, origin: LoopFinder | None = None) -> None:
        """Rows in slots `sources` (of another finder) go to slots `targets`."""
        origin = origin or self
        self._newest[targets], self._runs[targets] = origin._newest[sources], origin._runs[sources]

    def add(self, tokens: np.ndarray) -> np.ndarray:
        """The next tokens of the first `len(tokens)` slots (int64 [B]) -> bool [B], whether the row loops."""
        newest, runs = self._newest[: len(tokens)], self._runs[: len(tokens)]
        runs += 1
        runs *= newest == tokens[:, None]
        newest[:, 1:] = newest[:, :-1].copy()
        newest[:, 0] = tokens
        return np.asarray((runs >= self._needed).any(axis=1))
