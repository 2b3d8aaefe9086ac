"""The transcribe step: an actor that holds one engine and several units at once."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict

from pipeline.config import EngineConfig
from pipeline.engine.base import EngineFailure
from pipeline.engine.create import create_engine
from pipeline.languages import language_name
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis, Segment
from pipeline.units import Recording, Span, TranscribedSegment, TranscribedUnit, Unit


class Transcriber:
    """Loads the engine once; `await transcriber(unit)` from as many tasks as there are units in flight."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._engine = create_engine(config)

    async def __call__(self, unit: Unit) -> TranscribedUnit:
        """Raises EngineError when the engine itself fails; a segment that fails becomes a row with its reason."""
        arrived = time.monotonic()
        segments = [self._segment(unit.recordings[span.recording], span) for span in unit.spans]
        results = await asyncio.wrap_future(self._engine.submit(segments))
        rows = [
            _row(unit.recordings[span.recording], span, segment.segment_id, result)
            for span, segment, result in zip(unit.spans, segments, results, strict=True)
        ]
        rows += [_failed_row(recording) for recording in unit.recordings if recording.error is not None]
        rows += [_failed_row(unit.recordings[i], "no_samples: no audio in it") for i in _silent(unit)]
        num_recordings = sum(not recording.continues for recording in unit.recordings)
        busy_s = time.monotonic() - arrived
        return TranscribedUnit(unit.key, rows, num_recordings, unit.audio_s, busy_s, asdict(self._engine.info))

    def _segment(self, recording: Recording, span: Span) -> Segment:
        pcm = recording.pcm[span.start : span.start + span.num_samples]
        language = self._config.language
        if language is None and self._config.trust_input_language and recording.language:
            language = language_name(recording.language)
        begin_ms, end_ms = (
            round(1000 * recording.offset_s + sample / (SAMPLE_RATE_HZ / 1000))
            for sample in (span.start, span.start + span.num_samples)
        )
        segment_id = f"{recording.recording_id}@{begin_ms}-{end_ms}"
        return Segment(segment_id, pcm, language, self._config.context)


def _silent(unit: Unit) -> list[int]:
    """Recordings that have neither a span nor an error."""
    spoken = {span.recording for span in unit.spans}
    return [i for i, recording in enumerate(unit.recordings) if i not in spoken and recording.error is None]


def _row(recording: Recording, span: Span, segment_id: str, result: Hypothesis | EngineFailure) -> TranscribedSegment:
    failed = isinstance(result, EngineFailure)
    return TranscribedSegment(
        segment_id,
        recording.recording_id,
        recording.audio_filepath,
        recording.channel,
        recording.offset_s + span.start / SAMPLE_RATE_HZ,
        span.num_samples / SAMPLE_RATE_HZ,
        recording.text_ref,
        span.speech_ratio,
        None if failed else result,  # type: ignore[arg-type]
        str(result) if failed else None,
    )


def _failed_row(recording: Recording, error: str | None = None) -> TranscribedSegment:
    """The row of what could not be read of a recording; it stands where the readable audio ends."""
    return TranscribedSegment(
        f"{recording.recording_id}@failed",
        recording.recording_id,
        recording.audio_filepath,
        recording.channel,
        recording.offset_s + recording.duration_s,
        0.0,
        recording.text_ref,
        None,
        None,
        error or recording.error,
    )
