"""Rolling at sentences, on talks whose every word has a known time and an engine that hears exactly those."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.engine.base import EngineFailure
from pipeline.rolling import Roller, Window, fits, head
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis
from pipeline.segmentation import Span

SECOND = SAMPLE_RATE_HZ
NAMES = "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa"
WORDS = NAMES.split()


@dataclass
class Talk:
    """Words `(text, start, end)` in samples; sentences begin with a capital and end with a full stop and a pause."""

    words: list[tuple[str, int, int]]
    num_samples: int

    @property
    def speech(self) -> list[Span]:
        spans: list[Span] = []
        for _, start, end in self.words:
            if spans and start - spans[-1][1] < SECOND // 10:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
        return spans

    @property
    def text(self) -> str:
        return " ".join(word for word, _, _ in self.words)


def talk(seed: int, num_sentences: int = 40, pause_s: float = 0.5) -> Talk:
    rng = random.Random(seed)
    words, at = [], SECOND // 4
    for number in range(num_sentences):
        count = rng.randint(4, 12)
        for i in range(count):
            word = f"{rng.choice(WORDS)}{number}"
            word = word.capitalize() if i == 0 else word
            word += "." if i == count - 1 else "," if rng.random() < 0.1 else ""
            length = int(SECOND * 0.06 * len(word) * rng.uniform(0.8, 1.25))
            words.append((word, at, at + length))
            at += length + (int(0.2 * SECOND) if word.endswith(",") else 0)
        at += int(SECOND * pause_s * rng.uniform(0.8, 2.0))
    return Talk(words, at)


class Engine:
    """Hears the words whose middle is in a window; a half word at an edge is heard as noise, as models do."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.windows: list[Span] = []

    async def decode(self, start: int, end: int) -> Hypothesis | EngineFailure:
        self.windows.append((start, end))
        heard = [word for word, a, b in self.talk.words if a >= start and b <= end]
        return hypothesis(" ".join(heard))


def hypothesis(text: str) -> Hypothesis:
    """One token a word, after those of the prefix and before the end token."""
    raw = f"language English<asr_text>{text}"
    ends = [len("language English"), len("language English<asr_text>")]
    ends += [len(raw) - len(text) + i for i, char in enumerate(text) if char == " "] + [len(raw)] * 2
    return Hypothesis(text, raw, "English", list(range(len(ends))), [-0.5] * len(ends), "stop", token_ends=ends)


def roll(engine: Engine, min_s: float = 12.0, max_s: float = 30.0) -> list[Window[EngineFailure]]:
    roller: Roller[EngineFailure] = Roller(engine.decode, engine.talk.speech, min_s, max_s)
    return asyncio.run(roller.roll(0, engine.talk.num_samples))


def text_of(windows: list[Window[EngineFailure]]) -> str:
    return " ".join(w.result.text.strip() for w in windows if isinstance(w.result, Hypothesis)).strip()


def assert_tiles(windows: list[Window[EngineFailure]], num_samples: int, max_s: float = 30.0) -> None:
    assert [w.start for w in windows] == [0, *(w.end for w in windows[:-1])] and windows[-1].end == num_samples
    assert all(0 < w.end - w.start <= max_s * SECOND for w in windows)


@given(st.integers(0, 10_000))
@example(108)  # the pause that a window is decoded up to ends a sentence by itself
def test_every_word_is_there_once_and_windows_end_with_sentences(seed: int) -> None:
    engine = Engine(talk(seed))
    windows = roll(engine)
    assert_tiles(windows, engine.talk.num_samples)
    assert text_of(windows) == engine.talk.text
    for window in windows:
        assert isinstance(window.result, Hypothesis)
        assert window.result.text.rstrip().endswith(".")
    decoded = sum(end - start for start, end in engine.windows) / engine.talk.num_samples
    assert decoded < 1.5, "what is decoded twice is the rest after a window's last sentence"


def test_a_window_that_rolls_keeps_the_tokens_of_its_sentences() -> None:
    engine = Engine(talk(1))
    first = roll(engine)[0].result
    assert isinstance(first, Hypothesis)
    assert first.text_raw == f"language English<asr_text>{first.text}"
    assert len(first.token_ids) == len(first.token_logprobs) == len(first.token_ends) == 2 + len(first.text.split())
    assert first.token_ends[-1] == len(first.text_raw)


def test_speech_without_punctuation_is_cut_at_pauses() -> None:
    engine = Engine(talk(3))
    engine.talk.words = [(word.strip(".,").lower(), a, b) for word, a, b in engine.talk.words]
    windows = roll(engine)
    assert_tiles(windows, engine.talk.num_samples)
    assert text_of(windows) == engine.talk.text
    assert sum(b - a for a, b in engine.windows) == engine.talk.num_samples, "nothing is decoded twice"


def test_speech_without_pauses_is_cut_at_the_limit() -> None:
    engine = Engine(Talk([("on", 0, 100 * SECOND)], 100 * SECOND))
    assert [w.end // SECOND for w in roll(engine)] == [30, 60, 90, 100]


def test_a_seam_where_the_windows_disagree_is_decoded_again() -> None:
    class Doubling(Engine):
        """Hears its first window's last sentence again in the second one, as a wrong cut would make it."""

        async def decode(self, start: int, end: int) -> Hypothesis | EngineFailure:
            result = await super().decode(start, end)
            if len(self.windows) == 2:
                assert isinstance(result, Hypothesis)
                return hypothesis("Something else was said here before. " + result.text)
            return result

    engine = Doubling(talk(5))
    windows = roll(engine)
    assert engine.windows[2] == (windows[0].start, windows[0].end)
    assert isinstance(windows[0].result, Hypothesis) and windows[0].result.finish_reason == "stop"
    assert_tiles(windows, engine.talk.num_samples)


def test_a_failed_window_is_a_failed_row_and_the_rest_goes_on() -> None:
    class Failing(Engine):
        async def decode(self, start: int, end: int) -> Hypothesis | EngineFailure:
            result = await super().decode(start, end)
            return EngineFailure("x", "engine_error", "broke") if len(self.windows) == 2 else result

    engine = Failing(talk(6))
    windows = roll(engine)
    assert_tiles(windows, engine.talk.num_samples)
    assert [i for i, w in enumerate(windows) if isinstance(w.result, EngineFailure)] == [1]


def test_a_text_that_clean_up_changed_is_not_cut() -> None:
    class Cleaned(Engine):
        async def decode(self, start: int, end: int) -> Hypothesis | EngineFailure:
            result = await super().decode(start, end)
            assert isinstance(result, Hypothesis)
            return Hypothesis("Other. Text.", result.text_raw, "English", [1], [0.0], "stop", token_ends=[5])

    assert all(w.result.text == "Other. Text." for w in roll(Cleaned(talk(7))))  # type: ignore[union-attr]


def test_an_hour_of_silence() -> None:
    engine = Engine(Talk([], 3600 * SECOND))
    assert_tiles(roll(engine), 3600 * SECOND)


@pytest.mark.parametrize(
    ("rest", "following", "expected"),
    [
        (" Then he left the", "Then he left the house at noon. She", True),
        (" Then he left the", "Than he let the house", True),
        (" Then he left the", "She wept bitterly. Then he left", False),
        (" and", "Something else", True),
        ("", "Something else", True),
        (" 然后他离开了房子", "然后他离开了那个房子", True),
    ],
)
def test_seams_fit_when_both_windows_heard_the_same(rest: str, following: str, expected: bool) -> None:
    assert fits(rest, following) is expected


def test_the_head_of_a_hypothesis_ends_with_the_token_that_ends_the_sentence() -> None:
    whole = hypothesis("One two. Three four.")
    first = head(whole, len("One two."))
    assert (first.text, first.token_ids, first.finish_reason) == ("One two.", [0, 1, 2, 3], "sentence")
