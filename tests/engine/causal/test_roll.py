"""Where segments end: at the pause behind a sentence, and what is behind it is heard again."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.engine.causal.roll import STEP_SAMPLES, RollPolicy, find_cut, speech_spans
from pipeline.schema import SAMPLE_RATE_HZ

RNG = np.random.default_rng(0)
WORDS_S, PAUSE_S = 0.3, 0.5


def spoken(*sentences: int, noise: float = 5.0, pause_s: float = PAUSE_S) -> np.ndarray:
    """Audio of sentences of so many words, each followed by a pause."""
    parts = []
    for num_words in sentences:
        parts += [RNG.normal(0, 3000, round(num_words * WORDS_S * SAMPLE_RATE_HZ))]
        parts += [np.zeros(round(pause_s * SAMPLE_RATE_HZ))]
    pcm = np.concatenate(parts)
    return (pcm + RNG.normal(0, noise, len(pcm))).clip(-32768, 32767).astype(np.int16)


TEXT = "alpha beta gamma delta. Epsilon zeta eta theta iota. Kappa lamda"


def test_a_segment_ends_at_the_pause_behind_its_last_sentence() -> None:
    pcm = spoken(4, 5, 2)[: -round(PAUSE_S * SAMPLE_RATE_HZ)]
    cut = find_cut(TEXT, "English", pcm, 0, 0, False)
    assert cut is not None and cut.is_sentence and TEXT[: cut.num_chars].endswith("iota.")
    assert cut.num_steps * STEP_SAMPLES / SAMPLE_RATE_HZ == pytest.approx(9 * WORDS_S + 1.5 * PAUSE_S, abs=0.06)


def test_not_too_early_and_not_within_what_is_out() -> None:
    pcm = spoken(4, 5, 2)[: -round(PAUSE_S * SAMPLE_RATE_HZ)]
    steps = round((9 * WORDS_S + 2 * PAUSE_S) * SAMPLE_RATE_HZ / STEP_SAMPLES)
    assert find_cut(TEXT, "English", pcm, steps, 0, False) is None
    assert find_cut(TEXT, "English", pcm, 0, 9, False) is not None
    assert find_cut(TEXT, "English", pcm, 0, 10, False) is None


def test_a_mark_at_the_end_counts_where_silence_follows() -> None:
    """A model writes one behind whatever it has heard so far."""
    text = "alpha beta gamma delta. Epsilon zeta eta theta iota."
    silent = spoken(4, 5)
    cut = find_cut(text, "English", silent, 0, 0, False)
    assert cut is not None and cut.num_chars == len(text)
    open_end = silent[: -round(PAUSE_S * SAMPLE_RATE_HZ)]
    cut = find_cut(text, "English", open_end, 0, 0, False)
    assert cut is not None and text[: cut.num_chars].endswith("delta.")


def test_a_clause_will_do_at_the_last_chance() -> None:
    text = "alpha beta gamma delta, epsilon zeta eta theta iota kappa"
    pcm = spoken(4, 6)[: -round(PAUSE_S * SAMPLE_RATE_HZ)]
    assert find_cut(text, "English", pcm, 0, 0, False) is None
    cut = find_cut(text, "English", pcm, 0, 0, True)
    assert cut is not None and not cut.is_sentence and text[: cut.num_chars].endswith("delta,")


@pytest.mark.parametrize("noise", [0.0, 5.0, 300.0])
def test_pauses_in_noise(noise: float) -> None:
    spans = speech_spans(spoken(4, 5, 2, noise=noise))
    assert len(spans) == 3
    assert [(end - start) / SAMPLE_RATE_HZ for start, end in spans] == pytest.approx(
        [4 * WORDS_S, 5 * WORDS_S, 2 * WORDS_S], abs=0.05
    )


def test_where_nothing_pauses() -> None:
    steady = RNG.normal(0, 3000, 160_000).astype(np.int16)
    assert speech_spans(steady) == [(0, 160_000)]
    assert find_cut(TEXT, "English", steady, 0, 0, True) is None
    assert speech_spans(np.zeros(0, np.int16)) == [] and speech_spans(np.zeros(100, np.int16)) == [(0, 100)]
    assert find_cut("", "English", np.zeros(16_000, np.int16), 0, 0, True) is None


def test_the_rule_of_the_runtime() -> None:
    policy = RollPolicy(12.0, 16.0, "mark")
    assert policy.ends_after(150, "It is so.", "English") and not policy.ends_after(149, "It is so.", "English")
    assert not policy.ends_after(150, "It is so", "English") and not policy.ends_after(150, "", None)
    assert not RollPolicy(at="fixed").ends_after(200, "It is so.", "English")
    assert policy.ends_before(192, 24) and not policy.ends_before(176, 24) and not policy.ends_before(0, 999)
    with pytest.raises(ValueError, match="at most max_s"):
        RollPolicy(3.0, 2.0)
