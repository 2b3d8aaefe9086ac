"""The transcribe step: an actor that holds one engine and several units at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict

from pipeline.attempts import CRASHED, MAX_ATTEMPTS, Attempts
from pipeline.config import EngineConfig, SegmentationConfig
from pipeline.engine.base import EngineFailure, Observer, Result
from pipeline.engine.create import create_engine
from pipeline.languages import language_name
from pipeline.rolling import Roller
from pipeline.schema import SAMPLE_RATE_HZ, Segment
from pipeline.segmentation import speech_in, speech_samples
from pipeline.units import Recording, Span, TranscribedSegment, TranscribedUnit, Unit

Decode = Callable[[Sequence[Segment]], Awaitable[list[Result]]]


class Transcriber:
    """Loads the engine once; `await transcriber(unit)` from as many tasks as there are units in flight.

    A unit whose process died before is worked off segment by segment, to find the one that ends the process. `observe`
    hears of every batch of the engine.
    """

    def __init__(
        self,
        config: EngineConfig,
        segmentation: SegmentationConfig,
        attempts: Attempts,
        observe: Observer | None = None,
    ) -> None:
        self._config, self._segmentation, self._attempts = config, segmentation, attempts
        self._engine = create_engine(config, observe)
        self._one_by_one = asyncio.Lock()  # so that a death has one suspect

    async def __call__(self, unit: Unit) -> TranscribedUnit:
        """Raises EngineError when the engine itself fails; a segment that fails becomes a row with its reason."""
        arrived = time.monotonic()
        died_before = await asyncio.to_thread(self._attempts.begin, unit.key.name) > 0
        decode = self._decode_with_care if died_before else self._decode
        if self._segmentation.policy == "sentence":
            rows, decoded = await self._roll(unit, decode)
        else:
            results = await decode(
                [self._segment(unit.recordings[span.recording], *span.bounds) for span in unit.spans]
            )
            rows = [
                _row(unit.recordings[span.recording], *span.bounds, result)
                for span, result in zip(unit.spans, results, strict=True)
            ]
            decoded = sum(span.num_samples for span in unit.spans)
        rows += [_failed_row(recording) for recording in unit.recordings if recording.error is not None]
        rows += [_failed_row(unit.recordings[i], "no_samples: no audio in it") for i in _silent(unit)]
        num_recordings = sum(not recording.continues for recording in unit.recordings)
        await asyncio.to_thread(self._attempts.end, unit.key.name)
        busy_s = time.monotonic() - arrived
        return TranscribedUnit(
            unit.key,
            rows,
            num_recordings,
            unit.audio_s,
            decoded / SAMPLE_RATE_HZ,
            busy_s,
            asdict(self._engine.info),
            unit.num_retries,
        )

    async def _decode(self, segments: Sequence[Segment]) -> list[Result]:
        return await asyncio.wrap_future(self._engine.submit(segments))

    async def _decode_with_care(self, segments: Sequence[Segment]) -> list[Result]:
        """One segment at a time, announced by itself; what ended its process before is left out."""
        results: list[Result] = []
        for segment in segments:
            async with self._one_by_one:
                if await asyncio.to_thread(self._attempts.begin, segment.segment_id) >= MAX_ATTEMPTS:
                    results.append(EngineFailure(segment.segment_id, "crashed_process", CRASHED))
                    continue
                results += await self._decode([segment])
                await asyncio.to_thread(self._attempts.end, segment.segment_id)
        return results

    async def _roll(self, unit: Unit, decode_all: Decode) -> tuple[list[TranscribedSegment], int]:
        """Rows of windows that end at sentences, all stretches of the unit at once; and the samples decoded."""
        decoded = 0

        async def stretch(span: Span) -> list[TranscribedSegment]:
            recording = unit.recordings[span.recording]

            async def decode(start: int, end: int) -> Result:
                nonlocal decoded
                decoded += end - start
                (result,) = await decode_all([self._segment(recording, start, end)])
                return result

            options = self._segmentation
            roller: Roller[EngineFailure] = Roller(decode, recording.speech, options.min_s, options.max_s)
            windows = await roller.roll(*span.bounds)
            return [_row(recording, window.start, window.end, window.result) for window in windows]

        stretches = await asyncio.gather(*(stretch(span) for span in unit.spans))
        return [row for rows in stretches for row in rows], decoded

    def _segment(self, recording: Recording, start: int, end: int) -> Segment:
        language = self._config.language
        if language is None and self._config.trust_input_language and recording.language:
            language = language_name(recording.language)
        return Segment(_segment_id(recording, start, end), recording.pcm[start:end], language, self._config.context)


def _segment_id(recording: Recording, start: int, end: int) -> str:
    begin_ms, end_ms = (round(1000 * recording.offset_s + sample / (SAMPLE_RATE_HZ / 1000)) for sample in (start, end))
    return f"{recording.recording_id}@{begin_ms}-{end_ms}"


def _silent(unit: Unit) -> list[int]:
    """Recordings that have neither a span nor an error."""
    spoken = {span.recording for span in unit.spans}
    return [i for i, recording in enumerate(unit.recordings) if i not in spoken and recording.error is None]


def _row(recording: Recording, start: int, end: int, result: Result) -> TranscribedSegment:
    failed = isinstance(result, EngineFailure)
    return TranscribedSegment(
        _segment_id(recording, start, end),
        recording.recording_id,
        recording.audio_filepath,
        recording.channel,
        recording.offset_s + start / SAMPLE_RATE_HZ,
        (end - start) / SAMPLE_RATE_HZ,
        recording.text_ref,
        speech_samples(recording.speech, start, end) / (end - start),
        None if failed else result,  # type: ignore[arg-type]
        str(result) if failed else None,
        [(begin - start, stop - start) for begin, stop in speech_in(recording.speech, start, end)],
        _named_language(recording),
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
        language_ref=_named_language(recording),
    )


def _named_language(recording: Recording) -> str | None:
    return language_name(recording.language) if recording.language else None
