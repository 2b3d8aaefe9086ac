"""Works a stretch of audio off from left to right in windows that end where sentences end.

A window is decoded up to a pause. Where a sentence ends inside its text, the window ends there and the next one begins
there; the rest, which had no right context, is decoded again at the head of the next window. Windows tile the audio.
That the text is neither doubled nor short at a seam is checked on the words that both windows decoded; where they
disagree, the first window is decoded again alone, as far as it goes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Generic, TypeVar

from pipeline.placement import Place, num_words, place_clauses, place_words
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis
from pipeline.segmentation import Span, cut_at_pause, longest_pause, speech_in
from pipeline.text import letters

Failure = TypeVar("Failure")

_END_WITHIN_S = 5.0  # of max_s: where a window looks for the pause to end at, before it takes an earlier one
_MIN_TAIL_S = 1.0  # as in segmentation
_SEAM_CHARS = 30
_MIN_SEAM_CHARS = 6
_MIN_SEAM_LIKENESS = 0.5


@dataclass(frozen=True, slots=True)
class Window(Generic[Failure]):
    """Samples `[start, end)` and what the engine made of them."""

    start: int
    end: int
    result: Hypothesis | Failure


@dataclass(frozen=True, slots=True)
class Roller(Generic[Failure]):
    """`decode(start, end)` transcribes samples; `speech` are spans of samples of the whole recording."""

    decode: Callable[[int, int], Awaitable[Hypothesis | Failure]]
    speech: list[Span]
    min_s: float
    max_s: float

    async def roll(self, lo: int, hi: int) -> list[Window[Failure]]:
        """Windows that tile `[lo, hi)`; each is decoded once the one before is."""
        windows: list[Window[Failure]] = []
        rest = ""  # of the text of the last window, beyond its end
        while lo < hi:
            end = self._decode_until(lo, hi)
            result = await self.decode(lo, end)
            if rest and isinstance(result, Hypothesis) and not fits(rest, result.text):
                last = windows[-1]
                windows[-1] = replace(last, result=await self.decode(last.start, last.end))
            rest = ""
            place = self._sentence_end(result, lo, end) if end < hi and isinstance(result, Hypothesis) else None
            if place is not None:
                assert isinstance(result, Hypothesis)
                rest, result, end = result.text[place.char :], head(result, place.char), _middle(place.pause)
            windows.append(Window(lo, end, result))
            lo = end
        return windows

    def _decode_until(self, lo: int, hi: int) -> int:
        """The pause to decode up to: a late one, or the longest after min_s, or none but the limit."""
        longest = round(self.max_s * SAMPLE_RATE_HZ)
        if hi - lo <= longest:
            return hi
        end = min(lo + longest, hi - min(round(_MIN_TAIL_S * SAMPLE_RATE_HZ), longest // 2))
        first = lo + round(self.min_s * SAMPLE_RATE_HZ)
        late = max(first, end - round(_END_WITHIN_S * SAMPLE_RATE_HZ))
        if late >= end:
            return end
        return cut_at_pause(self.speech, late if longest_pause(self.speech, late, end) else min(first, late), end)

    def _sentence_end(self, hypothesis: Hypothesis, lo: int, end: int) -> Place | None:
        """Where the last sentence ends that has more text behind it, after min_s, on a pause."""
        if hypothesis.finish_reason != "stop" or _text_start(hypothesis) is None:
            return None
        speech = speech_in(self.speech, lo, end)
        if hypothesis.words:
            places = place_words(hypothesis, speech, lo, end)
        else:
            places = place_clauses(hypothesis.text, hypothesis.language, speech, lo, end)
        first = lo + round(self.min_s * SAMPLE_RATE_HZ)
        fit = [each for each in places if each.is_sentence and each.is_on_pause and first <= _middle(each.pause) < end]
        return fit[-1] if fit else None


def head(hypothesis: Hypothesis, num_chars: int) -> Hypothesis:
    """The hypothesis up to character `num_chars` of its text, with the tokens and words that make it."""
    start = _text_start(hypothesis)
    assert start is not None
    end = start + num_chars
    num_tokens = bisect_left(hypothesis.token_ends, end) + 1
    text = hypothesis.text[:num_chars]
    return replace(
        hypothesis,
        text=text,
        text_raw=hypothesis.text_raw[:end],
        token_ids=hypothesis.token_ids[:num_tokens],
        token_logprobs=hypothesis.token_logprobs[:num_tokens],
        token_ends=hypothesis.token_ends[:num_tokens],
        words=hypothesis.words[: num_words(hypothesis, num_chars)],
        finish_reason="sentence",
    )


def fits(rest: str, following: str) -> bool:
    """True when the next window's text begins as the rest of the last one's does; with too little to tell by, too."""
    first, second = letters(rest), letters(following)
    if len(first) < _MIN_SEAM_CHARS:
        return True
    size = min(len(first), _SEAM_CHARS)
    return SequenceMatcher(None, first[:size], second[:size], autojunk=False).ratio() >= _MIN_SEAM_LIKENESS


def _text_start(hypothesis: Hypothesis) -> int | None:
    """Where `text` stands in `text_raw`; None where clean-up changed it, or tokens do not say where they end."""
    if len(hypothesis.token_ends) != len(hypothesis.token_ids):
        return None
    _, tag, _ = hypothesis.text_raw.partition("<asr_text>")
    start = hypothesis.text_raw.find(hypothesis.text, hypothesis.text_raw.find(tag) + len(tag) if tag else 0)
    return None if start < 0 else start


def _middle(pause: Span) -> int:
    return (pause[0] + pause[1] + 1) // 2
