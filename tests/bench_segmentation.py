"""Segmentation policies on long recordings: `python -m tests.bench_segmentation DIR [--model M] [--minutes N]`.

An hour of unheard sentences in unheard voices in each language (kept in DIR), and the embedded long recording, through
each policy with one engine: error of the whole text, cuts within 250 ms of a true sentence end, audio decoded per audio
second, speed. Needs espeak-ng.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from pipeline.attempts import Ledger
from pipeline.audio import decode
from pipeline.config import EngineConfig, SegmentationConfig
from pipeline.embedded.grammar import LANGUAGES
from pipeline.embedded.shards import Item, long_recording, write_shard
from pipeline.engine.checkpoint import EMBEDDED_FOLDER
from pipeline.metrics import error_counts, unit_name
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.segment import segment_unit
from pipeline.transcribe import Transcriber
from pipeline.units import Recording, TranscribedUnit, Unit, UnitKey

SEED = 3
POLICIES = ("fixed", "pause", "sentence")
NEAR_S = 0.25
LONG_SAMPLE = EMBEDDED_FOLDER / "samples" / "long-00000.tar"


@dataclass(frozen=True, slots=True)
class Talk:
    name: str
    language: str
    text: str
    pcm: np.ndarray
    sentences: list[dict[str, float]]


def talks(folder: Path, minutes: float, languages: Sequence[str] = LANGUAGES) -> list[Talk]:
    paths = [LONG_SAMPLE]
    for language in languages:
        path = folder / f"{language.lower()}-{minutes:g}min.tar"
        if not path.exists():
            item: Item = long_recording(f"{language.lower()}-{minutes:g}min", language, minutes * 60, SEED)
            write_shard(path, [(item, "opus")])
        paths.append(path)
    return [talk(path) for path in paths]


def talk(path: Path) -> Talk:
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    (audio,) = (data for name, data in files.items() if name.endswith(".opus"))
    (label,) = (json.loads(data) for name, data in files.items() if name.endswith(".json"))
    pcm = np.concatenate([block[:, 0] for block in decode(io.BytesIO(audio), "mix", 0.0, None)])
    return Talk(path.stem, label["language"], label["text"], pcm, label["sentences"])


def near_sentence_end(cut_s: float, sentences: Sequence[dict[str, float]]) -> bool:
    """True within `NEAR_S` of a pause between two sentences."""
    for before, after in pairwise(sentences):
        begin, end = before["offset"] + before["duration"], after["offset"]
        if begin - NEAR_S <= cut_s <= end + NEAR_S:
            return True
    return False


def measure(talk: Talk, transcriber: Transcriber, config: SegmentationConfig) -> dict[str, object]:
    unit = Unit(UnitKey("0" * 16, 0, 0, "z"), [Recording(talk.name, talk.name, talk.pcm)])
    unit = segment_unit(unit, config)
    began = time.perf_counter()
    done: TranscribedUnit = asyncio.run(transcriber(unit))
    wall_s = time.perf_counter() - began
    rows = sorted(done.segments, key=lambda row: row.offset)
    texts = [row.hypothesis.text for row in rows if row.hypothesis is not None]
    counts = error_counts(talk.text, ("" if talk.language == "Chinese" else " ").join(texts), talk.language)
    cuts = [row.offset + row.duration for row in rows[:-1]]
    near = sum(near_sentence_end(cut, talk.sentences) for cut in cuts)
    return {
        "recording": talk.name,
        "policy": config.policy,
        "measure": unit_name(talk.language),
        "error": round(100 * counts.rate, 2),
        "segments": len(rows),
        "near_sentence_end": round(near / max(1, len(cuts)), 3),
        "decoded_per_audio": round(done.decoded_s / done.audio_s, 3),
        "rtfx": round(done.audio_s / wall_s, 1),
        "audio_min": round(len(talk.pcm) / SAMPLE_RATE_HZ / 60, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="embedded/student")
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    recordings = talks(arguments.folder, arguments.minutes)
    for policy in POLICIES:
        config = SegmentationConfig(policy=policy)
        transcriber = Transcriber(EngineConfig(name="reference", model=arguments.model), config, Ledger())
        for each in recordings:
            print(json.dumps(measure(each, transcriber, config)), flush=True)


if __name__ == "__main__":
    main()
