"""The label step: which filters catch a row, and with which code."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from pipeline.config import PseudolabelConfig, TranscribeConfig
from pipeline.label import LIMITS, beyond, label, label_unit, reference_wers
from pipeline.labels_config import THRESHOLDS
from pipeline.schema import REASONS, TRANSCRIPTS, Hypothesis, Labels
from pipeline.units import TranscribedSegment, UnitKey
from tests import rows

GOOD = {
    "duration": 5.0, "speech_ratio": 0.8, "avg_logprob": -0.1, "compression_ratio": 1.2, "unique_word_share": 0.9,
    "max_word_chars": 9, "char_rate": 14.0, "context_run": 0.0, "context_share": 0.0, "script_share": 1.0,
    "agreement_wer": 0.05, "reference_wer": 0.0,
}  # fmt: skip


def config(**labels: Any) -> TranscribeConfig:
    return TranscribeConfig.model_validate({"inputs": ["a"], "output": "o", "labels": labels})


def teacher(**sections: Any) -> PseudolabelConfig:
    return PseudolabelConfig.model_validate({"inputs": ["a"], "output": "o"} | sections)


LIMITS_OF_A_TEACHER = teacher(labels={"min_speech_ratio": 0.5, "min_char_rate": 1}).labels.thresholds("English")


def segment(text: str, text_raw: str | None = None, language: str = "English", **fields: Any) -> TranscribedSegment:
    made = rows.segment("a", text=text, language=language)
    assert made.hypothesis is not None
    if text_raw is not None:
        made = replace(made, hypothesis=replace(made.hypothesis, text_raw=text_raw))
    return replace(made, **({"text_ref": None} | fields))


def ended(row: TranscribedSegment, finish_reason: str) -> TranscribedSegment:
    assert row.hypothesis is not None
    return replace(row, hypothesis=replace(row.hypothesis, finish_reason=finish_reason))


def reasons(row: TranscribedSegment, job: TranscribeConfig, engine: str = "offline", **options: Any) -> list[str]:
    return list(label(row, job, engine, **options).filter_reasons)


def test_every_limit_is_a_column_with_thresholds_and_a_reason() -> None:
    named = [key for limit in LIMITS for key in (limit.low, limit.high) if key]
    assert sorted(named) == sorted(THRESHOLDS)
    assert {limit.column for limit in LIMITS} <= set(TRANSCRIPTS.names) and GOOD.keys() == {
        each.column for each in LIMITS
    }
    assert {limit.reason for limit in LIMITS} <= set(REASONS)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("duration", 0.49, "duration"),
        ("duration", 40.1, "duration"),
        ("speech_ratio", 0.49, "no_speech"),
        ("avg_logprob", -1.01, "low_logprob"),
        ("avg_logprob", -math.inf, "low_logprob"),
        ("avg_logprob", math.nan, "low_logprob"),
        ("compression_ratio", 2.41, "repetitive"),
        ("unique_word_share", 0.39, "few_unique_words"),
        ("max_word_chars", 41, "long_word"),
        ("char_rate", 40.1, "char_rate"),
        ("char_rate", 0.9, "char_rate"),
        ("char_rate", math.inf, "char_rate"),
        ("context_run", 6.5, "context_leak"),
        ("context_share", 0.51, "context_leak"),
        ("script_share", 0.49, "wrong_script"),
        ("agreement_wer", 0.21, "disagreement"),
        ("reference_wer", 0.11, "reference_mismatch"),
    ],
)
def test_each_limit_catches_with_its_code(column: str, value: float, reason: str) -> None:
    assert beyond(GOOD, LIMITS_OF_A_TEACHER) == set()
    assert beyond(GOOD | {column: value}, LIMITS_OF_A_TEACHER) == {reason}
    assert beyond(GOOD | {column: value}, dict.fromkeys(THRESHOLDS)) == set(), "a filter that is off"
    assert beyond(GOOD | {column: None}, LIMITS_OF_A_TEACHER) == set(), "no value"


def test_a_value_at_its_limit_is_kept() -> None:
    for limit in LIMITS:
        for key in filter(None, (limit.low, limit.high)):
            assert beyond(GOOD | {limit.column: LIMITS_OF_A_TEACHER[key]}, LIMITS_OF_A_TEACHER) == set(), key


def test_labels_of_a_transcribed_segment() -> None:
    labels = label(segment("good morning, you good people"), config(), "offline")
    assert (labels.status, labels.avg_logprob, labels.char_rate) == ("ok", -0.375, 25 / 2)
    assert (labels.unique_word_share, labels.max_word_chars, labels.script_share) == (0.8, 7, 1.0)
    assert labels.compression_ratio == pytest.approx(28 / 35, abs=0.1) and labels.keep
    nothing = (
        labels.known_phrase,
        labels.context_run,
        labels.agreement_text,
        labels.agreement_wer,
        labels.reference_wer,
    )
    assert nothing == (None,) * 5


def test_several_reasons_come_in_their_order() -> None:
    loop = ended(segment("ha " * 90, duration=50.0), "length")
    caught = reasons(loop, teacher(labels={"min_avg_logprob": -0.1}))
    assert caught == ["truncated", "duration", "low_logprob", "repetitive", "few_unique_words"]
    assert reasons(ended(segment("fine words"), "repetition"), config()) == ["repetitive"]


def test_a_loop_that_the_clean_up_hid_is_still_caught() -> None:
    hidden = segment("and so", text_raw="language English<asr_text>" + "and so " * 60)
    assert reasons(hidden, config()) == ["repetitive"]
    assert reasons(hidden, teacher()) == ["repetitive", "few_unique_words"]


def test_silence_is_empty_and_a_segment_without_hypothesis_failed() -> None:
    silence = segment("", "language None<asr_text>", "", speech_ratio=0.0)
    labels = label(silence, config(min_speech_ratio=0.1), "offline")
    assert labels.status == "empty" and labels.filter_reasons == ["empty", "no_speech"]
    assert (labels.char_rate, labels.compression_ratio) == (0.0, 0.0)
    assert (labels.unique_word_share, labels.max_word_chars, labels.script_share) == (None, None, None)
    failed = rows.failed("a", "corrupt: x")
    assert label(failed, teacher(), "causal") == Labels("failed", filter_reasons=["failed"])


def test_thresholds_of_a_language() -> None:
    # 60 words, 20 of them different
    text = " ".join(f"từ{i % 20}" for i in range(60))
    vietnamese = segment(text, language="Vietnamese", duration=30.0)
    assert reasons(vietnamese, teacher(labels={"max_compression_ratio": None})) == ["few_unique_words"]
    own = {"max_compression_ratio": None, "languages": {"Vietnamese": {"min_unique_word_share": 0.2}}}
    assert reasons(vietnamese, teacher(labels=own)) == []
    japanese = segment("昨日は雨が降っていたので、家で本を読んでいました。" * 2, language="Japanese", duration=12.0)
    assert reasons(japanese, teacher()) == [], "by character, with a threshold of its own"


@pytest.mark.parametrize(
    ("text", "language", "reason"),
    [
        ("Thank you for watching!", "English", "known_phrase"),
        ("Купил хлеб и молоко", "English", "wrong_script"),
        ("Donaudampfschifffahrtsgesellschaftskapitäns Mütze", "German", "long_word"),
    ],
)
def test_texts_that_a_teacher_does_not_teach(text: str, language: str, reason: str) -> None:
    assert reasons(segment(text, language=language, duration=5.0), teacher()) == [reason]
    assert reasons(segment(text, language=language, duration=5.0), config()) == [], "transcribe leaves them alone"


def test_phrases_of_the_users() -> None:
    job = teacher(labels={"phrases": {"en": ["this call is recorded"]}, "whole_phrases": {"English": ["good bye"]}})
    assert reasons(segment("Hello. This call is recorded, sir."), job) == ["known_phrase"]
    assert reasons(segment("Good bye, good bye."), job) == ["known_phrase"]
    assert reasons(segment("Good bye to you all."), job) == []
    assert reasons(segment("This call is recorded", language="German"), job) == [], "phrases are a language's"


def test_the_hotword_prompt_leaks() -> None:
    job = teacher(engine={"context": "Ngọc Anh, Shardscribe, New York City"})
    assert reasons(segment("Ngọc Anh Shardscribe, New York."), job) == ["context_leak"]
    assert reasons(segment("I sent Shardscribe to New York City."), job) == [], "hotwords are there to be said"


def test_what_the_second_model_says_without_the_prompt_was_said() -> None:
    leak = segment("Ngọc Anh, Shardscribe")
    heard = replace(leak, second=rows.hypothesis("ngọc anh shardscribe"))
    engine = {"engine": {"context": "Ngọc Anh, Shardscribe"}, "agree_with": {"model": "m"}}
    assert reasons(heard, teacher(**engine)) == []
    prompted = engine | {"agree_with": {"model": "m", "context": "Ngọc Anh, Shardscribe"}}
    assert reasons(heard, teacher(**prompted)) == ["context_leak"]


def test_agreement_with_a_second_model() -> None:
    job = teacher(agree_with={"model": "other"})
    row = segment("the cat sat over there")
    agreed = replace(row, second=rows.hypothesis("The cat sat, over there."))
    assert reasons(agreed, job) == []
    other = label(replace(row, second=rows.hypothesis("the cat sat under here")), job, "offline")
    assert (other.agreement_text, other.agreement_wer) == ("the cat sat under here", 0.4)
    assert other.filter_reasons == ["disagreement"]
    assert reasons(row, job) == ["disagreement"], "the second model failed: nothing agrees"
    assert reasons(row, teacher(agree_with={"model": "other"}, labels={"max_agreement_wer": None})) == []
    assert reasons(segment(""), job) == ["empty"], "nobody asks for a second opinion on silence"


def test_causal_labels_are_no_teachers() -> None:
    assert reasons(segment("fine words"), teacher(), "causal") == ["causal"]
    assert reasons(segment("fine words"), teacher(labels={"keep_causal": True}), "causal") == []
    assert reasons(segment("fine words"), config(), "causal") == []


def test_wer_against_the_reference_of_each_part_of_a_recording() -> None:
    reference = "the cat sat on the mat and the dog lay by the door"

    def part(offset: float, text: str, **fields: Any) -> TranscribedSegment:
        return replace(rows.segment("long", offset, text), text_ref=reference, **fields)

    parts = [part(0, "The cat sat on the mat,"), part(2, "and a dog lay by door.")]
    assert reference_wers(parts) == [0.0, pytest.approx(2 / 7)]
    assert reference_wers([part(0, "the cat sat"), part(2, "and the dog lay by the door")]) == [0.5, 3 / 10], (
        "what is missing at a seam either may have lost"
    )
    one_off = [part(0, "the cat sat on the mad", language_ref="Chinese"), parts[1]]
    assert reference_wers(one_off)[0] == pytest.approx(1 / 17), "characters, as the input's language is counted"
    alone = replace(rows.segment("b", text="wrong entirely"), text_ref="right here")
    assert reference_wers([parts[0], alone, parts[1]]) == [0.0, 1.0, pytest.approx(2 / 7)], "each recording for itself"
    for unknown in (
        [replace(each, is_whole=False) for each in parts],
        [parts[0], replace(parts[1], hypothesis=None, error="out_of_memory: x")],
        [replace(each, text_ref=None) for each in parts],
        [replace(each, recording_id=f"long#ch{channel}", channel=channel) for channel, each in enumerate(parts)],
    ):
        assert reference_wers(unknown) == [None, None]
    one_channel = [replace(each, recording_id="long#ch0", channel=0) for each in parts]
    assert reference_wers(one_channel) == reference_wers(parts)


def test_a_units_labels_know_their_references() -> None:
    good, bad = rows.segment("a", text="ref"), rows.segment("b", text="something else")
    unit = rows.unit(UnitKey("0" * 16, 0, 0, "z"), good, bad, rows.failed("c", "corrupt: x"))
    labels = label_unit(unit, teacher())
    assert [each.reference_wer for each in labels] == [0.0, 2.0, None]
    assert [each.filter_reasons for each in labels] == [[], ["reference_mismatch"], ["failed"]]


def test_reasons_are_in_the_order_of_their_weight() -> None:
    assert REASONS[0] == "failed" and len(set(REASONS)) == len(REASONS)
    hypothesis = Hypothesis("", "", "", [], [], "length")
    row = replace(segment(""), hypothesis=hypothesis)
    assert reasons(row, config(min_speech_ratio=1.0)) == ["empty", "truncated", "no_speech"]
