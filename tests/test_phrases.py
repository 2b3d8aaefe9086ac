"""Phrases that nobody says."""

from __future__ import annotations

import pytest

from pipeline.languages import NAMES
from pipeline.phrases import CLOSINGS, CREDITS, OPENINGS, known_phrase
from pipeline.text import tokens


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("Thanks for watching!", "thanks for watching"),
        ("Thank you for watching. Thank you for watching. Thanks for watching.", "thank you for watching"),
        ("She said thanks for watching the children.", None),
        ("And so it ends. Subtitles by the Amara.org community", "subtitles by the amara.org community"),
        ("It works. Subtitles by Jane Doe.", "subtitles by"),
        ("I read the subtitles by myself.", None),
        ("谢谢观看", "谢谢观看"),
        ("谢谢观看，我们下期再见", "我们下期再见"),
        ("他说谢谢观看这个节目", None),
        ("Hãy subscribe cho kênh Ghiền Mì Gõ", "hãy subscribe cho kênh"),
        ("ご視聴ありがとうございました。", "ご視聴ありがとうございました"),
        ("Untertitel der Amara.org-Community", "untertitel der amara.org-community"),
        ("Спасибо за просмотр!", "спасибо за просмотр"),
        ("", None),
        ("...", None),
    ],
)
def test_known_phrases(text: str, phrase: str | None) -> None:
    assert known_phrase(text, "English", {}, {}) == phrase


def test_users_lists_are_by_language_and_by_whole_words() -> None:
    lists = {"English": ["um"]}
    assert known_phrase("well um yes", "English", lists, {}) == "um"
    assert known_phrase("a number", "English", lists, {}) is None
    assert known_phrase("well um yes", "German", lists, {}) is None
    assert known_phrase("um, um", "English,German", {}, lists) == "um"
    assert known_phrase("um yes", "English", {}, lists) is None


def test_every_phrase_is_found_and_every_language_is_one() -> None:
    for lists in (CREDITS, CLOSINGS, OPENINGS):
        assert set(lists) <= set(NAMES)
        for language, phrases in lists.items():
            assert isinstance(phrases, tuple) and phrases
            for phrase in phrases:
                assert len(tokens(phrase)) >= 1 and known_phrase(phrase.capitalize(), language, {}, {}), phrase
