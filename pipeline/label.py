"""The label step: figures about a segment's text, and which filters catch it. A caught row is kept and marked."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

from pipeline.config import LabelsConfig
from pipeline.schema import Hypothesis, Labels, Reason, Status

_TEXT_TAG = "<asr_text>"  # in Qwen3-ASR's raw text, between the language it detected and the transcript


def label(hypothesis: Hypothesis | None, duration_s: float, speech_ratio: float | None, config: LabelsConfig) -> Labels:
    """Labels of a segment of `duration_s` seconds; a None `hypothesis` is one that failed.

    The compression ratio is of the raw transcript, because Qwen3-ASR's clean-up hides loops; `char_rate` of the text.
    """
    if hypothesis is None:
        return Labels("failed", None, None, None, ["failed"])
    status: Status = "ok" if hypothesis.text.strip() else "empty"
    logprob = avg_logprob(hypothesis.token_logprobs)
    ratio = compression_ratio(raw_transcript(hypothesis.text_raw))
    rate = char_rate(hypothesis.text, duration_s)
    reasons = filter_reasons(
        config,
        status=status,
        finish_reason=hypothesis.finish_reason,
        avg_logprob=logprob,
        compression_ratio=ratio,
        char_rate=rate,
        speech_ratio=speech_ratio,
    )
    return Labels(status, logprob, ratio, rate, reasons)


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


def filter_reasons(
    config: LabelsConfig,
    *,
    status: Status,
    finish_reason: str | None,
    avg_logprob: float | None,
    compression_ratio: float | None,
    char_rate: float | None,
    speech_ratio: float | None,
) -> list[Reason]:
    """Codes of the filters that catch a row, the weightiest first; none means keep it.

    A None value or threshold catches nothing, a NaN value is caught by every filter on it. A failed row is `failed`
    and nothing else, whatever its other values.
    """
    if status == "failed":
        return ["failed"]
    checks: list[tuple[Reason, bool]] = [
        ("empty", status == "empty"),
        ("truncated", finish_reason == "length"),
        ("no_speech", _below(speech_ratio, config.min_speech_ratio)),
        ("low_logprob", _below(avg_logprob, config.min_avg_logprob)),
        ("repetitive", finish_reason == "repetition" or _above(compression_ratio, config.max_compression_ratio)),
        ("char_rate", _above(char_rate, config.max_char_rate)),
    ]
    return [reason for reason, caught in checks if caught]


def _below(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and not value >= limit


def _above(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and not value <= limit
