"""Where a stream's segments end: at a sentence once one is long enough, else before it would grow too long.

Encoder and decoder begin anew with every segment, so that compute and memory do not grow with a stream's age. The
figures are qwen3_asr_causal's (asr.py, streamer.py: `SegmentedCachedFullHypothesisStreamer`), and so is the rule
"mark": a segment ends where its hypothesis does, if that ends with a sentence's mark. A model writes such a mark behind
nearly anything that it has heard so far, and often a sentence that nobody has said yet. The rule "sentence" looks for
the end of a sentence that two hypotheses agree on, and ends the segment at the pause behind it; what was heard beyond,
and is not out yet, is heard again. On half an hour of generated talk that is 8.2, 7.1 and 5.9 % of errors in English,
Vietnamese and Chinese, where "mark" has 17.7, 15.2 and 16.7 (tests/bench_contract.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.engine.causal.tower import STEP_S
from pipeline.placement import Place, Span, place_clauses
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.text import sentence_ends, units

_WINDOW, _SHIFT = SAMPLE_RATE_HZ // 50, SAMPLE_RATE_HZ // 100  # 20 ms every 10 ms
_LEAST_RANGE_DB = 12.0  # between the quiet and the loud of a segment, below which nothing in it is a pause
_QUIET_SHARE = 0.35  # of that range
_LEAST_PAUSE, _LEAST_SPEECH = 10, 6  # windows
STEP_SAMPLES = round(STEP_S * SAMPLE_RATE_HZ)


@dataclass(frozen=True, slots=True)
class RollPolicy:
    """A segment ends between `min_s` and `max_s`, which the end of a stream may leave: at "sentence" or "mark" as
    above, or "fixed" before the block that would make it longer than `max_s`; there it ends in any case."""

    min_s: float = 7.0
    max_s: float = 16.0
    at: Literal["sentence", "mark", "fixed"] = "sentence"

    def __post_init__(self) -> None:
        if not 0 < self.min_s <= self.max_s:
            raise ValueError(f"min_s ({self.min_s}) must be above 0 and at most max_s ({self.max_s})")

    @property
    def max_steps(self) -> int:
        return round(self.max_s / STEP_S)

    @property
    def min_steps(self) -> int:
        return round(self.min_s / STEP_S)

    def ends_before(self, num_steps: int, block_steps: int) -> bool:
        """Whether a segment of so many steps has no room for another block."""
        return num_steps > 0 and num_steps + block_steps > self.max_steps

    def ends_after(self, num_steps: int, text: str, language: str | None) -> bool:
        """Whether a segment ends with the hypothesis `text` after so many steps, by the rule "mark"."""
        if self.at != "mark" or num_steps < self.min_steps:
            return False
        text = text.rstrip()
        return bool(text) and len(text) in sentence_ends(text, language)


@dataclass(frozen=True, slots=True)
class Cut:
    """A segment ends after `num_steps` steps of its audio and `num_chars` characters of its hypothesis."""

    num_steps: int
    num_chars: int
    is_sentence: bool


def find_cut(
    text: str, language: str | None, pcm: np.ndarray, min_steps: int, num_published: int, may_be_clause: bool
) -> Cut | None:
    """The last end of a sentence in `text`, what was heard of a segment, that falls on a pause of its audio `pcm`
    (int16 [n]), not before `min_steps` nor before the `num_published` units that are out; None without one, or with
    `may_be_clause` the last end of any clause."""
    speech = speech_spans(pcm)
    if not speech:
        return None
    places = place_clauses(text, language, speech, 0, len(pcm))
    text = text.rstrip()
    if len(text) in sentence_ends(text, language) and len(pcm) - speech[-1][1] >= _LEAST_PAUSE * _SHIFT:
        places.append(Place(len(text), (speech[-1][1], len(pcm)), True))  # and silence after it
    found = [cut for place in places if (cut := _cut(place, min_steps)) is not None]
    found = [cut for cut in found if len(units(text[: cut.num_chars])) >= num_published]
    sentences = [cut for cut in found if cut.is_sentence]
    return sentences[-1] if sentences else found[-1] if found and may_be_clause else None


def _cut(place: Place, min_steps: int) -> Cut | None:
    """In the middle of the place's pause."""
    num_steps = round(sum(place.pause) / 2 / STEP_SAMPLES)
    return Cut(num_steps, place.char, place.is_sentence) if place.is_on_pause and num_steps >= min_steps else None


def speech_spans(pcm: np.ndarray) -> list[Span]:
    """Samples of int16 [n] that are louder than a good deal of it; what lies between two spans is a pause.

    A detector of speech would know better in noise, but would cost a fifth of what the model does.
    """
    num_windows = (len(pcm) - _WINDOW) // _SHIFT + 1
    if num_windows < 1:
        return [(0, len(pcm))] if len(pcm) else []
    power = np.concatenate([[0.0], np.square(pcm.astype(np.float64)).cumsum()])
    starts = np.arange(num_windows) * _SHIFT
    level = 10 * np.log10((power[starts + _WINDOW] - power[starts]) / _WINDOW + 1)
    quiet, loud = np.percentile(level, [5, 95])
    if loud - quiet < _LEAST_RANGE_DB:
        return [(0, len(pcm))]
    is_loud = level > quiet + _QUIET_SHARE * (loud - quiet)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_loud, [False]]).astype(np.int8)))
    spans: list[tuple[int, int]] = []
    for start, end in edges.reshape(-1, 2).tolist():
        if spans and start - spans[-1][1] < _LEAST_PAUSE:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return [(s * _SHIFT, min(e * _SHIFT + _SHIFT, len(pcm))) for s, e in spans if e - s >= _LEAST_SPEECH]
