"""Where sentences end in a transcript.

Transcripts of Qwen3-ASR carry punctuation and case; a full stop ends a sentence unless it belongs to a number, an
initial, an abbreviation or a name. Languages without spaces end theirs with full-width marks.
"""

from __future__ import annotations

import re
import unicodedata

import regex

_WIDE = "。！？｡．"
_MARKS = ".?!…؟۔।॥" + _WIDE
_CLOSERS = "\"'”’»›)]}）】》〉」』"
_END = re.compile(rf"[{re.escape(_MARKS)}]+[{re.escape(_CLOSERS)}]*")
_WORD_BEFORE = re.compile(r"[^\s\"'“‘«(\[（]*$")

# A name follows, whatever its case. Lower case, without the last full stop.
_TITLES = """
    mr mrs ms messrs mme mlle dr drs prof rev hon fr sr sra srta st ste mt ft gen col maj capt cmdr lt sgt cpl pvt adm
    gov sen rep pres supt insp hr herr dott ing dipl tp ts ths gs pgs bs ks vs cf e.g i.e z.b d.h u.a s.o p.ej viz
"""
_TITLE_WORDS = frozenset(_TITLES.split())
_BEFORE_NUMBERS = {"no", "nos", "nr", "num", "núm", "fig", "figs", "vol", "vols", "ch", "sec", "p", "pp", "art", "ca"}
# A number with a full stop is an ordinal: "am 3. Mai", "3. května".
_ORDINAL_DOT = frozenset(
    {"German", "Danish", "Finnish", "Czech", "Hungarian", "Polish", "Norwegian", "Slovak", "Slovenian", "Croatian",
     "Turkish", "Estonian", "Latvian", "Icelandic"}
)  # fmt: skip

# written without spaces: each character counts as a word
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}"
_WORD = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]+"
_TOKEN = regex.compile(rf"[{UNSPACED}]|{_WORD}(?:['’]{_WORD})*", regex.V1)
_UNIT = regex.compile(rf"\s*(?:[{UNSPACED}][^\s{UNSPACED}\p{{L}}\p{{N}}]*|[^\s{UNSPACED}]+)")
_IS_UNSPACED = regex.compile(rf"[{UNSPACED}]")


def tokens(text: str) -> list[str]:
    """The words of `text` in lower case, without marks; single characters in Chinese, Japanese and Thai script."""
    found: list[str] = _TOKEN.findall(unicodedata.normalize("NFC", text).casefold())
    return found


def units(text: str) -> list[str]:
    """Words with the white space before them; single characters, with the marks behind them, of scripts without
    spaces. Joined they are the text without white space around it."""
    found: list[str] = _UNIT.findall(text.strip())
    return found


def is_character(token: str) -> bool:
    """True for a token of a script without spaces."""
    return _IS_UNSPACED.match(token) is not None


def sentence_ends(text: str, language: str | None = None) -> list[int]:
    """Index after each sentence of `text`, its closing quotes included; what follows the last one is no whole sentence.

    `language` is a name as Qwen3-ASR writes it ("German").
    """
    return [match.end() for match in _END.finditer(text) if _ends_sentence(text, match, language)]


def split_sentences(text: str, language: str | None = None) -> list[str]:
    """The sentences of `text` without the white space around them; an unfinished last one counts."""
    ends = sentence_ends(text, language)
    pieces = (text[start:end].strip() for start, end in zip([0, *ends], [*ends, len(text)], strict=True))
    return [piece for piece in pieces if piece]


def letters(text: str) -> str:
    """The letters and digits of `text` in lower case, without marks and spaces: what two texts are compared by."""
    return "".join(char for char in text.lower() if char.isalnum())


def _ends_sentence(text: str, match: re.Match[str], language: str | None) -> bool:
    marks = match[0].rstrip(_CLOSERS)
    rest = text[match.end() :]
    if not rest.strip() or any(mark in _WIDE for mark in marks):
        return True
    following = rest.lstrip()[0]
    if not rest[0].isspace():
        # "example.com", "3.5", "?id=1"; but "好.他" of a model that mixes both kinds of marks
        return not following.isascii() and not following.islower() and not following.isdigit()
    if set(marks) & set("?!؟"):
        return True
    if following.islower():
        return False
    return marks != "." or not _is_abbreviated(text[: match.start()], following, language)


def _is_abbreviated(before: str, following: str, language: str | None) -> bool:
    """True when the full stop between `before` and a word that begins with `following` ends no sentence."""
    match = _WORD_BEFORE.search(before)
    word = match[0] if match else ""
    if len(word) == 1 and word.isalpha() and word.isupper():
        return word != "I" or language not in (None, "English")  # an initial; "so am I." is a sentence
    if word.isdigit() and language in _ORDINAL_DOT:
        return True
    return word.lower() in _TITLE_WORDS or (following.isdigit() and word.lower() in _BEFORE_NUMBERS)
