"""Scores a checkpoint on the family's held-out shards, through the same engine and metrics as everything else."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import TranscribeConfig
from pipeline.engine.checkpoint import EMBEDDED_FOLDER
from pipeline.engine.create import create_engine
from pipeline.languages import language_name
from pipeline.metrics import ErrorCounts, error_counts
from pipeline.read import read_units
from pipeline.schema import Hypothesis, Segment
from pipeline.sources.plan import plan
from pipeline.units import Done

HELDOUT_FOLDER = EMBEDDED_FOLDER / "heldout"
DIGITS = "digits"  # scored word by word: the English normalizer would write a whole string as one number


@dataclass(frozen=True, slots=True)
class Score:
    """Errors of one held-out set; `language_errors` counts recordings whose language was detected wrongly."""

    counts: ErrorCounts
    num_recordings: int
    language_errors: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model makes of a recording of a set: "english", "digits", or "windows <language>"."""

    set_name: str
    counts: ErrorCounts
    is_wrong_language: bool


def evaluate(model: str, folder: Path = HELDOUT_FOLDER, threads: int = 2) -> dict[str, Score]:
    """Transcribe the shards of `folder` with language detection: set -> score. `model` is what `engine.model` takes."""
    answers: dict[str, list[Answer]] = defaultdict(list)
    for answer in transcribe({"model": model, "threads": threads}, folder):
        answers[answer.set_name].append(answer)
    return {
        name: Score(sum((each.counts for each in its), ErrorCounts()), len(its), sum(e.is_wrong_language for e in its))
        for name, its in sorted(answers.items())
    }


def transcribe(engine_options: dict[str, Any], folder: Path = HELDOUT_FOLDER) -> list[Answer]:
    """The answers to all recordings, in the order of the shards. WER for English, Vietnamese and digits, CER for
    Chinese."""
    config = TranscribeConfig.model_validate(
        {"inputs": [str(folder / "*.tar")], "output": "unused", "engine": engine_options}
    )
    engine = create_engine(config.engine)
    answers = []
    try:
        for split in plan(config.inputs, {}, config.units.target_s):
            name = Path(split.items[0][0]).stem
            recordings = [recording for unit in read_units(split, Done(), config) for recording in unit.recordings]
            segments = [Segment(recording.recording_id, recording.pcm) for recording in recordings]
            for recording, result in zip(recordings, engine.submit(segments).result(), strict=True):
                if not isinstance(result, Hypothesis):
                    raise RuntimeError(f"{recording.recording_id}: {result}")
                language = language_name(recording.language or "")
                counts = error_counts(recording.text_ref or "", result.text, DIGITS if name == DIGITS else language)
                set_name = f"{name} {language}" if name == "windows" else name
                answers.append(Answer(set_name, counts, result.language != language))
    finally:
        engine.close()
    return answers
