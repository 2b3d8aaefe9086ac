"""The segment step: cut a unit's recordings into the windows that the engine transcribes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.config import SegmentationConfig
from pipeline.segmentation import segment_by_pause, speech_samples
from pipeline.units import Span, Unit


def segment_unit(unit: Unit, config: SegmentationConfig) -> Unit:
    """The unit with `spans` filled: recording after recording, windows that tile each one's audio.

    A failed recording is cut as far as its audio goes; one without audio has no span. `speech_ratio` is the share of
    a window that Silero VAD takes for speech. Recordings are shared with the unit given, which stays as it was.
    """
    spans = [span for index, recording in enumerate(unit.recordings) for span in _windows(index, recording.pcm, config)]
    return replace(unit, spans=spans)


def _windows(recording: int, pcm: np.ndarray, config: SegmentationConfig) -> list[Span]:
    from pipeline.vad import speech_spans  # brings torch (1.3 s), which the driver that imports this step never needs

    speech = speech_spans(pcm, config.vad_threshold, config.min_silence_ms)
    return [
        Span(recording, start, end - start, speech_ratio=speech_samples(speech, start, end) / (end - start))
        for start, end in segment_by_pause(len(pcm), speech, config.min_s, config.max_s)
    ]
