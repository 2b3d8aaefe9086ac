"""The segment step: cut a unit's recordings into the windows that the engine transcribes."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config import SegmentationConfig
from pipeline.segmentation import segment_by_pause, segment_fixed
from pipeline.units import Recording, Span, Unit


def segment_unit(unit: Unit, config: SegmentationConfig) -> Unit:
    """The unit with `spans` filled, and `speech` in its recordings: recording after recording, windows that tile each
    one's audio; under the policy "sentence" stretches, which the transcribe step rolls through; under
    "stream" all of it, for an engine that says where segments end.

    A failed recording is cut as far as its audio goes; one without audio has no span. The unit given stays as it was;
    audio is shared with it.
    """
    recordings = [_with_speech(recording, config) for recording in unit.recordings]
    spans = [
        Span(index, start, end - start)
        for index, recording in enumerate(recordings)
        for start, end in _windows(recording, config)
    ]
    return replace(unit, recordings=recordings, spans=spans)


def _with_speech(recording: Recording, config: SegmentationConfig) -> Recording:
    from pipeline.vad import speech_spans  # brings torch (1.3 s), which the driver that imports this step never needs

    return replace(recording, speech=speech_spans(recording.pcm, config.vad_threshold, config.min_silence_ms))


def _windows(recording: Recording, config: SegmentationConfig) -> list[tuple[int, int]]:
    num_samples = len(recording.pcm)
    if config.policy == "stream":
        return [(0, num_samples)] if num_samples else []
    if config.policy == "fixed":
        return segment_fixed(num_samples, config.fixed_s)
    if config.policy == "pause":
        return segment_by_pause(num_samples, recording.speech, config.min_s, config.max_s)
    # stretches hold several windows, or rolling has nothing to roll through
    longest = max(config.stretch_s, 4 * config.max_s)
    return segment_by_pause(num_samples, recording.speech, longest / 2, longest)
