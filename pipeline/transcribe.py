"""The transcribe step: an actor that holds one engine, or two to compare, and several units at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import cast

from pipeline.attempts import CRASHED, MAX_ATTEMPTS, Attempts
from pipeline.config import EngineConfig, SegmentationConfig
from pipeline.engine.base import AsrEngine, EngineFailure, Heard, Observer, Result, StreamEngine
from pipeline.engine.create import create_engine
from pipeline.languages import language_name
from pipeline.rolling import Roller
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis, Segment
from pipeline.segmentation import speech_in, speech_samples
from pipeline.units import Recording, Span, TranscribedSegment, TranscribedUnit, Unit

Decode = Callable[[Sequence[Segment]], Awaitable[list[Result]]]
Window = tuple[Recording, int, int, Result]
"""Samples `[start, end)` of a recording, and what the engine made of them."""


class Transcriber:
    """Loads the engine once; `await transcriber(unit)` from as many tasks as there are units in flight.

    A unit whose process died before is worked off segment by segment, to find the one that ends the process. `observe`
    hears of every batch of the engine. `agree_with` is a second model, which hears every segment that has text.
    """

    def __init__(
        self,
        config: EngineConfig,
        segmentation: SegmentationConfig,
        attempts: Attempts,
        observe: Observer | None = None,
        agree_with: EngineConfig | None = None,
    ) -> None:
        self._config, self._segmentation, self._attempts = config, segmentation, attempts
        self._engine = create_engine(config, observe)
        self._second = (agree_with, create_engine(agree_with)) if agree_with is not None else None
        self._one_by_one = asyncio.Lock()  # so that a death has one suspect

    async def __call__(self, unit: Unit) -> TranscribedUnit:
        """Raises EngineError when the engine itself fails; a segment that fails becomes a row with its reason."""
        arrived = time.monotonic()
        died_before = await asyncio.to_thread(self._attempts.begin, unit.key.name) > 0
        decode = partial(self._decode_with_care if died_before else self._decode, self._engine)
        if self._segmentation.policy == "sentence":
            windows, decoded = await self._roll(unit, decode)
        elif self._segmentation.policy == "stream":
            windows = await self._stream(unit, died_before)
            decoded = sum(span.num_samples for span in unit.spans)
        else:
            places = [(unit.recordings[span.recording], *span.bounds) for span in unit.spans]
            results = await decode([_segment(self._config, *place) for place in places])
            windows = [(*place, result) for place, result in zip(places, results, strict=True)]
            decoded = sum(span.num_samples for span in unit.spans)
        seconds = await self._second_opinions(windows, died_before)
        rows = [_row(*window, second) for window, second in zip(windows, seconds, strict=True)]
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
            asdict(self._second[1].info) if self._second else None,
        )

    async def _decode(self, engine: AsrEngine, segments: Sequence[Segment]) -> list[Result]:
        return await asyncio.wrap_future(engine.submit(segments))

    async def _decode_with_care(self, engine: AsrEngine, segments: Sequence[Segment]) -> list[Result]:
        """One segment at a time, announced by itself; what ended its process before is left out."""
        results: list[Result] = []
        for segment in segments:
            work = segment.segment_id if engine is self._engine else f"{segment.segment_id} second"
            async with self._one_by_one:
                if await asyncio.to_thread(self._attempts.begin, work) >= MAX_ATTEMPTS:
                    results.append(EngineFailure(segment.segment_id, "crashed_process", CRASHED))
                    continue
                results += await self._decode(engine, [segment])
                await asyncio.to_thread(self._attempts.end, work)
        return results

    async def _stream(self, unit: Unit, died_before: bool) -> list[Window]:
        """Recordings as streams: the engine says where their segments end."""
        engine = cast(StreamEngine, self._engine)
        places = [(unit.recordings[span.recording], *span.bounds) for span in unit.spans]
        segments = [_segment(self._config, *place) for place in places]
        if not died_before:
            all_heard: list[list[Heard]] = await asyncio.wrap_future(engine.stream(segments))
        else:
            all_heard = []
            for segment in segments:
                async with self._one_by_one:
                    if await asyncio.to_thread(self._attempts.begin, segment.segment_id) >= MAX_ATTEMPTS:
                        failure = EngineFailure(segment.segment_id, "crashed_process", CRASHED)
                        all_heard.append([Heard(0, len(segment.pcm), failure)])
                        continue
                    all_heard += await asyncio.wrap_future(engine.stream([segment]))
                    await asyncio.to_thread(self._attempts.end, segment.segment_id)
        return [
            (recording, start + each.start, start + each.end, each.result)
            for (recording, start, _), heard in zip(places, all_heard, strict=True)
            for each in heard
        ]

    async def _second_opinions(self, windows: Sequence[Window], died_before: bool) -> list[Hypothesis | None]:
        """What the second model makes of each window; None where the first one has no text, or the second one fails."""
        opinions: list[Hypothesis | None] = [None] * len(windows)
        if self._second is None:
            return opinions
        config, engine = self._second
        heard = [i for i, window in enumerate(windows) if isinstance(window[3], Hypothesis) and window[3].text.strip()]
        segments = [_segment(config, *windows[i][:3]) for i in heard]
        decode = self._decode_with_care if died_before else self._decode
        for i, result in zip(heard, await decode(engine, segments), strict=True):
            opinions[i] = result if isinstance(result, Hypothesis) else None
        return opinions

    async def _roll(self, unit: Unit, decode_all: Decode) -> tuple[list[Window], int]:
        """Windows that end at sentences, all stretches of the unit at once; and the samples decoded."""
        decoded = 0

        async def stretch(span: Span) -> list[Window]:
            recording = unit.recordings[span.recording]

            async def decode(start: int, end: int) -> Result:
                nonlocal decoded
                decoded += end - start
                (result,) = await decode_all([_segment(self._config, recording, start, end)])
                return result

            options = self._segmentation
            roller: Roller[EngineFailure] = Roller(decode, recording.speech, options.min_s, options.max_s)
            windows = await roller.roll(*span.bounds)
            return [(recording, window.start, window.end, window.result) for window in windows]

        stretches = await asyncio.gather(*(stretch(span) for span in unit.spans))
        return [window for windows in stretches for window in windows], decoded


def _segment(config: EngineConfig, recording: Recording, start: int, end: int) -> Segment:
    language = config.language
    if language is None and config.trust_input_language and recording.language:
        language = language_name(recording.language)
    return Segment(_segment_id(recording, start, end), recording.pcm[start:end], language, config.context)


def _segment_id(recording: Recording, start: int, end: int) -> str:
    begin_ms, end_ms = (round(1000 * recording.offset_s + sample / (SAMPLE_RATE_HZ / 1000)) for sample in (start, end))
    return f"{recording.recording_id}@{begin_ms}-{end_ms}"


def _silent(unit: Unit) -> list[int]:
    """Recordings that have neither a span nor an error."""
    spoken = {span.recording for span in unit.spans}
    return [i for i, recording in enumerate(unit.recordings) if i not in spoken and recording.error is None]


def _row(recording: Recording, start: int, end: int, result: Result, second: Hypothesis | None) -> TranscribedSegment:
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
        second,
        is_whole=not (recording.continues or recording.goes_on),
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
