"""What a stream's segments amount to for those who asked: as they are, or as one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.engine.base import EngineFailure, Heard, Result
from pipeline.engine.causal.commit import between
from pipeline.engine.causal.state import ClosedSegment
from pipeline.engine.causal.tower_file import untrained
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis


def hypothesis(segment: ClosedSegment, languages: frozenset[str] | None, name: str) -> Result:
    """Of one segment; one that the model hears in a language that the tower was not trained on is refused as `name`."""
    if segment.text and segment.language and languages is not None and segment.language not in languages:
        return EngineFailure(name, "unsupported_language", untrained(segment.language, languages))
    return Hypothesis(
        text=segment.text,
        text_raw=segment.text_raw,
        language=segment.language,
        token_ids=segment.token_ids,
        token_logprobs=segment.token_logprobs,
        finish_reason=segment.finish_reason,
        published_s=[at_s - segment.offset_s for at_s in segment.published_s],
    )


def in_parts(
    segments: Sequence[ClosedSegment],
    num_samples: int,
    error: EngineFailure | None,
    languages: frozenset[str] | None,
    name: str,
) -> list[Heard]:
    """Segments that tile a recording of `num_samples`. What was said before an error stays; the rest has failed."""
    results = [hypothesis(segment, languages, name) for segment in segments]
    starts = [round(segment.offset_s * SAMPLE_RATE_HZ) for segment in segments]
    if error is not None:
        starts.append(round((segments[-1].offset_s + segments[-1].duration_s) * SAMPLE_RATE_HZ) if segments else 0)
        results.append(replace(error, segment_id=name))
    if not results:
        starts, results = [0], [Hypothesis("", "", "", [], [], "stop")]
    ends = [*starts[1:], num_samples]
    return [Heard(start, end, result) for start, end, result in zip(starts, ends, results, strict=True)]


def whole(
    segments: Sequence[ClosedSegment],
    text: str,
    error: EngineFailure | None,
    languages: frozenset[str] | None,
    name: str,
) -> Result:
    """One hypothesis of all, or what one of them failed with."""
    refused = (hypothesis(segment, languages, name) for segment in segments)
    error = error or next((found for found in refused if isinstance(found, EngineFailure)), None)
    if error is not None:
        return replace(error, segment_id=name)
    raw = ""
    for segment in segments:
        raw += between(raw, segment.text_raw) + segment.text_raw
    heard = [segment.language for segment in segments if segment.language]
    return Hypothesis(
        text=text,
        text_raw=raw,
        language=max(heard, key=heard.count, default=""),
        token_ids=[token for segment in segments for token in segment.token_ids],
        token_logprobs=[logprob for segment in segments for logprob in segment.token_logprobs],
        finish_reason="stop" if all(segment.finish_reason == "stop" for segment in segments) else "length",
    )
