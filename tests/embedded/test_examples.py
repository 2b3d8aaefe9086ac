"""Drawing training examples, from banks of noise."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.embedded.examples import WINDOW_S, Example, Examples
from pipeline.embedded.speech import DIGIT_WORDS, Bank, DigitClip, write_bank
from pipeline.schema import SAMPLE_RATE_HZ
from tests.engine.tiny import noise

LANGUAGES = ("English", "Chinese")


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bank]:
    made = {}
    for language in LANGUAGES:
        folder = tmp_path_factory.mktemp(language)
        spoken = ((language, f"Sentence {i} about {language}.", "v", noise(1.5 + i % 5, i)) for i in range(12))
        write_bank(folder, spoken)
        made[language] = Bank(folder)
    return made


@pytest.fixture(scope="module")
def digits() -> dict[str, dict[int, list[DigitClip]]]:
    """Two speakers whose clips are as long as real ones are at most."""
    return {
        speaker: {digit: [DigitClip(digit, speaker, noise(0.3 + 0.09 * digit, digit))] for digit in range(10)}
        for speaker in ("ann", "bob")
    }


def drawn(
    banks: dict[str, Bank], digits: dict[str, dict[int, list[DigitClip]]], target_s: float, count: int, seed: int = 1
) -> list[Example]:
    draw = Examples(banks, digits, seed)
    return [draw.example(target_s) for _ in range(count)]


def same(left: list[Example], right: list[Example]) -> bool:
    return all(
        (a.text, a.language, a.context) == (b.text, b.language, b.context) and np.array_equal(a.audio, b.audio)
        for a, b in zip(left, right, strict=True)
    )


def test_a_seed_fixes_the_examples(banks: dict[str, Bank], digits: dict[str, dict[int, list[DigitClip]]]) -> None:
    first, second, other = (Examples(banks, digits, seed).batch(40.0) for seed in (5, 5, 6))
    assert len(first) == len(second) and same(first, second)
    assert [example.text for example in first] != [example.text for example in other]


@pytest.mark.parametrize("target_s", [0.0, 10.0, WINDOW_S])
def test_audio_is_what_a_model_takes(
    banks: dict[str, Bank], digits: dict[str, dict[int, list[DigitClip]]], target_s: float
) -> None:
    for example in drawn(banks, digits, target_s, 60):
        assert example.audio.dtype == np.float32 and example.audio.ndim == 1
        assert np.isfinite(example.audio).all() and 0 < np.abs(example.audio).max() <= 1.0
        assert 0.3 < len(example.audio) / SAMPLE_RATE_HZ <= 30.0
        assert example.language in (*LANGUAGES, "None")


def test_silence_and_digits_have_their_share(
    banks: dict[str, Bank], digits: dict[str, dict[int, list[DigitClip]]]
) -> None:
    examples = drawn(banks, digits, 0.0, 1500)
    silent = [example for example in examples if example.language == "None"]
    words = {word.lower() for word in DIGIT_WORDS}
    spoken = [example for example in examples if set(example.text.lower().replace(".", "").split()) & words]
    assert 0.01 < len(silent) / 1500 < 0.035 and 0.16 < len(spoken) / 1500 < 0.24
    assert {example.text for example in silent} == {""} and {example.language for example in spoken} == {"English"}
    for example in silent:
        assert np.sqrt(np.mean(example.audio**2)) < 0.05, "no speech, a little noise"
    assert 0.6 < sum(bool(example.context) for example in examples) / len(examples) / 0.045 < 1.6


def test_windows_are_filled_and_their_text_is_all_that_is_spoken(banks: dict[str, Bank]) -> None:
    draw = Examples(banks, {}, 3)
    for language, separator in (("English", " "), ("Chinese", "")):
        lengths = {utterance.text: utterance.num_samples for utterance in banks[language].utterances}
        for _ in range(20):
            text, pcm = draw.joined(banks[language], language, 20.0)
            parts = [part + "." for part in text.split(".") if part]
            assert separator.join(part.strip() for part in parts) == text
            spoken = sum(lengths[part.strip()] for part in parts)
            assert len(parts) > 2 and pcm.dtype == np.int16
            assert spoken < len(pcm) <= spoken + (0.4 + 0.9 * len(parts)) * SAMPLE_RATE_HZ
            assert 14.0 < len(pcm) / SAMPLE_RATE_HZ < 21.0


def test_one_sentence_is_one_sentence(banks: dict[str, Bank]) -> None:
    texts = {utterance.text for utterance in banks["English"].utterances}
    draw = Examples(banks, {}, 3)
    assert all(draw.joined(banks["English"], "English", 0.0)[0] in texts for _ in range(30))


def test_batches_have_the_audio_asked_for(
    banks: dict[str, Bank], digits: dict[str, dict[int, list[DigitClip]]]
) -> None:
    draw = Examples(banks, digits, 1)
    for joined in (True, False):
        for _ in range(8):
            seconds = [len(example.audio) / SAMPLE_RATE_HZ for example in draw.batch(45.0, joined)]
            assert 45.0 <= sum(seconds) < 45.0 + 30.0 and sum(seconds[:-1]) < 45.0
            assert joined or max(seconds) < 13.0


def test_without_distortion_audio_changes_its_gain_alone(banks: dict[str, Bank]) -> None:
    draw = Examples(banks, {}, 1)
    clean = noise(2.0, 4) / 32768.0
    draw.distortion = 0.0
    scaled = draw.distort(clean)
    np.testing.assert_allclose(scaled / np.abs(scaled).max(), clean / np.abs(clean).max(), atol=1e-5)
    draw.distortion = 1.0
    changed = sum(np.corrcoef(draw.distort(clean), clean)[0, 1] < 0.9999 for _ in range(20))
    assert changed > 12, "most examples are distorted"
