"""Manifests and outputs of jobs to learn from, over the package's own held-out speech."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from pipeline.audio import decode
from pipeline.config import InputConfig
from pipeline.embedded.evaluation import HELDOUT_FOLDER
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.sources.plan import plan, samples

HELDOUT = {"English": "english", "Vietnamese": "vietnamese", "Chinese": "chinese"}


@cache
def heldout(name: str, count: int) -> list[tuple[str, np.ndarray, str, str]]:
    """(path, int16 pcm, text, language) of the first recordings of a held-out tar."""
    (split,) = plan([InputConfig(path=str(HELDOUT_FOLDER / f"{name}.tar"))], {}, 1800)
    found = []
    for sample in samples(split, {}):
        assert sample.open is not None
        with sample.open() as file:
            pcm = np.concatenate([block[:, 0] for block in decode(file)])
        found.append((sample.audio_filepath, pcm, sample.text_ref or "", sample.language or ""))
        if len(found) == count:
            break
    return found


def write_manifest(path: Path, per_language: int, languages: Sequence[str] = tuple(HELDOUT)) -> Path:
    """A NeMo manifest of the first recordings of the held-out tars, which stay where they are."""
    lines = [
        {"audio_filepath": audio, "offset": 0.0, "duration": len(pcm) / SAMPLE_RATE_HZ, "text": text, "lang": language}
        for name in languages
        for audio, pcm, text, language in heldout(HELDOUT[name], per_language)
    ]
    path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
    return path
