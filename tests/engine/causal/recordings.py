"""Recordings of the embedded held-out sets, and long ones joined from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from pipeline.config import TranscribeConfig
from pipeline.embedded.evaluation import HELDOUT_FOLDER
from pipeline.languages import language_name
from pipeline.read import read_units
from pipeline.sources.plan import plan
from pipeline.units import Done


@dataclass(frozen=True, slots=True)
class Recording:
    pcm: np.ndarray
    text: str
    language: str = ""


@cache
def heldout(name: str) -> list[Recording]:
    """All of a set ("english", "vietnamese", "chinese", "digits", "windows")."""
    config = TranscribeConfig.model_validate({"inputs": [f"{HELDOUT_FOLDER}/{name}.tar"], "output": "unused"})
    return [
        Recording(np.array(each.pcm), each.text_ref or "", language_name(each.language or ""))
        for split in plan(config.inputs, {}, config.units.target_s)
        for unit in read_units(split, Done(), config)
        for each in unit.recordings
    ]


def joined(name: str, seconds: float, first: int = 0, pause_s: float = 0.3) -> Recording:
    """Recordings of a set from number `first` on, one after the other, until there are so many seconds."""
    parts: list[np.ndarray] = []
    texts: list[str] = []
    num_samples, clips = 0, heldout(name)
    while num_samples < seconds * 16_000:
        clip = clips[(first + len(texts)) % len(clips)]
        parts += [clip.pcm, np.zeros(int(pause_s * 16_000), np.int16)]
        texts.append(clip.text)
        num_samples += len(parts[-2]) + len(parts[-1])
    return Recording(np.concatenate(parts)[: int(seconds * 16_000)], " ".join(texts))
