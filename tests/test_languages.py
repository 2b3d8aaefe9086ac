from __future__ import annotations

import pytest
from qwen_asr.inference.utils import SUPPORTED_LANGUAGES

from pipeline import languages
from pipeline.languages import is_known, language_code, language_name


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("en", "English"),
        ("EN", "English"),
        ("en-US", "English"),
        ("en_US", "English"),
        (" vi ", "Vietnamese"),
        ("english", "English"),
        ("Chinese", "Chinese"),
        ("zh-Hans-CN", "Chinese"),
        ("yue", "Cantonese"),
        ("fil", "Filipino"),
        ("tl", "Filipino"),
    ],
)
def test_codes_and_names_give_the_name(given: str, name: str) -> None:
    assert language_name(given) == name


@pytest.mark.parametrize("given", ["", "Klingon", "xx", "eng", "None", " Klingon "])
def test_what_is_not_known_comes_back_as_it_is(given: str) -> None:
    assert language_name(given) == given


def test_the_names_are_those_of_qwen_asr() -> None:
    assert set(languages._NAMES.values()) == set(SUPPORTED_LANGUAGES)
    for name in SUPPORTED_LANGUAGES:
        assert language_name(name) == name == language_name(name.lower())


def test_a_name_is_known_and_has_a_code() -> None:
    assert is_known("Filipino") and not is_known("filipino") and not is_known("")
    assert [language_code(name) for name in ("Filipino", "Chinese", "Klingon")] == ["fil", "zh", "Klingon"]
