"""Figures about the text of one segment, each a column of the output and what a filter looks at."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import cache

import regex

from pipeline.languages import scripts
from pipeline.text import is_character, tokens

_TEXT_TAG = "<asr_text>"  # in Qwen3-ASR's raw text, between the language it detected and the transcript
_BETWEEN_HOTWORDS = re.compile(r"[,;:|\n、，；：。.]+")
_HOTWORD_WORDS = 4.0  # a longer item of the prompt is no hotword but a sentence, and is not said word by word


def avg_logprob(token_logprobs: Sequence[float]) -> float | None:
    """Mean log-probability of the tokens, the end token among them; None for no tokens."""
    return sum(token_logprobs) / len(token_logprobs) if len(token_logprobs) else None


def compression_ratio(text: str) -> float:
    """Bytes of the text over its zlib bytes, as Whisper has it (whisper/utils.py): high for loops, 0 for no text."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def char_rate(text: str, duration_s: float) -> float:
    """Characters a second, white space not counted; infinite for text without duration."""
    num_chars = sum(not char.isspace() for char in text)
    if duration_s <= 0:
        return math.inf if num_chars else 0.0
    return num_chars / duration_s


def raw_transcript(text_raw: str) -> str:
    """`text_raw` without what stands before its first `<asr_text>`."""
    _, tag, transcript = text_raw.partition(_TEXT_TAG)
    return transcript if tag else text_raw


def unique_word_share(words: Sequence[str]) -> float | None:
    """Different words over all words; None without any."""
    return len(set(words)) / len(words) if words else None


def max_word_chars(words: Sequence[str]) -> int | None:
    """Characters of the longest word; None without any."""
    return max(map(len, words), default=None)


def script_share(text: str, language: str | None) -> float | None:
    """Of the letters of `text`, the share in the scripts that `language` is written in.

    None for an unknown language and a text without letters.
    """
    names = scripts(language)
    num_letters = len(_letters("L").findall(text))
    if not names or num_letters == 0:
        return None
    return sum(len(_letters(f"Script={name}").findall(text)) for name in names) / num_letters


def context_overlap(text: str, context: str, supports: Sequence[str] = ()) -> tuple[float, float] | None:
    """The longest run of words of `text` that the hotword prompt holds in the same order, and its share of all words.

    A character of Chinese, Japanese or Thai counts as half a word. What lies within one hotword does not count, for it
    is there to be said; nor does what one of `supports` has too, texts of the same audio made without the prompt. None
    without a prompt or without words.
    """
    words = tokens(text)
    prompt, items = _prompt(context)
    if not words or not prompt:
        return None
    longest: Sequence[str] = ()
    for block in SequenceMatcher(None, words, prompt, autojunk=False).get_matching_blocks():
        run, touched = words[block.a : block.a + block.size], items[block.b : block.b + block.size]
        leaks = len(set(touched)) > 1 or (touched and _weight(_item(prompt, items, touched[0])) > _HOTWORD_WORDS)
        if leaks and _weight(run) > _weight(longest) and not any(_holds(tokens(other), run) for other in supports):
            longest = run
    return _weight(longest), _weight(longest) / _weight(words)


@cache
def _letters(kind: str) -> regex.Pattern[str]:
    return regex.compile(r"\p{L}" if kind == "L" else rf"[\p{{L}}&&\p{{{kind}}}]", regex.V1)


@cache
def _prompt(context: str) -> tuple[list[str], list[int]]:
    """The words of the prompt, and for each the number of the hotword that it belongs to."""
    words: list[str] = []
    items: list[int] = []
    for number, hotword in enumerate(_BETWEEN_HOTWORDS.split(context)):
        found = tokens(hotword)
        words += found
        items += [number] * len(found)
    return words, items


def _item(prompt: Sequence[str], items: Sequence[int], number: int) -> list[str]:
    return [word for word, item in zip(prompt, items, strict=True) if item == number]


def _weight(words: Sequence[str]) -> float:
    return sum(0.5 if is_character(word) else 1.0 for word in words)


def _holds(words: Sequence[str], run: Sequence[str]) -> bool:
    return f" {' '.join(run)} " in f" {' '.join(words)} "
