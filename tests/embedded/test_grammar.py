"""The sentences of the embedded family."""

from __future__ import annotations

import hashlib
import random
import string
import unicodedata

import pytest

from pipeline.embedded import grammar
from pipeline.embedded.grammar import LANGUAGES, sentence

ENDS = {"English": ".?!", "Vietnamese": ".?!", "Chinese": "。？！"}
COMMA = {"English": ",", "Vietnamese": ",", "Chinese": "，"}
VOCABULARY = {"English": 480, "Vietnamese": 500, "Chinese": 470}  # words; characters for Chinese


def drawn(language: str, count: int = 3000, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    return [sentence(language, rng) for _ in range(count)]


@pytest.fixture(scope="module", params=LANGUAGES)
def language_and_texts(request: pytest.FixtureRequest) -> tuple[str, list[str]]:
    return request.param, drawn(request.param)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_seed_fixes_the_sentences(language: str) -> None:
    assert drawn(language, 50, seed=7) == drawn(language, 50, seed=7) != drawn(language, 50, seed=8)


def test_the_sentences_of_a_seed_stay_what_they_are() -> None:
    """The checkpoints were trained on them: another sentence here means another training set."""
    texts = "\n".join(text for language in LANGUAGES for text in drawn(language, 500, seed=2026))
    assert texts.startswith("She traveled to Houston with my grandmother seventeen days ago.\n")
    assert hashlib.blake2b(texts.encode(), digest_size=8).hexdigest() == "bb113b586ba2444a"


def test_punctuation_and_capitals(language_and_texts: tuple[str, list[str]]) -> None:
    language, texts = language_and_texts
    for text in texts:
        assert text[-1] in ENDS[language] and not any(mark in text[:-1] for mark in ENDS[language]), text
        assert text[0] == text[0].upper() and text[0].isalpha(), text
        assert COMMA[language] * 2 not in text and text[-2].isalpha(), text
    assert {text[-1] for text in texts} == set(ENDS[language])


def test_characters(language_and_texts: tuple[str, list[str]]) -> None:
    """Nothing of the grammar's own notation is left, no digit, no character of another script."""
    language, texts = language_and_texts
    marks = set(ENDS[language] + COMMA[language])
    for text in texts:
        letters = set(text) - marks
        if language == "Chinese":
            assert all("\u4e00" <= letter <= "\u9fff" for letter in letters), text
        else:
            assert "  " not in text and text == text.strip() and unicodedata.is_normalized("NFC", text), text
            letters.discard(" ")
            assert all(letter.isalpha() and "LATIN" in unicodedata.name(letter) for letter in letters), text
        if language == "English":
            assert letters <= set(string.ascii_letters), text


def test_sentences_hardly_repeat(language_and_texts: tuple[str, list[str]]) -> None:
    _, texts = language_and_texts
    assert len(set(texts)) > 0.99 * len(texts)


def test_there_are_many_words(language_and_texts: tuple[str, list[str]]) -> None:
    language, texts = language_and_texts
    spoken = [text.strip("".join(ENDS[language])).replace(COMMA[language], "").lower() for text in texts]
    words = set().union(*(text if language == "Chinese" else text.split() for text in spoken))
    assert len(words) >= VOCABULARY[language]


def test_lengths(language_and_texts: tuple[str, list[str]]) -> None:
    language, texts = language_and_texts
    lengths = [sum(map(str.isalpha, text)) if language == "Chinese" else len(text.split()) for text in texts]
    _, _, shortest, longest = grammar._GRAMMARS[language]
    assert shortest <= min(lengths) and max(lengths) <= longest and len(set(lengths)) >= 8


def test_articles_agree() -> None:
    for text in drawn("English"):
        words = text.strip(".?!").lower().replace(",", "").split()
        for article, word in zip(words, words[1:], strict=False):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou"), text


def test_every_slot_that_is_named_exists() -> None:
    for language, (table, *_) in grammar._GRAMMARS.items():
        used = {match[1] for entries in table.values() for entry in entries for match in grammar._SLOT.finditer(entry)}
        assert used - {None} == set(table) - {"sentence"}, language


@pytest.mark.parametrize(
    ("language", "number", "text"),
    [
        ("English", 0, "zero"),
        ("English", 40, "forty"),
        ("English", 99, "ninety nine"),
        ("English", 105, "one hundred and five"),
        ("English", 2013, "two thousand and thirteen"),
        ("English", 9999, "nine thousand nine hundred and ninety nine"),
        ("Vietnamese", 15, "mười lăm"),
        ("Vietnamese", 21, "hai mươi mốt"),
        ("Vietnamese", 44, "bốn mươi tư"),
        ("Vietnamese", 105, "một trăm linh năm"),
        ("Vietnamese", 1005, "một nghìn không trăm linh năm"),
        ("Chinese", 2, "两"),
        ("Chinese", 12, "十二"),
        ("Chinese", 110, "一百一十"),
        ("Chinese", 202, "两百零二"),
        ("Chinese", 2002, "两千零二"),
        ("Chinese", 1010, "一千零一十"),
    ],
)
def test_numbers_are_spelled_as_they_are_said(language: str, number: int, text: str) -> None:
    assert grammar._GRAMMARS[language][1](number) == text


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_numbers_are_spelled_alike(language: str) -> None:
    spell = grammar._GRAMMARS[language][1]
    spelled = [spell(number) for number in range(10_000)]
    assert len(set(spelled)) == 10_000 and all(text == text.strip() and "  " not in text for text in spelled)


def test_an_unknown_language_is_named() -> None:
    with pytest.raises(ValueError, match="unknown language 'Klingon'; known are English, Vietnamese, Chinese"):
        sentence("Klingon", random.Random(0))
