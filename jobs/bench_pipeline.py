"""Figures of whole jobs for `shardscribe bench`: what is lost between reading and committing, what more hours cost.

A job runs in a process of its own, as it does for its user: whatever ends it, the bench says so.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import soundfile
import torch
import yaml
from rich.console import Console

from pipeline import units
from pipeline.bench import STUDENT, Figure, clips, run
from pipeline.config import EngineConfig, TranscribeConfig
from pipeline.engine.offline import OfflineEngine
from pipeline.output import Output
from pipeline.read import read_units
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.segment import segment_unit
from pipeline.sources.plan import plan
from pipeline.units import Done

GROWTH_HOURS = (1.0, 10.0, 100.0)
_CLIP_S = (5.0, 30.0)  # one segment each
_CLIPS_PER_SHARD = 200
_NUM_CLIPS = 100  # different ones
_LAST_LINES = 20  # of a job that failed


def pipeline(console: Console, hours: float = 3.0) -> list[Figure]:
    """A job on Ray beside its engine alone on the same segments, both with one thread; and the bound of such a job on
    this machine, which is the slower of its engine and of its reading when they only share the machine.

    Jobs are timed from the first audio at the engine to the last result: what begins once is not of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        audio = write_shards(Path(folder) / "in", hours)
        whole_s, idle_s = job_seconds(Path(folder), console)
        engine = OfflineEngine(EngineConfig(name="offline", model=STUDENT, threads=1))
        bare_s = run(engine, audio)
        beside_s, reading_s = beside_reading(engine, audio, Path(folder))
        engine.close()
    seconds = sum(map(len, audio)) / SAMPLE_RATE_HZ
    taken = {"pipeline": whole_s, "bare engine": bare_s, "engine beside reading": beside_s, "reading": reading_s}
    detail = {"audio_s": seconds, "RTFx": {name: seconds / each for name, each in taken.items()}}
    return [
        Figure("pipeline / bare engine", bare_s / whole_s, "x", 0.95, detail=detail),
        Figure(
            "bound of it: the slower of reading and engine, side by side without Ray",
            bare_s / max(beside_s, reading_s),
            "x",
        ),
        Figure("share of the job in which the engine has no unit", idle_s / whole_s, "", 0.02, at_most=True),
    ]


def growth(console: Console, all_hours: Sequence[float] = GROWTH_HOURS) -> list[Figure]:
    """Time of an hour of audio in jobs of more and more hours, beside the smallest's."""
    seconds: dict[float, float] = {}
    for hours in all_hours:
        with tempfile.TemporaryDirectory() as folder:
            audio = write_shards(Path(folder) / "in", hours)
            audio_h = sum(map(len, audio)) / SAMPLE_RATE_HZ / 3600
            seconds[hours] = job_seconds(Path(folder), console)[0] / audio_h
        console.print(f"{hours:g} h of audio: {seconds[hours]:.2f} s an hour", highlight=False)
    first = seconds[all_hours[0]]
    return [
        Figure(f"an hour of audio in {hours:g} / in {all_hours[0]:g}", seconds[hours] / first, "x", 1.05, at_most=True,
               detail={"s / h of audio": seconds[hours]})
        for hours in all_hours[1:]
    ]  # fmt: skip


def beside_reading(engine: OfflineEngine, audio: Sequence[np.ndarray], folder: Path) -> tuple[float, float]:
    """Seconds of the engine for `audio`, and of a process that reads it from the shards in `folder` meanwhile."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    reader = context.Process(target=_read, args=(job_config(folder), its))
    reader.start()
    ours.recv()
    ours.send(None)
    engine_s = run(engine, audio)
    reading_s: float = ours.recv()
    reader.join()
    return engine_s, reading_s


def _read(config: TranscribeConfig, bench: Connection) -> None:
    torch.set_num_threads(1)
    splits = list(plan(config.inputs, {}, config.units.target_s))
    bench.send(None)
    bench.recv()
    began = time.perf_counter()
    for split in splits:
        for unit in read_units(split, Done(), config):
            units.to_table(segment_unit(unit, config.segmentation))
    bench.send(time.perf_counter() - began)


def job_config(folder: Path) -> TranscribeConfig:
    return TranscribeConfig.model_validate(
        {
            "inputs": [str(folder / "in" / "*.tar")],
            "output": str(folder / "out"),
            "engine": {"name": "offline", "model": STUDENT, "threads": 1},
        }
    )


def job_seconds(folder: Path, console: Console) -> tuple[float, float]:
    """Of a job on the shards in `folder`, from the first unit's arrival at the engine to the last commit; and those of
    them in which no unit was there. Raises RuntimeError when the job does not end well, whatever ends it."""
    config = job_config(folder)
    run_job(config, folder / "job.yaml", console)
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


def run_job(config: TranscribeConfig, path: Path, console: Console) -> None:
    """`shardscribe transcribe` of `config`, written to `path`, with its progress on `console`."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    ours = str(Path(__file__).parent.parent)
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "transcribe", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([ours, os.environ.get("PYTHONPATH", "")])},
    )
    assert job.stdout is not None
    lines: deque[str] = deque(maxlen=_LAST_LINES)
    for line in job.stdout:
        lines.append(line)
        if "elapsed" in line:
            console.print(line.rstrip(), highlight=False, soft_wrap=True)
    code = job.wait()
    if code:
        console.print("".join(lines), highlight=False, soft_wrap=True, markup=False)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise RuntimeError(f"the job {how}; its last lines are above")


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
