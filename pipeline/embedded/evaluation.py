"""Scores a checkpoint on the family's held-out shards, through the same engine and metrics as everything else."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

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


def evaluate(model: str, folder: Path = HELDOUT_FOLDER, threads: int = 2) -> dict[str, Score]:
    """Transcribe the shards of `folder` with language detection: "<set>" or "windows <language>" -> score.

    `model` is what `engine.model` takes. WER for English, Vietnamese and digits, CER for Chinese.
    """
    config = TranscribeConfig.model_validate(
        {"inputs": [str(folder / "*.tar")], "output": "unused", "engine": {"model": model, "threads": threads}}
    )
    engine = create_engine(config.engine)
    scores: dict[str, list[tuple[ErrorCounts, bool]]] = defaultdict(list)
    try:
        for split in plan(config.inputs, {}, config.units.target_s):
            name = Path(split.items[0][0]).stem
            recordings = [recording for unit in read_units(split, Done(), config) for recording in unit.recordings]
            segments = [Segment(recording.recording_id, recording.pcm) for recording in recordings]
            for recording, result in zip(recordings, engine.submit(segments).result(), strict=True):
                if not isinstance(result, Hypothesis):
                    raise RuntimeError(f"{recording.recording_id}: {result}")
                language = language_name(recording.language or "")
                scored_as = DIGITS if name == DIGITS else language
                counts = error_counts(recording.text_ref or "", result.text, scored_as)
                key = f"{name} {language}" if name == "windows" else name
                scores[key].append((counts, result.language != language))
    finally:
        engine.close()
    return {
        name: Score(sum((counts for counts, _ in rows), ErrorCounts()), len(rows), sum(wrong for _, wrong in rows))
        for name, rows in sorted(scores.items())
    }
