"""The main job on what comes with the package: three languages, real digits, one long recording; about a minute."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
from rich.console import Console
from rich.table import Table

from pipeline.config import TranscribeConfig
from pipeline.engine.checkpoint import EMBEDDED_FOLDER
from pipeline.languages import language_name
from pipeline.metrics import ErrorCounts, error_counts, unit_name
from pipeline.output import Output
from pipeline.summary import summarize

SAMPLES = EMBEDDED_FOLDER / "samples"


def config(output: Path, model: str) -> TranscribeConfig:
    """The demo's configuration: small units, so that there is something to resume."""
    return TranscribeConfig.model_validate(
        {
            "inputs": [str(SAMPLES / "*.tar")],
            "output": str(output),
            "units": {"target_s": 120},
            "engine": {"model": model},
        }
    )


def show(config: TranscribeConfig, console: Console) -> None:
    """Print a row per recording with its text and error rate against the reference, the totals, and how to open it."""
    output = Output(config.output, config.storage.access)
    columns = ["recording_id", "offset", "duration", "language", "text", "text_ref"]
    rows = ds.dataset(output.transcripts_url).to_table(columns=columns).to_pylist()
    recordings: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["recording_id"], row["offset"])):
        recordings[row["recording_id"]].append(row)

    table = Table("recording", "audio", "language", "text", "error", title="Recordings", show_lines=False)
    totals: dict[str, ErrorCounts] = defaultdict(ErrorCounts)
    for recording_id, segments in recordings.items():
        language = str(segments[0]["language"] or "")
        joiner = "" if language == "Chinese" else " "
        text = joiner.join(str(segment["text"]) for segment in segments if segment["text"])
        reference = segments[0]["text_ref"]
        error = ""
        if reference is not None:
            spoken = _spoken_language(recording_id)
            counts = error_counts(str(reference), text, spoken)
            totals[spoken] += counts
            error = f"{100 * counts.rate:.1f} %"
        seconds = sum(segment["duration"] for segment in segments)
        table.add_row(_short(recording_id), f"{seconds:.1f} s", language, _clipped(text), error)
    console.print(table)
    for language, counts in totals.items():
        console.print(f"{language:<11} {unit_name(language)} {100 * counts.rate:5.2f} %  of {counts.num_reference:,}")
    rtfx = summarize(output).rtfx
    if rtfx is not None:
        console.print(f"RTFx        {rtfx:.1f}  (audio seconds a wall second, start of the engine included)")
    for line in (
        "",
        f"Parquet in  {output.transcripts_url}",
        f"pandas      pd.read_parquet({output.transcripts_url!r})",
        f"DuckDB      SELECT recording_id, text FROM '{output.transcripts_url}/*.parquet'",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _spoken_language(recording_id: str) -> str:
    """The samples are called after their language: `vi-007.mp3`, `en-digits-003.flac`."""
    return language_name(Path(recording_id).name.partition("-")[0])


def _short(recording_id: str) -> str:
    return Path(recording_id).name


def _clipped(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
