"""What of a growing hypothesis is published: words that stood in the last hypothesis too, but for the newest ones.

Text is committed by words, in scripts without spaces by characters. What is published stays: where a hypothesis changes
its mind about it, nothing is published until the segment ends, and then what the hypothesis has behind that place.
The policy is qwen3_asr_causal's (stable_commit.py: `update_stable_text_commit`), but for the end of a segment: there it
goes on at the word of the same number, which doubles or drops a word when the hypothesis has grown or shrunk before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import regex

from pipeline.text import UNSPACED, letters, units

_TIGHT = regex.compile(rf"[{UNSPACED}\u3000-\u303f\uff00-\uff65]")


@dataclass(frozen=True, slots=True)
class CommitPolicy:
    """`hold_back` units at the end of what two hypotheses share stay open; what is left is published once it was the
    same `stable_iterations` times."""

    hold_back: int = 6
    stable_iterations: int = 1

    def __post_init__(self) -> None:
        if self.hold_back < 0 or self.stable_iterations < 1:
            raise ValueError(f"hold_back must be 0 or more and stable_iterations 1 or more, not {self}")


def between(before: str, after: str) -> str:
    """What stands between two texts that follow each other: a space, but none at characters that take none."""
    if not before or not after or after[0].isspace() or _TIGHT.match(before[-1]) or _TIGHT.match(after[0]):
        return ""
    return " "


class Committer:
    """Of one segment: takes hypothesis after hypothesis and says what of it is new to the public."""

    def __init__(self, policy: CommitPolicy, published: Sequence[str] = ()) -> None:
        """`published` units are out already, where a segment goes on after an interruption."""
        self._policy = policy
        self._published = list(published)
        self._last: list[str] = []
        self._candidate: list[str] | None = None
        self._num_same = 0

    @property
    def published(self) -> list[str]:
        """Units, in order."""
        return list(self._published)

    def confirmed(self, hypothesis: str) -> str:
        """What the last hypothesis and this one, which has not been taken yet, both begin with."""
        found = units(hypothesis)
        return "".join(found[: num_common(self._last, found)])

    def take(self, hypothesis: str) -> list[str]:
        """The units that the next hypothesis publishes."""
        found, before = units(hypothesis), self._last
        self._last = found
        if found[: len(self._published)] != self._published:
            self._candidate, self._num_same = self._published, 0
            return []
        size = max(len(self._published), num_common(before, found) - self._policy.hold_back)
        candidate = found[:size]
        self._num_same = self._num_same + 1 if candidate == self._candidate else 1
        self._candidate = candidate
        if self._num_same < self._policy.stable_iterations:
            return []
        return self._publish(size)

    def tail(self) -> str:
        """What the last hypothesis has behind the published text."""
        return "".join(self._last[self._matched() :]).strip()

    def finish(self, hypothesis: str | None = None) -> list[str]:
        """The segment has ended: publishes what the last hypothesis, or this one, has behind the published text."""
        if hypothesis is not None:
            self._last = units(hypothesis)
        return self._publish(len(self._last), self._matched())

    def _matched(self) -> int:
        return num_matched(self._published, self._last)

    def _publish(self, end: int, start: int | None = None) -> list[str]:
        new = self._last[len(self._published) if start is None else start : end]
        self._published += new
        return new


def num_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Units that both begin with; a word with which only one of them ends may be half of it, and is none."""
    shorter, longer = sorted((one, other), key=len)
    same = next((at for at, unit in enumerate(shorter) if unit != longer[at]), len(shorter))
    is_half = 0 < same == len(shorter) < len(longer) and longer[same][0].isspace()
    return same - is_half


def num_matched(published: Sequence[str], hypothesis: Sequence[str]) -> int:
    """How many units of `hypothesis` say what was published: the beginning that is least edits of words away from it,
    of several the one whose length is nearest."""
    if list(hypothesis[: len(published)]) == list(published):
        return len(published)
    said = [letters(unit) for unit in hypothesis]
    costs = np.arange(len(said) + 1)  # of turning what is published so far into each beginning
    for unit in published:
        changed = costs[:-1] + np.array([word != letters(unit) for word in said], np.int64)
        best = np.minimum(costs + 1, np.concatenate([[costs[0] + 1], changed]))
        steps = np.arange(len(best))
        costs = np.minimum.accumulate(best - steps) + steps  # insertions
    ends = np.flatnonzero(costs == costs.min())
    return int(min(ends, key=lambda end: (abs(end - len(published)), end)))
