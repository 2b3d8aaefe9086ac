"""Where clauses stand in audio: on the pauses they belong to, whatever else pauses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.placement import place_clauses, place_words, sentences
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis, Word
from tests.test_rolling import talk

SECOND = SAMPLE_RATE_HZ


def at(*bounds_s: float) -> list[tuple[int, int]]:
    samples = [round(bound * SECOND) for bound in bounds_s]
    return list(zip(samples[::2], samples[1::2], strict=True))


@given(st.integers(0, 10_000))
def test_sentence_ends_fall_on_the_pauses_behind_them(seed: int) -> None:
    told = talk(seed, num_sentences=6)
    places = [p for p in place_clauses(told.text, "English", told.speech, 0, told.num_samples) if p.is_sentence]
    ends = [(b, told.words[i + 1][1]) for i, (w, _, b) in enumerate(told.words[:-1]) if w.endswith(".")]
    assert [place.pause for place in places] == ends
    assert [told.text[: place.char].count(".") for place in places] == list(range(1, len(ends) + 1))


def test_a_pause_of_hesitation_is_no_sentence_end() -> None:
    text = "One two three four five six. Seven eight nine ten eleven twelve."
    speech = at(0, 0.9, 1.4, 2.3, 2.9, 4.9)  # in the middle of the first sentence, and at its end
    (place,) = place_clauses(text, "English", speech, 0, 5 * SECOND)
    assert place.pause == (speech[1][1], speech[2][0])


def test_a_sentence_end_without_a_pause_stands_by_its_share() -> None:
    (place,) = place_clauses("Aaaa aaaa. Bbbb bbbb.", "English", at(1, 5), 0, 6 * SECOND)
    assert not place.is_on_pause and place.pause[0] == 3 * SECOND


def test_without_speech_everything_is_at_the_end() -> None:
    assert [p.pause for p in place_clauses("A b. C d.", "English", [], 0, 50)] == [(50, 50)]


def test_chinese_has_no_spaces() -> None:
    (place,) = place_clauses("你好吗？我很好。", "Chinese", at(0, 1, 1.5, 2.4), 0, 3 * SECOND)
    assert (place.char, place.pause) == (4, (SECOND, SECOND * 3 // 2))


@given(st.text(alphabet="ab ,.?!。，", max_size=80), st.lists(st.integers(1, 40_000), max_size=24))
def test_places_are_in_order_and_inside(text: str, steps: list[int]) -> None:
    edges = [sum(steps[:i]) for i in range(len(steps) // 2 * 2)]
    speech = list(zip(edges[::2], edges[1::2], strict=True))
    hi = sum(steps) + 1
    places = place_clauses(text, "English", speech, 0, hi)
    assert [p.char for p in places] == sorted({p.char for p in places})
    starts = [p.pause[0] for p in places]
    assert starts == sorted(starts) and all(0 <= p.pause[0] <= p.pause[1] <= hi for p in places)


def words(*timed: tuple[str, float, float]) -> Hypothesis:
    text = " ".join(word for word, _, _ in timed)
    return Hypothesis(text, text, "English", [], [], "stop", [Word(w.strip("."), a, b) for w, a, b in timed])


def test_word_times_decide_where_there_are_any() -> None:
    spoken = words(("One", 0.0, 0.2), ("two.", 2.0, 2.2), ("Three", 2.5, 2.9), ("four.", 3.0, 3.3))
    assert [p.pause for p in place_words(spoken, at(0, 0.2, 2.0, 2.25, 2.45, 3.3), 0, 4 * SECOND)] == at(2.25, 2.45)
    assert [p.pause for p in place_words(spoken, at(0, 3.3), 0, 4 * SECOND)] == at(2.2, 2.5)


@pytest.mark.parametrize("timed", [False, True])
def test_sentences_have_the_time_of_their_speech(timed: bool) -> None:
    spoken = words(("Hello", 0.5, 0.9), ("there.", 1.0, 1.5), ("Good", 2.0, 2.3), ("day", 2.3, 3.0))
    if not timed:
        spoken.words.clear()
    found = sentences(spoken, at(0.5, 1.5, 2.0, 3.0), 4 * SECOND)
    assert [(s.text, s.start_s, s.end_s) for s in found] == [("Hello there.", 0.5, 1.5), ("Good day", 2.0, 3.0)]


def test_a_text_without_speech_is_one_sentence_of_the_segments_length() -> None:
    assert [(s.start_s, s.end_s) for s in sentences(words(("Yes.", 0, 1)), [], 2 * SECOND)] == [(0.0, 2.0)]
    assert sentences(words(), [], 2 * SECOND) == []
