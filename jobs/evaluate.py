"""Scores a system against references: an output, a JSONL file, or a model on inputs that it transcribes first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pipeline import storage
from pipeline.config import ConfigError, TranscribeConfig, load_config
from pipeline.evaluate import document
from pipeline.evaluate.compare import Comparison, both_kept, compare, matched
from pipeline.evaluate.items import System, checked_language, only_kept, pooled, read_hypotheses
from pipeline.evaluate.page import render
from pipeline.evaluate.recordings import read_output
from pipeline.evaluate.scores import Evaluation, Group, evaluate
from pipeline.storage import Options

_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True, slots=True)
class Request:
    """What to score. `outputs` and `hypotheses` are parts of one system; `against` is an output or a JSONL file;
    `language` overrides every item's own; `out` takes the three files."""

    outputs: Sequence[str] = ()
    hypotheses: Sequence[str] = ()
    against: str | None = None
    language: str | None = None
    kept_only: bool = False
    out: str | None = None
    as_json: bool = False


def transcription(
    inputs: Sequence[str], model: str, out: str | None, conf: Path | None, overrides: Sequence[str]
) -> TranscribeConfig:
    """The main job that transcribes `inputs` into `out`; `conf` is what its configuration begins with."""
    if out is None:
        raise ConfigError("--manifest needs --out DIR: the transcripts go there, and the scores beside them")
    given = [("inputs", list(inputs)), ("output", out), ("engine.model", model)]
    settings = [*overrides, *(f"{key}={json.dumps(value)}" for key, value in given)]
    return load_config(TranscribeConfig, conf, settings)


def run(request: Request, options: Options, console: Console) -> None:
    """Score, print a table (or JSON), and write evaluation.json, .md and .html to `request.out`.

    Raises ConfigError for what cannot be scored.
    """
    if not request.outputs and not request.hypotheses:
        raise ConfigError(
            "nothing to score: name an output folder, --hypotheses FILE, or --manifest FILE --model MODEL"
        )
    language = checked_language(request.language) if request.language else None
    system = pooled(
        [read_output(url, options, language) for url in request.outputs]
        + [read_hypotheses(path, options, language) for path in request.hypotheses]
    )
    other = _other(request.against, system, options, language) if request.against else None
    if request.kept_only:
        system, other = both_kept(system, other) if other else (only_kept(system), None)
        if not system.items:
            raise ConfigError(f"{system.name}: filters caught every recording, and --kept-only leaves nothing to score")
    evaluation = evaluate(system)
    comparison = compare(evaluation, other) if other else None
    found = document.to_json(evaluation, comparison)
    if request.as_json:
        console.print(
            json.dumps(found, ensure_ascii=False, allow_nan=False), highlight=False, markup=False, soft_wrap=True
        )
    else:
        _show(evaluation, comparison, console)
    if request.out is not None:
        files = {
            "evaluation.json": json.dumps(found, ensure_ascii=False, allow_nan=False, indent=1),
            "evaluation.md": document.to_markdown(evaluation, comparison),
            "evaluation.html": render(evaluation, comparison),
        }
        for name, text in files.items():
            url = storage.join(storage.resolve(request.out), name)
            storage.write_bytes(url, text.encode(), options)
            if not request.as_json:
                console.print(url, highlight=False, markup=False, soft_wrap=True)


def _other(against: str, system: System, options: Options, language: str | None) -> System:
    read = read_hypotheses if against.lower().endswith(_LINES) else read_output
    return matched(system, read(against, options, language))


def _show(evaluation: Evaluation, comparison: Comparison | None, console: Console) -> None:
    lines = [["", "error", "95 %", "sub", "del", "ins", "reference", "recordings", "failed"]]
    for title, groups in (("", evaluation.languages), ("set ", evaluation.sets), ("", evaluation.overall)):
        if title != "set " or any(group.name for group in groups):
            lines += [_cells(title, group) for group in groups]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *figures in lines:  # no rich table: it cuts figures where a terminal is narrow
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(figures, widths[1:], strict=True))]
        console.print("  ".join(cells), highlight=False, markup=False, soft_wrap=True)
    system = evaluation.system
    if comparison is not None:
        for each in comparison.contrasts:
            name, mine, theirs, gained, interval, p, *_ = document.contrast_cells(each)
            tested = f", {gained} ({interval}), p {p}" if gained else ""
            console.print(f"against  {name}: {mine} to {theirs}{tested}", highlight=False, soft_wrap=True)
    if evaluation.calibration is not None:
        console.print(f"calibration error {evaluation.calibration.error:.4f}", highlight=False)
    if system.rtfx is not None:
        console.print(f"RTFx {system.rtfx:.1f}", highlight=False)
    for number, what in (
        (system.num_without_reference, "recordings have no reference and are not scored"),
        (system.num_without_language, "items name no language and are scored by word; --language names one for all"),
    ):
        if number:
            console.print(f"{number:,} {what}", highlight=False, soft_wrap=True)


def _cells(title: str, group: Group) -> list[str]:
    name = f"{group.name} {group.language}" if title == "set " else group.name
    counts = group.counts
    numbers = (counts.substitutions, counts.deletions, counts.insertions, counts.num_reference)
    return [
        f"{title}{name}",
        f"{group.measure} {document.percent(counts.rate)}",
        document.interval_text(group.interval),
        *(f"{number:,}" for number in (*numbers, group.num_items, group.num_failed)),
    ]
