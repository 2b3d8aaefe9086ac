"""The label step: figures about a segment's text, and which filters catch it. A caught row is kept and marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline import figures
from pipeline.config import TranscribeConfig
from pipeline.metrics import error_counts, error_counts_by_part
from pipeline.phrases import known_phrase
from pipeline.schema import REASONS, Hypothesis, Labels, Reason
from pipeline.text import tokens
from pipeline.units import TranscribedSegment, TranscribedUnit


@dataclass(frozen=True, slots=True)
class Limit:
    """A filter on a number: the column that it looks at, and the keys of its thresholds."""

    reason: Reason
    column: str
    low: str | None = None
    high: str | None = None


LIMITS = (
    Limit("duration", "duration", "min_duration_s", "max_duration_s"),
    Limit("no_speech", "speech_ratio", low="min_speech_ratio"),
    Limit("low_logprob", "avg_logprob", low="min_avg_logprob"),
    Limit("repetitive", "compression_ratio", high="max_compression_ratio"),
    Limit("few_unique_words", "unique_word_share", low="min_unique_word_share"),
    Limit("long_word", "max_word_chars", high="max_word_chars"),
    Limit("char_rate", "char_rate", "min_char_rate", "max_char_rate"),
    Limit("context_leak", "context_run", high="max_context_run"),
    Limit("context_leak", "context_share", high="max_context_share"),
    Limit("wrong_script", "script_share", low="min_script_share"),
    Limit("disagreement", "agreement_wer", high="max_agreement_wer"),
    Limit("reference_mismatch", "reference_wer", high="max_reference_wer"),
)


def label_unit(unit: TranscribedUnit, config: TranscribeConfig) -> list[Labels]:
    """Labels of a unit's segments, in order."""
    engine = str(unit.engine["engine"])
    wers = reference_wers(unit.segments)
    return [label(segment, config, engine, wer) for segment, wer in zip(unit.segments, wers, strict=True)]


def label(
    segment: TranscribedSegment, config: TranscribeConfig, engine: str, reference_wer: float | None = None
) -> Labels:
    """Labels of a segment that the engine of this name transcribed.

    Compression ratio and unique words are the raw transcript's, because Qwen3-ASR's clean-up hides loops; all else is
    about `text`. A failed row is `failed` and nothing else.
    """
    hypothesis = segment.hypothesis
    if hypothesis is None:
        return Labels("failed", filter_reasons=["failed"])
    labels = replace(_figures(segment, hypothesis, config), reference_wer=reference_wer)
    options = config.labels
    limits = options.thresholds(hypothesis.language)
    figures_of_row = {limit.column: getattr(labels, limit.column, None) for limit in LIMITS}
    caught = beyond(figures_of_row | {"duration": segment.duration, "speech_ratio": segment.speech_ratio}, limits)
    unheard = config.agree_with is not None and segment.second is None and labels.status == "ok"
    others: dict[Reason, bool] = {
        "empty": labels.status == "empty",
        "truncated": hypothesis.finish_reason == "length",
        "repetitive": hypothesis.finish_reason == "repetition",
        "causal": engine == "causal" and not options.keep_causal,
        "known_phrase": labels.known_phrase is not None and options.known_phrases,
        "disagreement": unheard and limits["max_agreement_wer"] is not None,
    }
    caught |= {reason for reason, is_caught in others.items() if is_caught}
    return replace(labels, filter_reasons=[reason for reason in REASONS if reason in caught])


def beyond(values: Mapping[str, float | None], limits: Mapping[str, float | None]) -> set[Reason]:
    """The filters that catch a row with these `values` by column, at these `limits` by threshold key.

    A None value or limit catches nothing, a NaN value is caught by every filter on it.
    """
    caught: set[Reason] = set()
    for limit in LIMITS:
        value = values[limit.column]
        least = limits[limit.low] if limit.low else None
        most = limits[limit.high] if limit.high else None
        if value is not None and (
            (least is not None and not value >= least) or (most is not None and not value <= most)
        ):
            caught.add(limit.reason)
    return caught


def reference_wers(segments: Sequence[TranscribedSegment]) -> list[float | None]:
    """WER (or CER) of each segment against its part of `text_ref`.

    The reference is the whole recording's: it is aligned with all segments of the recording, in order. None where the
    unit does not hold the whole recording, where a segment of it failed, and for channels that share one reference.
    """
    by_recording: dict[str, list[int]] = {}
    channels: dict[str, set[int | None]] = {}
    for index, segment in enumerate(segments):
        by_recording.setdefault(segment.recording_id, []).append(index)
        channels.setdefault(_file(segment), set()).add(segment.channel)
    wers: list[float | None] = [None] * len(segments)
    for indices in by_recording.values():
        parts = [segments[index] for index in indices]
        reference, texts = parts[0].text_ref, [part.hypothesis.text for part in parts if part.hypothesis]
        complete = len(texts) == len(parts) and all(part.is_whole for part in parts)
        if reference is None or not complete or len(channels[_file(parts[0])]) > 1:
            continue
        detected = (part.hypothesis.language for part in parts if part.hypothesis and part.hypothesis.text)
        spoken = parts[0].language_ref or next(detected, "")
        for index, counts in zip(indices, error_counts_by_part(reference, texts, spoken), strict=True):
            wers[index] = counts.rate
    return wers


def _figures(segment: TranscribedSegment, hypothesis: Hypothesis, config: TranscribeConfig) -> Labels:
    text, language, second = hypothesis.text, hypothesis.language, segment.second
    raw = figures.raw_transcript(hypothesis.text_raw)
    unprompted = [second.text] if second and config.agree_with and not config.agree_with.context else []
    overlap = figures.context_overlap(text, config.engine.context, unprompted)
    return Labels(
        status="ok" if text.strip() else "empty",
        avg_logprob=figures.avg_logprob(hypothesis.token_logprobs),
        compression_ratio=figures.compression_ratio(raw),
        char_rate=figures.char_rate(text, segment.duration),
        unique_word_share=figures.unique_word_share(tokens(raw)),
        max_word_chars=figures.max_word_chars(tokens(text)),
        known_phrase=known_phrase(text, language, config.labels.phrases, config.labels.whole_phrases),
        context_run=overlap[0] if overlap else None,
        context_share=overlap[1] if overlap else None,
        script_share=figures.script_share(text, language),
        agreement_text=second.text if second else None,
        agreement_wer=error_counts(text, second.text, language).rate if second else None,
    )


def _file(segment: TranscribedSegment) -> str:
    """The recording that a channel is of."""
    return segment.recording_id.removesuffix(f"#ch{segment.channel}")
