"""Figures of whole jobs for `shardscribe bench`: what is lost between reading and committing, what more hours cost."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import soundfile
from rich.console import Console

from jobs import transcribe
from pipeline.bench import STUDENT, Figure, clips, run
from pipeline.config import EngineConfig, TranscribeConfig
from pipeline.engine.offline import OfflineEngine
from pipeline.output import Output
from pipeline.schema import SAMPLE_RATE_HZ

_CLIP_S = (5.0, 30.0)  # one segment each
_CLIPS_PER_SHARD = 200
_NUM_CLIPS = 100  # different ones


def pipeline(hours: float = 3.0) -> list[Figure]:
    """A job on Ray beside its engine alone on the same segments, both with one thread.

    Both are timed from the first audio at the engine to the last result: what begins once is not of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        audio = write_shards(Path(folder) / "in", hours)
        whole_s, idle_s = job_seconds(Path(folder))
    engine = OfflineEngine(EngineConfig(name="offline", model=STUDENT, threads=1))
    bare_s = run(engine, audio)
    engine.close()
    seconds = sum(map(len, audio)) / SAMPLE_RATE_HZ
    detail = {"audio_s": seconds, "RTFx": {"pipeline": seconds / whole_s, "bare engine": seconds / bare_s}}
    return [
        Figure("pipeline / bare engine", bare_s / whole_s, "x", 0.95, detail=detail),
        Figure("share of the job in which the engine has no unit", idle_s / whole_s, "", 0.02, at_most=True),
    ]


def growth(all_hours: Sequence[float] = (1.0, 10.0, 100.0)) -> list[Figure]:
    """Time of an hour of audio in jobs of more and more hours, beside the smallest's."""
    seconds: dict[float, float] = {}
    for hours in all_hours:
        with tempfile.TemporaryDirectory() as folder:
            audio = write_shards(Path(folder) / "in", hours)
            audio_h = sum(map(len, audio)) / SAMPLE_RATE_HZ / 3600
            seconds[hours] = job_seconds(Path(folder))[0] / audio_h
    first = seconds[all_hours[0]]
    return [
        Figure(f"an hour of audio in {hours:g} / in {all_hours[0]:g}", seconds[hours] / first, "x", 1.05, at_most=True,
               detail={"s / h of audio": seconds[hours]})
        for hours in all_hours[1:]
    ]  # fmt: skip


def job_seconds(folder: Path) -> tuple[float, float]:
    """Of a job on the shards in `folder`, from the first unit's arrival at the engine to the last commit; and those of
    them in which no unit was there."""
    config = TranscribeConfig.model_validate(
        {
            "inputs": [str(folder / "in" / "*.tar")],
            "output": str(folder / "out"),
            "engine": {"name": "offline", "model": STUDENT, "threads": 1},
        }
    )
    if code := transcribe.run(config, Console(quiet=True)):
        raise RuntimeError(f"the job ended with exit code {code}")
    output = Output(config.output, {})
    records: list[dict[str, Any]] = list(
        output.records([key for done in output.committed().values() for key in done.keys])
    )
    num_rows = ds.dataset(folder / "out" / "transcripts").count_rows()
    if num_rows != sum(record["num_recordings"] for record in records):
        raise RuntimeError(f"{num_rows} rows: clips were cut, and the engine alone had other segments")
    stays = sorted((record["committed_at"] - record["busy_s"], record["committed_at"]) for record in records)
    idle_s, seen_until = 0.0, stays[0][0]
    for began, ended in stays:
        idle_s += max(0.0, began - seen_until)
        seen_until = max(seen_until, ended)
    return seen_until - stays[0][0], idle_s


def write_shards(folder: Path, hours: float) -> list[np.ndarray]:
    """WebDataset shards of Opus clips, some of them again and again; returns what they hold."""
    folder.mkdir()
    speech = clips(_NUM_CLIPS, *_CLIP_S)
    encoded = []
    for clip in speech:
        buffer = io.BytesIO()
        soundfile.write(buffer, clip, SAMPLE_RATE_HZ, format="OGG", subtype="OPUS")
        encoded.append(buffer.getvalue())
    audio: list[np.ndarray] = []
    left = int(hours * 3600 * SAMPLE_RATE_HZ)
    shard = 0
    while left > 0:
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(_CLIPS_PER_SHARD):
                which = len(audio) % _NUM_CLIPS
                info = tarfile.TarInfo(f"{shard:05d}-{number:05d}.opus")
                info.size = len(encoded[which])
                tar.addfile(info, io.BytesIO(encoded[which]))
                audio.append(speech[which])
                left -= len(speech[which])
                if left <= 0:
                    break
        shard += 1
    return audio
