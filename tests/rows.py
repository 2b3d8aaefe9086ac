"""Transcribed units made by hand, for the steps that come after an engine."""

from __future__ import annotations

from dataclasses import asdict

from pipeline.config import TranscribeConfig
from pipeline.engine.base import EngineInfo
from pipeline.label import label_unit
from pipeline.schema import Hypothesis, Labels, Word
from pipeline.units import TranscribedSegment, TranscribedUnit, UnitKey

INFO = EngineInfo("reference", "tiny", "sha256:12", "none", "float32", "cpu", "windowed", 72_000)


def hypothesis(text: str, language: str = "English") -> Hypothesis:
    raw = f"language {language}<asr_text>{text}"
    return Hypothesis(text, raw, language, [7, 8], [-0.25, -0.5], "stop", [Word("w", 0.5, 1.0, 0.75)])


def segment(
    recording: str, offset: float = 0.0, text: str = "some words", language: str = "English", duration: float = 2.0
) -> TranscribedSegment:
    return TranscribedSegment(
        f"{recording}@{offset:g}", recording, f"in/{recording}.wav", None, offset, duration, "ref", 0.75,
        hypothesis(text, language), None, language_ref="Vietnamese",
    )  # fmt: skip


def failed(recording: str, error: str, offset: float = 0.0) -> TranscribedSegment:
    return TranscribedSegment(
        f"{recording}@failed", recording, f"in/{recording}.wav", 1, offset, 0.0, None, None, None, error
    )


def unit(key: UnitKey, *segments: TranscribedSegment, audio_s: float = 10.0) -> TranscribedUnit:
    recordings = len({row.recording_id for row in segments})
    return TranscribedUnit(key, list(segments), recordings, audio_s, audio_s, 1.5, asdict(INFO))


def labels_of(unit: TranscribedUnit) -> list[Labels]:
    return label_unit(unit, TranscribeConfig.model_validate({"inputs": ["a.tar"], "output": "out"}))
