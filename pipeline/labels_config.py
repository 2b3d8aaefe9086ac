"""What decides which rows are kept: thresholds of the filters, by language where they differ, and how to fit them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, field_validator, model_validator

from pipeline.languages import NAMES, language_name
from pipeline.section import Section

THRESHOLDS = (
    "min_duration_s", "max_duration_s", "min_speech_ratio", "min_avg_logprob", "max_compression_ratio",
    "min_unique_word_share", "max_word_chars", "min_char_rate", "max_char_rate", "max_context_run", "max_context_share",
    "min_script_share", "max_agreement_wer", "max_reference_wer",
)  # fmt: skip
"""The keys that a language may have of its own."""

_PAIRS = (("min_duration_s", "max_duration_s"), ("min_char_rate", "max_char_rate"))


def _known_language(name: Any) -> Any:
    """A code or a name of Qwen3-ASR's languages as its name. Raises ValueError for another."""
    if not isinstance(name, str):
        return name
    found = language_name(name)
    if found not in NAMES:
        raise ValueError(f"{name} is none of Qwen3-ASR's languages: {', '.join(NAMES)}")
    return found


def _known_thresholds(values: Mapping[str, float | None]) -> Mapping[str, float | None]:
    for key in values:
        if key not in THRESHOLDS:
            raise ValueError(f"{key} is no threshold; they are {', '.join(THRESHOLDS)}")
    return values


_Language = Annotated[str, BeforeValidator(_known_language)]
_Thresholds = Annotated[dict[str, float | None], AfterValidator(_known_thresholds)]
_Phrases = dict[_Language, list[Annotated[str, Field(min_length=1)]]]


class CalibrateConfig(Section):
    """Fits thresholds by language before the job, on a sample that all its units share. A fit only ever tightens."""

    output: str | None = None  # of another job: fit on all its rows; null: transcribe `units` units of this job for it
    units: PositiveInt = 8
    min_segments: PositiveInt = 100  # with text; a language with fewer keeps the thresholds of all
    char_rate_iqr: float | None = Field(1.5, ge=0)  # char_rate: so many interquartile ranges beyond the quartiles
    quantiles: dict[str, float] = Field(default_factory=dict)  # {min_avg_logprob: 0.05}: the lowest 5 % are caught

    @field_validator("quantiles")
    @classmethod
    def _shares_of_thresholds(cls, quantiles: dict[str, float]) -> dict[str, float]:
        _known_thresholds(quantiles)
        for key, share in quantiles.items():
            if not 0 < share < 1:
                raise ValueError(f"{key}: {share:g} is no quantile; it lies between 0 and 1")
        return quantiles


class LabelsConfig(Section):
    """The filters; a row that one of them catches is kept and marked (`keep`, `filter_reasons`). null is off.

    A value that a row does not have catches nothing.
    """

    min_duration_s: float | None = None
    max_duration_s: float | None = None
    min_speech_ratio: float | None = None
    min_avg_logprob: float | None = -1.0
    max_compression_ratio: float | None = 2.4
    min_unique_word_share: float | None = None  # per character in Chinese, Japanese, Thai
    max_word_chars: float | None = None
    min_char_rate: float | None = None  # characters a second
    max_char_rate: float | None = 40.0
    known_phrases: bool = False  # texts of pipeline/phrases.py, and the two lists below
    phrases: _Phrases = Field(default_factory=dict)  # caught wherever they stand in a text of that language
    whole_phrases: _Phrases = Field(default_factory=dict)  # caught where a text is nothing else
    max_context_run: float | None = None  # words (half of it: characters) in a row that are the hotword prompt's
    max_context_share: float | None = None  # of the text's words that are such a run
    min_script_share: float | None = None  # of the text's letters, in the scripts that its language is written in
    max_agreement_wer: float | None = None  # of agree_with's text against this one; its failure is caught, too
    max_reference_wer: float | None = None  # against text_ref, where a unit holds the whole recording
    keep_causal: bool = True  # what a causal engine wrote
    languages: dict[_Language, _Thresholds] = Field(default_factory=dict)  # {Thai: {min_unique_word_share: 0.08}}
    calibrate: CalibrateConfig | None = None

    @model_validator(mode="after")
    def _ordered(self) -> LabelsConfig:
        for language in (None, *self.languages):
            values = self.thresholds(language)
            for low, high in _PAIRS:
                least, most = values[low], values[high]
                if least is not None and most is not None and least > most:
                    where = f"languages.{language}: " if language else ""
                    raise ValueError(f"{where}{low} ({least:g}) must not be above {high} ({most:g})")
        return self

    def thresholds(self, language: str | None) -> dict[str, float | None]:
        """Threshold key -> limit for rows of a language; of several ("English,Chinese"), the first decides."""
        values = {key: getattr(self, key) for key in THRESHOLDS}
        return values | self.languages.get((language or "").partition(",")[0], {})


class TeacherLabelsConfig(LabelsConfig):
    """The same keys, with defaults for labels that a model is to be trained on."""

    min_duration_s: float | None = 0.5
    max_duration_s: float | None = 40.0
    min_unique_word_share: float | None = 0.4
    max_word_chars: float | None = 40.0
    known_phrases: bool = True
    max_context_run: float | None = 6.0
    max_context_share: float | None = 0.5
    min_script_share: float | None = 0.5
    max_agreement_wer: float | None = 0.2
    max_reference_wer: float | None = 0.1
    keep_causal: bool = False
    # by character, a long text in few letters has few different ones without being a loop
    languages: dict[_Language, _Thresholds] = {
        "Japanese": {"min_unique_word_share": 0.2},
        "Thai": {"min_unique_word_share": 0.08},
    }
