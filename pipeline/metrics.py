"""Word and character error rates, normalized as Whisper does, so that figures compare with published ones."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, cast

# Written without spaces between words. Names as Qwen3-ASR writes them, and codes as data sets do.
_BY_CHARACTER = frozenset({"chinese", "zh", "cmn", "cantonese", "yue", "japanese", "ja", "jpn", "thai", "th", "tha"})
_ENGLISH = frozenset({"english", "en", "eng"})
_TURKISH = frozenset({"turkish", "tr", "tur"})


@dataclass(frozen=True, slots=True)
class ErrorCounts:
    """Errors against `num_reference` words (or characters) of reference; `+` pools."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    num_reference: int = 0

    @property
    def num_errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors over reference, 0.05 for 5 %. Without any reference: 0 for no errors, else infinite."""
        if self.num_reference == 0:
            return math.inf if self.num_errors else 0.0
        return self.num_errors / self.num_reference

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.num_reference + other.num_reference,
        )


def unit_name(language: str) -> Literal["WER", "CER"]:
    """What `error_counts` of this language add up to: "CER" for Chinese, Cantonese, Japanese and Thai, else "WER"."""
    return "CER" if _main_language(language) in _BY_CHARACTER else "WER"


def normalize(text: str, language: str) -> str:
    """The text as it is scored: lower case, no punctuation, nothing in brackets, single spaces.

    `language` is a name ("Vietnamese"), a code ("vi", "zh-CN") or several by comma, of which the first decides. English
    goes through Whisper's EnglishTextNormalizer (which also writes number words as digits, contractions in
    full, and American spelling), any other language through its BasicTextNormalizer, with marks kept: without
    them Hindi vowels fall out and split words. Accented letters stay, in composed form (NFKC).
    """
    main = _main_language(language)
    if main in _TURKISH:
        text = text.replace("İ", "i").replace("I", "ı")  # Unicode's own lower case: "i" with a second dot, and "i"
    return _normalizer(main in _ENGLISH)(text).strip()


EditKind = Literal["equal", "substitute", "delete", "insert"]


@dataclass(frozen=True, slots=True)
class Edit:
    """A run of one kind in an alignment: its words (or characters) in the reference and in the hypothesis.

    Of "substitute" there are as many in both, of "delete" none in the hypothesis, of "insert" none in the reference.
    """

    kind: EditKind
    reference: tuple[str, ...]
    hypothesis: tuple[str, ...]


def align(reference: str, hypothesis: str, language: str) -> list[Edit]:
    """The cheapest way from reference to hypothesis, both normalized: by word, or by character (code point) where
    `unit_name` is CER."""
    import jiwer

    reference, hypothesis = normalize(reference, language), normalize(hypothesis, language)
    output: jiwer.CharacterOutput | jiwer.WordOutput
    if unit_name(language) == "CER":
        output = jiwer.process_characters(reference.replace(" ", ""), hypothesis.replace(" ", ""))
    else:
        output = jiwer.process_words(reference, hypothesis)
    said, heard = output.references[0], output.hypotheses[0]
    return [
        Edit(
            cast(EditKind, chunk.type),
            tuple(said[chunk.ref_start_idx : chunk.ref_end_idx]),
            tuple(heard[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in output.alignments[0]
    ]


def count_errors(edits: Iterable[Edit]) -> ErrorCounts:
    """The errors of an alignment."""
    num: Counter[str] = Counter()
    num_reference = 0
    for edit in edits:
        num[edit.kind] += max(len(edit.reference), len(edit.hypothesis))
        num_reference += len(edit.reference)
    return ErrorCounts(num["substitute"], num["delete"], num["insert"], num_reference)


def error_counts(reference: str, hypothesis: str, language: str) -> ErrorCounts:
    """Errors of the hypothesis, both normalized: of words, or of characters (code points) where `unit_name` is CER."""
    return count_errors(align(reference, hypothesis, language))


def error_counts_by_part(reference: str, parts: Sequence[str], language: str) -> list[ErrorCounts]:
    """Errors of each of consecutive `parts` of a hypothesis against a reference of the whole.

    Parts and reference are aligned as one. Reference words that the hypothesis lacks where one part ends and another
    begins count for both, as either may have lost them.
    """
    import jiwer

    by_character = unit_name(language) == "CER"
    whole, *texts = (normalize(text, language) for text in (reference, *parts))
    words = [list(text.replace(" ", "")) if by_character else text.split() for text in texts]
    ends = list(itertools.accumulate(map(len, words)))
    spans = list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []
    said = [word for part in words for word in part]
    process = jiwer.process_characters if by_character else jiwer.process_words
    joiner = "" if by_character else " "
    output = process(whole.replace(" ", "") if by_character else whole, joiner.join(said))
    counts = [[0, 0, 0, 0] for _ in parts]  # substitutions, deletions, insertions, reference words
    for chunk in output.alignments[0]:
        num_lost = chunk.ref_end_idx - chunk.ref_start_idx
        for count, (start, end) in zip(counts, spans, strict=True):
            if chunk.type == "delete":
                if start <= chunk.hyp_start_idx <= end:
                    count[1] += num_lost
                    count[3] += num_lost
                continue
            shared = min(end, chunk.hyp_end_idx) - max(start, chunk.hyp_start_idx)
            if shared > 0:
                count[0] += shared * (chunk.type == "substitute")
                count[2] += shared * (chunk.type == "insert")
                count[3] += shared * (chunk.type != "insert")
    return [ErrorCounts(*count) for count in counts]


def _main_language(language: str) -> str:
    """The first of `language`, lower case, without a region: "english" of "English,Chinese", "zh" of "zh-CN"."""
    return re.split(r"[,_-]", language, maxsplit=1)[0].strip().lower()


@cache
def _normalizer(english: bool) -> Callable[[str], str]:
    normalizer: Callable[[str], str]
    if english:
        from whisper_normalizer.english import EnglishTextNormalizer

        normalizer = EnglishTextNormalizer()
    else:
        from whisper_normalizer.basic import BasicTextNormalizer

        normalizer = BasicTextNormalizer(preserve_marks=True)
    return normalizer
