import json
import math
import unicodedata
from pathlib import Path

import pytest

from pipeline.metrics import Edit, ErrorCounts, align, count_errors, error_counts, normalize, unit_name

PUBLISHED = Path(__file__).parents[2] / "shared" / "scoring" / "mcif_qwen3_asr_0_6b.jsonl"


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"no published scores at {PUBLISHED}")
def test_published_scores_are_met_exactly():
    items = [json.loads(line) for line in PUBLISHED.read_text().splitlines()]
    assert len(items) == 21
    pooled = ErrorCounts()
    for item in items:
        counts = error_counts(item["reference"], item["hypothesis"], item["language"])
        assert counts.rate == item["wer_whisper"], item["audio_id"]
        pooled += counts
    assert round(pooled.rate, 6) == 0.208859  # its README.md


def test_each_kind_of_error_is_counted():
    assert error_counts("the cat sat down", "a cat sat down now", "English") == ErrorCounts(1, 0, 1, 4)
    assert error_counts("the cat sat down", "cat sat", "English") == ErrorCounts(0, 2, 0, 4)


def test_english_is_scored_as_whisper_scores_it():
    assert error_counts("I can't, it's twenty three colours.", "i can not it is 23 colors", "English").rate == 0


BY_CHARACTER = ["Chinese", "Cantonese", "Japanese", "Thai", "zh", "zh-CN", "yue", "Chinese,English"]


@pytest.mark.parametrize("language", BY_CHARACTER)
def test_languages_without_spaces_are_scored_by_character(language):
    assert unit_name(language) == "CER"
    assert error_counts("你好，世界。", "你 号 世界", language) == ErrorCounts(1, 0, 0, 4)


@pytest.mark.parametrize("language", ["English", "Vietnamese", "Korean", "Hindi", "en", "English,Chinese", ""])
def test_other_languages_are_scored_by_word(language):
    assert unit_name(language) == "WER"


def test_thai_is_counted_by_code_point():
    assert error_counts("ที่นี่", "ที่นี้", "Thai") == ErrorCounts(1, 0, 0, 6)


def test_vietnamese_keeps_its_diacritics_in_either_form():
    text = "Tiếng Việt, Đường đi!"
    assert normalize(text, "Vietnamese") == "tiếng việt đường đi"
    assert normalize(unicodedata.normalize("NFD", text), "Vietnamese") == "tiếng việt đường đi"
    assert error_counts("má", "mà", "Vietnamese").rate == 1


def test_hindi_vowel_signs_do_not_split_words():
    assert normalize("नमस्ते, दुनिया।", "Hindi") == "नमस्ते दुनिया"


def test_turkish_capitals_match_their_own_small_letters():
    assert error_counts("İstanbul Isparta", "istanbul ısparta", "Turkish").rate == 0


def test_accents_outside_english_are_letters():
    assert normalize("Où êtes-vous?", "French") == "où êtes vous"


@pytest.mark.parametrize("language", ["English", "Chinese", "French"])
def test_texts_that_normalize_to_nothing(language):
    assert error_counts("", " !? ", language) == ErrorCounts()
    assert error_counts("好 a", "", language).rate == 1
    extra = error_counts("", "好 a", language)
    assert extra.num_reference == 0
    assert extra.rate == math.inf


def test_counts_pool():
    total = sum([ErrorCounts(1, 2, 3, 10), ErrorCounts(1, 0, 0, 4)], ErrorCounts())
    assert total == ErrorCounts(2, 2, 3, 14)
    assert total.rate == 0.5
    assert ErrorCounts().rate == 0


def test_an_alignment_tells_what_was_said_and_heard():
    edits = align("the cat sat down, sir", "a dog sat right down", "English")
    assert edits == [
        Edit("substitute", ("the", "cat"), ("a", "dog")),
        Edit("equal", ("sat",), ("sat",)),
        Edit("insert", (), ("right",)),
        Edit("equal", ("down",), ("down",)),
        Edit("delete", ("sir",), ()),
    ]
    assert count_errors(edits) == ErrorCounts(2, 1, 1, 5)
    assert align("你好", "你", "Chinese") == [Edit("equal", ("你",), ("你",)), Edit("delete", ("好",), ())]
    assert align("", "", "English") == []
