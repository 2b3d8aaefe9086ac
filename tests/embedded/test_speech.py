"""Speech that espeak-ng synthesizes, and digits that people spoke."""

from __future__ import annotations

import random
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.embedded import speech
from pipeline.embedded.grammar import LANGUAGES
from pipeline.embedded.speech import (
    ACCENTS,
    DIGIT_WORDS,
    VARIANTS,
    Bank,
    DigitClip,
    digit_string,
    load_digits,
    sentences,
    set_of,
    sounds,
    speak,
    speak_all,
    trim,
    write_bank,
)
from pipeline.schema import SAMPLE_RATE_HZ

FSDD = Path(__file__).parents[3] / "shared" / "speech" / "fsdd"
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
needs_fsdd = pytest.mark.skipif(not FSDD.is_dir(), reason="no spoken digits in ../shared/speech/fsdd")


def test_every_voice_is_of_one_set() -> None:
    voices = [voice for variants in VARIANTS.values() for voice in variants]
    assert len(voices) == len(set(voices)) == 73
    assert {name: len(variants) for name, variants in VARIANTS.items()} == {"train": 59, "dev": 4, "test": 10}


def test_every_sentence_is_of_one_set() -> None:
    for language in LANGUAGES:
        sets = {subset: set(sentences(language, subset, 200, random.Random(3))) for subset in VARIANTS}
        assert {len(texts) for texts in sets.values()} == {200}, "distinct"
        assert len(set().union(*sets.values())) == 600, "and disjoint"
        assert all(set_of(text) == subset for subset, texts in sets.items() for text in texts)


def test_the_share_of_a_set_does_not_depend_on_the_language() -> None:
    shares = Counter(set_of(f"any text {number}") for number in range(20_000))
    assert shares["test"] / 20_000 == pytest.approx(16 / 256, abs=0.006)
    assert shares["dev"] / 20_000 == pytest.approx(8 / 256, abs=0.005)
    assert set_of("She traveled to Houston with my grandmother seventeen days ago.") == "train"


@needs_espeak
@pytest.mark.parametrize(
    ("language", "text"), [("English", "One table."), ("Vietnamese", "Một cái."), ("Chinese", "你好。")]
)
def test_speech_is_16_khz_without_silence_around_it(language: str, text: str) -> None:
    pcm = speak(language, text, f"{ACCENTS[language][0]}+m3", 170, 50)
    assert pcm is not None and pcm.dtype == np.int16 and pcm.ndim == 1
    assert 0.3 < len(pcm) / SAMPLE_RATE_HZ < 3
    again = speak(language, text, f"{ACCENTS[language][0]}+m3", 170, 50)
    np.testing.assert_array_equal(pcm, again)
    loud = np.flatnonzero(np.abs(pcm.astype(int)) > 0.01 * np.abs(pcm.astype(int)).max())
    margin = 0.05 * SAMPLE_RATE_HZ
    assert loud[0] <= margin and len(pcm) - 1 - loud[-1] <= margin


@needs_espeak
def test_pace_and_voice_are_heard() -> None:
    slow, fast, high = (
        speak("English", "A rather long sentence about nothing.", "en-us+f3", pace, pitch)
        for pace, pitch in ((130, 50), (200, 50), (130, 75))
    )
    assert slow is not None and fast is not None and high is not None
    assert len(fast) < 0.8 * len(slow)
    assert len(high) != len(slow) or not np.array_equal(high, slow)


@needs_espeak
def test_a_bank_holds_what_was_spoken(tmp_path: Path) -> None:
    spoken = list(speak_all("Vietnamese", "dev", 3, seed=1))
    assert len(spoken) == 3
    for language, text, voice, _ in spoken:
        assert language == "Vietnamese" and set_of(text) == "dev" and voice.partition("+")[2] in VARIANTS["dev"]
    write_bank(tmp_path / "bank", iter(spoken))
    again = list(speak_all("Vietnamese", "dev", 3, seed=1))
    assert [text for _, text, _, _ in again] == [text for _, text, _, _ in spoken]
    for index, (_, text, voice, pcm) in enumerate(again):
        utterance = Bank(tmp_path / "bank").utterances[index]
        assert (utterance.text, utterance.voice) == (text, voice)
        np.testing.assert_array_equal(Bank(tmp_path / "bank").pcm(index), pcm)


def test_without_espeak_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"espeak-ng is not installed.*\(Debian: espeak-ng\)"):
        speak("English", "a", "en-us", 170, 50)


def test_a_bank_that_is_there_stays(tmp_path: Path) -> None:
    first = np.arange(100, dtype=np.int16)
    write_bank(tmp_path, iter([("English", "one", "v", first), ("English", "two", "w", first[:50])]))
    write_bank(tmp_path, iter([("English", "other", "v", first[:7])]))
    bank = Bank(tmp_path)
    assert len(bank) == 2 and [utterance.text for utterance in bank.utterances] == ["one", "two"]
    np.testing.assert_array_equal(bank.pcm(0), first)
    np.testing.assert_array_equal(bank.pcm(1), first[:50])


@pytest.mark.parametrize(
    ("language", "text", "heard"),
    [
        ("English", "What a small pencil, Anna!", "what a small pencil anna"),
        ("Vietnamese", "Chị Yến, đi Huế?", "chị yến đi huế"),
        ("Chinese", "你好，我叫小明。", "ni3 hao3  wo3 jiao4 xiao3 ming2 "),
    ],
)
def test_sounds_are_letters_and_tones(language: str, text: str, heard: str) -> None:
    assert sounds(language, text).split() == heard.split()


def test_every_chinese_syllable_has_a_tone() -> None:
    for text in sentences("Chinese", "train", 100, random.Random(5)):
        syllables = sounds("Chinese", text).split()
        assert len(syllables) == sum(map(str.isalpha, text)), text
        assert all(syllable[-1] in "12345" and syllable[:-1].isalpha() for syllable in syllables), text


def test_trim_leaves_a_margin() -> None:
    pcm = np.zeros(1000, np.int16)
    pcm[400:500] = 1000
    pcm[100] = 5  # under 1 % of the peak
    margin_s = 50 / SAMPLE_RATE_HZ
    np.testing.assert_array_equal(trim(pcm, margin_s), pcm[350:549])
    np.testing.assert_array_equal(trim(pcm[390:510], margin_s), pcm[390:510])
    assert len(trim(np.full(10, -32768, np.int16), 0.0)) == 9


def clips_of(level: int) -> dict[int, list[DigitClip]]:
    """Ten digits, each of a length and a sign pattern of its own."""
    rng = np.random.default_rng(1)
    return {
        digit: [DigitClip(digit, "s", (rng.choice([-level, level], 4000 + 100 * digit)).astype(np.int16))]
        for digit in range(10)
    }


@pytest.mark.parametrize("count", [1, 5, 8])
def test_a_digit_string_is_its_digits_with_pauses(count: int) -> None:
    clips = clips_of(300)
    text, pcm = digit_string(clips, random.Random(count), count)
    words = text.removesuffix(".").lower().split()
    assert len(words) == count and text[0].isupper() and text.endswith(".") and pcm.dtype == np.int16
    position, pauses = 0, []
    for number, word in enumerate(words):
        clip = clips[DIGIT_WORDS.index(word)][0].pcm
        piece = pcm[position : position + len(clip)]
        np.testing.assert_array_equal(np.sign(piece), np.sign(clip)), "in the order of the text"
        assert np.abs(piece.astype(int)).mean() == pytest.approx(2500, rel=0.02), "at one level"
        position += len(clip)
        rest = np.flatnonzero(pcm[position:])
        pause = int(rest[0]) if len(rest) else len(pcm) - position
        assert pause > 0 or number == count - 1
        pauses.append(pause / SAMPLE_RATE_HZ)
        position += pause
    assert pauses.pop() == 0, "none at the end"
    assert all(0.059 < pause < 0.351 for pause in pauses)
    assert digit_string(clips, random.Random(count), count)[0] == text


def test_a_loud_digit_does_not_wrap_around() -> None:
    spike = np.zeros(4000, np.int16)
    spike[2000] = -32768
    _, pcm = digit_string({digit: [DigitClip(digit, "s", spike)] for digit in range(10)}, random.Random(1), 1)
    assert pcm[2000] == -32768 and pcm.max() == 0


def test_no_digits_is_an_error_that_names_their_source(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="free-spoken-digit-dataset"):
        load_digits(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    assert load_digits(tmp_path) == []


@needs_fsdd
def test_the_real_digits() -> None:
    clips = load_digits(FSDD)
    assert len(clips) == 2700
    assert set(Counter((clip.speaker, clip.digit) for clip in clips).values()) == {45}
    assert len({clip.speaker for clip in clips}) == 6 and speech.DIGITS_TEST_SPEAKER in {c.speaker for c in clips}
    assert all(clip.pcm.dtype == np.int16 and 0.05 < len(clip.pcm) / SAMPLE_RATE_HZ < 2.5 for clip in clips)
