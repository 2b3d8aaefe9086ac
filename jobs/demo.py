"""The main job on what comes with the package: three languages, real digits, one long recording; about a minute."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.config import TranscribeConfig
from pipeline.engine.checkpoint import EMBEDDED_FOLDER
from pipeline.evaluate.recordings import read_output
from pipeline.evaluate.scores import evaluate
from pipeline.output import Output

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
    evaluation = evaluate(read_output(config.output, config.storage.access))
    table = Table("recording", "audio", "language", "text", "error", title="Recordings", show_lines=False)
    for each in evaluation.scored:
        item, error = each.item, f"{100 * each.counts.rate:.1f} %"
        name, seconds = Path(item.item_id).name, f"{item.duration_s or 0:.1f} s"
        table.add_row(name, seconds, item.detected or "", _clipped(item.text), error)
    console.print(table)
    for group in evaluation.languages:
        counts = group.counts
        console.print(f"{group.name:<11} {group.measure} {100 * counts.rate:5.2f} %  of {counts.num_reference:,}")
    rtfx = evaluation.system.rtfx
    if rtfx is not None:
        console.print(f"RTFx        {rtfx:.1f}  (audio seconds a wall second, start of the engine included)")
    for line in (
        "",
        f"Parquet in  {output.transcripts_url}",
        f"pandas      pd.read_parquet({output.transcripts_url!r})",
        f"DuckDB      SELECT recording_id, text FROM '{output.transcripts_url}/*.parquet'",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _clipped(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
