"""Figures about a segment's text."""

from __future__ import annotations

import math

import pytest

from pipeline.figures import (
    avg_logprob,
    char_rate,
    compression_ratio,
    context_overlap,
    max_word_chars,
    raw_transcript,
    script_share,
    unique_word_share,
)
from pipeline.text import tokens


def test_figures() -> None:
    assert avg_logprob([]) is None
    assert avg_logprob([-1.0, -2.0, -6.0]) == -3.0
    assert math.isnan(avg_logprob([math.nan, -1.0]) or 0.0)
    assert char_rate("ab c\n", 1.5) == 2.0
    assert char_rate("", 0.0) == 0.0
    assert char_rate("a", 0.0) == math.inf
    assert compression_ratio("") == 0.0
    assert compression_ratio("a" * 1000) > 20
    assert compression_ratio("你好") == 6 / 14  # of UTF-8 bytes
    assert unique_word_share(tokens("No, no, NO - yes!")) == 0.5
    assert unique_word_share(tokens("好好学习")) == 0.75, "by character"
    assert unique_word_share([]) is None and max_word_chars([]) is None
    assert max_word_chars(tokens("it's a Reißverschluss, 你好你好")) == 15  # "ss" of the folded ß


def test_the_raw_transcript_starts_after_the_first_tag() -> None:
    assert raw_transcript("language English<asr_text>yes<asr_text>") == "yes<asr_text>"
    assert raw_transcript("a forced language writes no tag") == "a forced language writes no tag"


def test_tokens_are_words_or_characters() -> None:
    assert tokens("Don’t stop: 3.5 km!") == ["don’t", "stop", "3", "5", "km"]
    assert tokens("我用 Python 写") == ["我", "用", "python", "写"]
    assert tokens("Việt Nam") == tokens("Việt Nam"), "composed and not"
    assert tokens("हिन्दी में") == ["हिन्दी", "में"], "marks belong to their word"
    assert tokens("สวัสดี") == list("สวัสดี")
    assert tokens("... — ?") == []


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("Good morning", "English", 1.0),
        ("доброе утро", "English", 0.0),
        ("Привет Bob", "Russian", 2 / 3),
        ("我用 Python", "Chinese", 0.25),
        ("我用 Python", "Chinese,English", 1.0),
        ("漢字とカタカナ", "Japanese", 1.0),
        ("漢字とカタカナ", "Chinese", 2 / 7),
        ("सुप्रभात", "Hindi", 1.0),
        ("Xin chào các bạn", "Vietnamese", 1.0),
        ("42!", "English", None),
        ("", "English", None),
        ("anything", "Klingon", None),
        ("anything", None, None),
    ],
)
def test_share_of_letters_in_the_scripts_of_the_language(text: str, language: str | None, share: float | None) -> None:
    assert script_share(text, language) == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("text", "context", "overlap"),
    [
        ("Alice, Bob, Carol.", "Alice, Bob, Carol", (3, 1.0)),
        ("and then Alice, Bob and so on", "Alice, Bob, Carol", (2, 2 / 7)),
        ("We flew to New York City", "New York City, Boston", (0, 0)),
        ("A talk about light and matter. So", "A talk about light and matter.", (6, 6 / 7)),
        ("张三，李四", "张三，李四，王五", (2, 1.0)),
        ("nothing of it", "Alice, Bob", (0, 0)),
        ("nothing", "", None),
        ("", "Alice, Bob", None),
    ],
)
def test_run_of_words_that_are_the_prompts(text: str, context: str, overlap: tuple[float, float] | None) -> None:
    assert context_overlap(text, context) == (None if overlap is None else pytest.approx(overlap))


def test_a_supported_run_is_no_leak() -> None:
    assert context_overlap("Alice, Bob", "Alice, Bob", ["so alice bob said"]) == (0, 0)
    assert context_overlap("Alice, Bob", "Alice, Bob", ["alice said bob"]) == (2, 1.0)
