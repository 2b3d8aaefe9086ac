import io
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import soxr

from pipeline import vad
from pipeline.config import SegmentationConfig
from pipeline.segment import segment_unit
from pipeline.units import Recording, Span, Unit, UnitKey

RATE = 16_000
KEY = UnitKey("0123456789abcdef", 0, 0, "z")


def recording(name: str, pcm: np.ndarray, error: str | None = None) -> Recording:
    return Recording(name, f"{name}.wav", pcm, error=error)


@pytest.fixture
def loud_is_speech(monkeypatch):
    """A VAD that takes every run of samples above zero for speech, so that tests know the spans."""

    def spans(pcm, threshold, min_silence_ms):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], pcm > 0, [False]]).astype(np.int8)))
        return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]

    monkeypatch.setattr(vad, "speech_spans", spans)


def test_each_recording_is_cut_and_carries_its_speech(loud_is_speech):
    long = np.ones(10 * RATE, np.int16)
    long[6 * RATE : 7 * RATE] = 0
    quiet = np.zeros(2 * RATE, np.int16)
    unit = Unit(KEY, [recording("long", long), recording("quiet", quiet)])
    segmented = segment_unit(unit, SegmentationConfig(min_s=4, max_s=8))
    cut = 6 * RATE + RATE // 2
    assert segmented.spans == [
        Span(0, 0, cut),
        Span(0, cut, 10 * RATE - cut),
        Span(1, 0, 2 * RATE),
    ]
    assert [each.speech for each in segmented.recordings] == [[(0, 6 * RATE), (7 * RATE, 10 * RATE)], []]
    assert segmented.recordings[0].pcm is long
    assert unit.spans == [] and unit.recordings[0].speech == []


def test_a_failed_recording_is_cut_as_far_as_its_audio_goes(loud_is_speech):
    broken = recording("broken", np.ones(RATE, np.int16), error="decode: truncated file")
    absent = recording("absent", np.zeros(0, np.int16), error="missing: no such file")
    segmented = segment_unit(Unit(KEY, [absent, broken]), SegmentationConfig())
    assert segmented.spans == [Span(1, 0, RATE)]


def test_the_config_reaches_the_vad(monkeypatch):
    seen = []
    monkeypatch.setattr(vad, "speech_spans", lambda pcm, *args: seen.append(args) or [])
    config = SegmentationConfig(vad_threshold=0.3, min_silence_ms=200)
    segment_unit(Unit(KEY, [recording("a", np.zeros(10, np.int16))]), config)
    assert seen == [(0.3, 200)]


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_real_speech_is_cut_between_sentences():
    command = ["espeak-ng", "--stdout", "the first part of the meeting was about the budget"]
    wav = subprocess.run(command, check=True, capture_output=True).stdout
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    sentence = (soxr.resample(samples, rate, RATE) * 32767).astype(np.int16)
    pause = np.random.default_rng(0).normal(0, 30, RATE).astype(np.int16)
    pcm = np.concatenate([sentence, pause] * 6)
    period = len(sentence) + len(pause)

    spans = segment_unit(Unit(KEY, [recording("talk", pcm)]), SegmentationConfig(min_s=4, max_s=9)).spans
    assert len(spans) > 1
    for span in spans[1:]:
        assert span.start % period > len(sentence) - 0.3 * RATE
