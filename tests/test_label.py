import math

import pytest

from pipeline.config import LabelsConfig
from pipeline.label import Labels, avg_logprob, char_rate, compression_ratio, filter_reasons, label, raw_transcript
from pipeline.schema import Hypothesis

GOOD = {
    "status": "ok",
    "finish_reason": "stop",
    "avg_logprob": -0.1,
    "compression_ratio": 1.2,
    "char_rate": 14.0,
    "speech_ratio": 0.8,
}


def hypothesis(text: str, text_raw: str | None = None, logprobs: tuple[float, ...] = (-0.25, -0.75)) -> Hypothesis:
    raw = f"language English<asr_text>{text}" if text_raw is None else text_raw
    return Hypothesis(text, raw, "English", list(range(len(logprobs))), list(logprobs), "stop")


def test_a_good_row_is_kept():
    assert filter_reasons(LabelsConfig(min_speech_ratio=0.5), **GOOD) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"avg_logprob": -1.01}, "low_logprob"),
        ({"avg_logprob": -math.inf}, "low_logprob"),
        ({"avg_logprob": math.nan}, "low_logprob"),
        ({"compression_ratio": 2.41}, "repetitive"),
        ({"char_rate": 40.1}, "char_rate"),
        ({"char_rate": math.inf}, "char_rate"),
        ({"speech_ratio": 0.49}, "no_speech"),
        ({"finish_reason": "length"}, "truncated"),
        ({"finish_reason": "repetition"}, "repetitive"),
        ({"status": "empty"}, "empty"),
        ({"status": "failed", "avg_logprob": None, "finish_reason": "length"}, "failed"),
    ],
)
def test_each_filter_catches_with_its_code(change, reason):
    assert filter_reasons(LabelsConfig(min_speech_ratio=0.5), **(GOOD | change)) == [reason]


@pytest.mark.parametrize("at_limit", [{"avg_logprob": -1.0}, {"compression_ratio": 2.4}, {"char_rate": 40.0}])
def test_a_value_at_its_limit_is_kept(at_limit):
    assert filter_reasons(LabelsConfig(), **(GOOD | at_limit)) == []


def test_a_filter_that_is_off_or_has_no_value_catches_nothing():
    off = LabelsConfig(min_avg_logprob=None, max_compression_ratio=None, max_char_rate=None)
    terrible = GOOD | {"avg_logprob": -9.0, "compression_ratio": 30.0, "char_rate": 900.0, "speech_ratio": 0.0}
    assert filter_reasons(off, **terrible) == []
    unknown = GOOD | dict.fromkeys(["avg_logprob", "compression_ratio", "char_rate", "speech_ratio", "finish_reason"])
    assert filter_reasons(LabelsConfig(min_speech_ratio=0.5), **unknown) == []


def test_several_reasons_come_together():
    row = GOOD | {"finish_reason": "length", "compression_ratio": 12.0, "avg_logprob": -2.0}
    assert filter_reasons(LabelsConfig(), **row) == ["truncated", "low_logprob", "repetitive"]


def test_labels_of_a_transcribed_segment():
    labels = label(hypothesis("good morning"), 2.0, 0.9, LabelsConfig())
    assert (labels.status, labels.avg_logprob, labels.char_rate) == ("ok", -0.5, 11 / 2)
    assert labels.compression_ratio == compression_ratio("good morning")
    assert labels.keep


def test_a_loop_that_the_clean_up_hid_is_still_caught():
    looping = hypothesis("and so", text_raw="language English<asr_text>" + "and so " * 60)
    labels = label(looping, 20.0, 0.9, LabelsConfig())
    assert labels.filter_reasons == ["repetitive"]
    assert not labels.keep


def test_silence_is_empty():
    labels = label(hypothesis("", "language None<asr_text>", ()), 3.0, 0.0, LabelsConfig(min_speech_ratio=0.1))
    assert labels == Labels("empty", None, 0.0, 0.0, ["empty", "no_speech"])


def test_a_segment_without_hypothesis_failed():
    assert label(None, 3.0, 0.5, LabelsConfig()) == Labels("failed", None, None, None, ["failed"])


def test_figures():
    assert avg_logprob([]) is None
    assert avg_logprob([-1.0, -2.0, -6.0]) == -3.0
    assert math.isnan(avg_logprob([math.nan, -1.0]) or 0.0)
    assert char_rate("ab c\n", 1.5) == 2.0
    assert char_rate("", 0.0) == 0.0
    assert char_rate("a", 0.0) == math.inf
    assert compression_ratio("") == 0.0
    assert compression_ratio("a" * 1000) > 20
    assert compression_ratio("你好") == 6 / 14  # of UTF-8 bytes


def test_the_raw_transcript_starts_after_the_first_tag():
    assert raw_transcript("language English<asr_text>yes<asr_text>") == "yes<asr_text>"
    assert raw_transcript("a forced language writes no tag") == "a forced language writes no tag"
