"""An output whose rows are of real audio: a tar of clips and a stereo call, transcribed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from typer.testing import CliRunner, Result

from jobs.cli import app
from pipeline.audio import decode
from pipeline.output import Output
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.sources.plan import plan
from pipeline.units import Split, UnitKey
from tests import outputs
from tests.conftest import write_tar
from tests.engine.tiny import noise

CLIPS_S = [2.0, 3.0, 4.0]


def make(folder: Path, suffix: str = "wav") -> Output:
    """Clips in a tar, each a segment (Vietnamese, filtered, and empty); and a recording of 9 s cut in three, with a
    failed row."""
    (folder / "in").mkdir()
    tar = write_tar(folder / "in" / "clips.tar", CLIPS_S)
    long = folder / "in" / f"long.{suffix}"
    soundfile.write(long, noise(9, 7), SAMPLE_RATE_HZ)
    inputs = [str(tar), str(long)]
    url = str(folder / "out")
    job = outputs.config(url, inputs)
    of_tar, of_file = plan(job.inputs, {}, job.units.target_s)
    output = outputs.start(url, {split.split_id: 9.0 for split in (of_tar, of_file)}, job)
    rows = [
        row(f"{tar}/clip-000.wav", duration=2.0, text="xin chào", language="Vietnamese", avg_logprob=float("-inf")),
        row(f"{tar}/clip-001.wav", duration=3.0, text="filtered", keep=False, filter_reasons=["char_rate"]),
        row(f"{tar}/clip-002.wav", duration=4.0, text="", status="empty", keep=False, filter_reasons=["empty"]),
    ]
    commit(output, of_tar, rows)
    cuts = [(0.0, 3.25), (3.25, 2.5), (5.75, 3.25)]
    parts = [row(str(long), offset=offset, duration=size, text=f"Part {offset:g}.") for offset, size in cuts]
    commit(output, of_file, [*parts, outputs.failed(str(long), offset=9.0)])
    return output


def row(recording: str, **values: Any) -> dict[str, Any]:
    made = outputs.row(recording, **values)
    return made | {"segment_id": f"{recording}@{made['offset']:g}"} | values


def commit(output: Output, split: Split, rows: list[dict[str, Any]]) -> None:
    outputs.put(output, UnitKey(split.split_id, 0, 0, "z"), rows)


def samples_of(path: Path, start_s: float = 0.0, duration_s: float | None = None) -> np.ndarray:
    """int16 `[num_samples]`, the whole file decoded and then cut."""
    pcm = np.concatenate(list(decode(path)))[:, 0]
    end = None if duration_s is None else round((start_s + duration_s) * SAMPLE_RATE_HZ)
    return pcm[round(start_s * SAMPLE_RATE_HZ) : end]


def export(output: Output, to: str, out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["export", output.url, "--to", to, "--out", str(out), *arguments])


def segments_of(output: Output, only_kept: bool = True) -> list[str]:
    """Ids of the rows that no filter caught, or of all that did not fail."""
    keys = [key for done in output.committed().values() for key in done.keys]
    rows: Sequence[dict[str, Any]] = [
        row for _, _, table in output.tables(keys, ["segment_id", "keep", "status"]) for row in table.to_pylist()
    ]
    return sorted(row["segment_id"] for row in rows if row["keep"] or (not only_kept and row["status"] != "failed"))
