"""Where the clauses of a text stand in its audio, from the text and the pauses alone.

No engine has to give word times: a clause takes speech in proportion to what is written of it, and punctuation likes
to fall on pauses, the end of a sentence on longer ones. Of all ways to put the ends of clauses on pauses, in order, the
likeliest is found by dynamic programming over (clause end, pause).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis, Sentence
from pipeline.text import letters, sentence_ends

Span = tuple[int, int]

_CLAUSE_END = re.compile(r"[,;:،、，；：]+(?=\s|[^\x00-\x7f])|[,;:]+$")
_WIDE_WEIGHT = 3.0  # of a character that is a syllable, where a letter weighs 1
_DIGIT_WEIGHT = 4.0  # "7" is spoken as a word
_LONG_PAUSE_S = 0.4
_RATE_VARIANCE = 0.06  # of how long a second's worth of text takes
_UNUSED_PAUSE = 1.5  # a long pause without punctuation
_UNPLACED_SENTENCE = 3.0  # a sentence that ends without a pause
_UNPLACED_COMMA = 0.3
_MAX_UNPLACED = 6  # ends in a row
_SNAP = round(0.3 * SAMPLE_RATE_HZ)


@dataclass(frozen=True, slots=True)
class Place:
    """The end of a clause: characters before it, the pause `[start, end)` in samples that it falls on (empty where it
    was put between two others by its share of the speech), and whether a sentence ends there."""

    char: int
    pause: Span
    is_sentence: bool

    @property
    def is_on_pause(self) -> bool:
        return self.pause[1] > self.pause[0]


def place_clauses(text: str, language: str | None, speech: Sequence[Span], lo: int, hi: int) -> list[Place]:
    """The ends of the clauses of `text`, which is what was said in samples `[lo, hi)`, in order.

    `speech` are spans of samples in order, inside `[lo, hi)`; what lies between two of them is a pause. The end of
    the text itself is not among the places. Without speech everything lies at `hi`.
    """
    sentences = set(sentence_ends(text, language))
    chars = sorted(sentences | {match.end() for match in _CLAUSE_END.finditer(text)})
    chars = [char for char in chars if text[char:].strip()]
    if not chars or not speech:
        return [Place(char, (hi, hi), char in sentences) for char in chars]
    weights = _weights(text)
    pauses = [(before[1], after[0]) for before, after in zip(speech, speech[1:], strict=False)]
    spoken = np.cumsum([0, *(end - start for start, end in speech)]) / SAMPLE_RATE_HZ  # before each pause, then all
    ends = np.array([0.0, *(weights[char - 1] for char in chars), weights[-1]])
    expected = ends * (spoken[-1] / max(ends[-1], 1e-9))
    is_sentence = np.array([char in sentences for char in chars])
    pause_s = np.array([(end - start) / SAMPLE_RATE_HZ for start, end in pauses])
    chosen = _likeliest(expected, spoken, is_sentence, pause_s)
    samples = _interpolated(chosen, expected, spoken, speech)
    places: list[Place] = []
    for index, (char, pause) in enumerate(zip(chars, chosen, strict=True)):
        if pause:
            where = pauses[pause - 1]
        else:  # between the places around it, whatever rounding says
            following = next((pauses[later - 1][0] for later in chosen[index:] if later), hi)
            sample = min(max(samples[index], places[-1].pause[1] if places else lo), following)
            where = (sample, sample)
        places.append(Place(char, where, bool(is_sentence[index])))
    return places


def place_words(hypothesis: Hypothesis, speech: Sequence[Span], lo: int, hi: int) -> list[Place]:
    """The ends of the sentences of a text whose words have times, except the text's own; each on the pause nearest to
    its last word's end, or between that word and the next where no pause is within `_SNAP_S`."""
    pauses = [(before[1], after[0]) for before, after in zip(speech, speech[1:], strict=False)]
    places = []
    for char in sentence_ends(hypothesis.text, hypothesis.language):
        if not hypothesis.text[char:].strip():
            break
        last = num_words(hypothesis, char) - 1
        if not 0 <= last < len(hypothesis.words) - 1:
            continue
        end_s, next_s = hypothesis.words[last].end_s, hypothesis.words[last + 1].start_s
        end, begin = (lo + round(seconds * SAMPLE_RATE_HZ) for seconds in (end_s, max(end_s, next_s)))
        near = [p for p in pauses if p[0] - _SNAP <= begin and end <= p[1] + _SNAP]
        # a word's end is known to some 100 ms, the pause to 30
        pause = min(near, key=lambda p: abs(p[0] - end)) if near else (end, max(begin, end + 1))
        places.append(Place(char, (min(pause[0], hi - 1), min(pause[1], hi)), True))
    return places


def num_words(hypothesis: Hypothesis, num_chars: int) -> int:
    """How many of the words stand in the first `num_chars` characters: as many letters as those have."""
    left, count = len(letters(hypothesis.text[:num_chars])), 0
    for word in hypothesis.words:
        left -= len(letters(word.word))
        if left < 0:
            break
        count += 1
    return count


def sentences(hypothesis: Hypothesis, speech: Sequence[Span], num_samples: int) -> list[Sentence]:
    """The text at its punctuation, an unfinished sentence at its end too; `speech` in samples from the segment's start.

    A sentence begins and ends with the speech around it; without any it takes the segment's time.
    """
    place = place_words(hypothesis, speech, 0, num_samples) if hypothesis.words else None
    if place is None:
        place = place_clauses(hypothesis.text, hypothesis.language, speech, 0, num_samples)
    ends = [each for each in place if each.is_sentence]
    first, last = (speech[0][0], speech[-1][1]) if speech else (0, num_samples)
    starts = [first, *(each.pause[1] for each in ends)]
    stops = [*(each.pause[0] for each in ends), last]
    chars = [0, *(each.char for each in ends), len(hypothesis.text)]
    pieces = [hypothesis.text[a:b].strip() for a, b in zip(chars, chars[1:], strict=False)]
    return [
        Sentence(piece, start / SAMPLE_RATE_HZ, max(start, stop) / SAMPLE_RATE_HZ)
        for piece, start, stop in zip(pieces, starts, stops, strict=True)
        if piece
    ]


def place_units(units: Sequence[str], speech: Sequence[Span], num_samples: int) -> list[float]:
    """Where each of `units`, which together are the text of a segment, ends in it by its share of the speech: seconds
    from the segment's start, where `speech` counts its samples from, too."""
    spans = speech or [(0, num_samples)]
    ends = np.array([sum(map(_weight, unit)) for unit in units]).cumsum()
    spoken = np.cumsum([0, *(end - start for start, end in spans)])
    at = ends / max(ends[-1], 1e-9) * spoken[-1] if len(ends) else ends
    which = np.clip(np.searchsorted(spoken, at, side="left") - 1, 0, len(spans) - 1)
    return [(spans[k][0] + float(a - spoken[k])) / SAMPLE_RATE_HZ for k, a in zip(which, at, strict=True)]


def _weights(text: str) -> np.ndarray:
    """What is written up to and with each character, in letters' worth of speech."""
    return np.cumsum([_weight(char) for char in text])


def _weight(char: str) -> float:
    if not char.isalnum():
        return 0.0
    if char.isdigit():
        return _DIGIT_WEIGHT
    return _WIDE_WEIGHT if "\u2e80" <= char <= "\ud7af" or char >= "\U00020000" else 1.0


def _likeliest(expected: np.ndarray, spoken: np.ndarray, is_sentence: np.ndarray, pause_s: np.ndarray) -> list[int]:
    """The pause of each clause end, counted from 1; 0 where it falls on none.

    expected [n + 2]: seconds of speech before the start, each clause end and the end of the text, at the mean rate;
    spoken [m + 2]: seconds of speech before the start, each pause and the end; is_sentence [n]; pause_s [m]. Costs are
    negative log-likelihoods up to constants.
    """
    n, m = len(is_sentence), len(pause_s)
    length = np.minimum(pause_s / _LONG_PAUSE_S, 2.0)
    unused = np.cumsum([0.0, *(_UNUSED_PAUSE * length)])  # the cost of leaving out pauses 1 to j, at j
    unplaced = np.cumsum([0.0, *np.where(is_sentence, _UNPLACED_SENTENCE, _UNPLACED_COMMA)])
    cost = np.full((n + 1, m + 1), np.inf)
    cost[0, 0] = 0.0
    back = np.zeros((n + 1, m + 1, 2), dtype=np.int64)

    def step(end: int, first: int, to: slice, before_to: slice) -> np.ndarray:
        """Cost [from pause, to pause] of going on from clause end `first` to clause end `end`."""
        text_s = expected[end] - expected[first]
        speech_s = spoken[None, to] - spoken[: m + 1, None]
        rate = (speech_s - text_s) ** 2 / (2 * _RATE_VARIANCE * (text_s + 0.3))
        left_out = unused[None, before_to] - unused[: m + 1, None] + unplaced[end - 1] - unplaced[first]
        costs: np.ndarray = np.where(speech_s > 0, cost[first][:, None] + rate + left_out, np.inf)
        return costs

    for end in range(1, n + 1):
        # a short pause speaks against the end of a sentence, a long one against a comma
        misfit = np.maximum(1.0 - length, 0.0) * 2.0 if is_sentence[end - 1] else np.maximum(length - 1.0, 0.0)
        for first in range(max(0, end - 1 - _MAX_UNPLACED), end):
            costs = step(end, first, slice(1, m + 1), slice(0, m)) + misfit
            best = costs.argmin(0) if m else np.empty(0, dtype=np.int64)
            for to in np.flatnonzero(costs.min(0, initial=np.inf) < cost[end, 1:]):
                cost[end, to + 1] = costs[best[to], to]
                back[end, to + 1] = first, best[to]
    last = np.stack([step(n + 1, first, slice(m + 1, m + 2), slice(m, m + 1))[:, 0] for first in range(n + 1)])
    end, pause = (int(i) for i in np.unravel_index(last.argmin(), last.shape))
    chosen = [0] * n
    while end:
        chosen[end - 1] = pause
        end, pause = (int(i) for i in back[end, pause])
    return chosen


def _interpolated(chosen: Sequence[int], expected: np.ndarray, spoken: np.ndarray, speech: Sequence[Span]) -> list[int]:
    """The sample of each clause end by its share of the speech between the chosen pauses around it."""
    placed = [0, *(i for i, pause in enumerate(chosen, start=1) if pause), len(chosen) + 1]
    at = [0.0, *(spoken[pause] for pause in chosen if pause), spoken[-1]]
    seconds = np.interp(expected[1:-1], expected[placed], at)
    starts = spoken[:-1]
    inside = np.clip(np.searchsorted(starts, seconds, side="right") - 1, 0, len(speech) - 1)
    return [speech[k][0] + round((s - starts[k]) * SAMPLE_RATE_HZ) for k, s in zip(inside, seconds, strict=True)]
