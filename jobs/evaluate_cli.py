"""`shardscribe evaluate`: what is written already, what a model writes first, or what it publishes of live audio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jobs.mistakes import EXIT_UNFINISHED, mistakes_in_one_line
from jobs.options import EXAMPLES, Debug, Force, Set, with_force
from pipeline.config import ConfigError, StorageConfig, TranscribeConfig, load_config

EPILOG = (
    EXAMPLES + "shardscribe evaluate out/test-sets --out scores --against out/other-model\n\n"
    "shardscribe evaluate --hypotheses hypotheses.jsonl --json\n\n"
    "shardscribe evaluate --manifest test-clean.jsonl --model embedded/teacher --set engine.name=offline --out eval"
    "\n\nshardscribe evaluate --contract streaming --manifest talks.tar --model embedded/student "
    "--set engine.tower=embedded/tower --system causal --system windowed --system offline --out live"
)


def evaluate(
    outputs: Annotated[
        list[str] | None, typer.Argument(metavar="[OUT]...", help="Output folders of transcribe jobs with references.")
    ] = None,
    hypotheses: Annotated[
        list[str] | None,
        typer.Option("--hypotheses", metavar="FILE", help="JSONL: reference, hypothesis; language, id, set, duration."),
    ] = None,
    manifest: Annotated[
        list[str] | None,
        typer.Option("--manifest", metavar="FILE", help="Transcribe this into --out first; any input with references."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="For --manifest: what `engine.model` takes.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Where evaluation.json, .md and .html go.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="OUT|FILE", help="A second system on the same recordings.")
    ] = None,
    language: Annotated[
        str | None, typer.Option("--language", help="The references' language; default: what each names.")
    ] = None,
    kept_only: Annotated[
        bool, typer.Option("--kept-only", help="Leave out recordings that a filter caught, in any of their rows.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    conf: Annotated[
        Path | None, typer.Option("--conf", help="Storage options and, for --manifest, all else of this configuration.")
    ] = None,
    contract: Annotated[
        str | None,
        typer.Option(
            "--contract", metavar="streaming", help="Replay --manifest live, score what is published in time."
        ),
    ] = None,
    systems: Annotated[
        list[str] | None,
        typer.Option("--system", metavar="NAME", help="With --contract: causal (the default), windowed, offline."),
    ] = None,
    overrides: Set = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Score transcripts: WER and CER by language and set with intervals, confidence, filters, the worst errors."""
    messages, code, sources = Console(stderr=True), 0, list(outputs or [])
    overrides = with_force(overrides, force)
    with mistakes_in_one_line(messages, debug):
        if contract is not None:
            if sources or hypotheses or against or kept_only or as_json:
                raise ConfigError(
                    "--contract goes with --manifest, --model, --system, --language, --set and --out alone"
                )
            from jobs import evaluate_streaming

            asked = evaluate_streaming.request(
                contract,
                manifest or [],
                model,
                out,
                systems or [],
                language=language,
                conf=conf,
                overrides=overrides,
            )
            evaluate_streaming.run(asked, Console(), messages)
            raise typer.Exit
        if systems:
            raise ConfigError("--system goes with --contract streaming")
        if bool(manifest) != bool(model) or (overrides and not manifest):
            raise ConfigError("--manifest FILE and --model MODEL go together, and --set with them")
        from jobs import evaluate as job

        if manifest and model:
            from jobs import transcribe as main_job

            config = job.transcription(manifest, model, out, conf, overrides)
            code, storage = main_job.run(config, messages), config.storage
            sources.append(config.output)
        else:
            storage = StorageConfig() if conf is None else load_config(TranscribeConfig, conf, []).storage
        if code != EXIT_UNFINISHED:
            request = job.Request(sources, hypotheses or [], against, language, kept_only, out, as_json)
            job.run(request, storage.access, Console())
    raise typer.Exit(code)
