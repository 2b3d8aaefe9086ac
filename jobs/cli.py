"""The `shardscribe` command: parses, calls one job, turns users' mistakes into one line and an exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jobs import evaluate_cli
from jobs.mistakes import EXIT_UNFINISHED, mistakes_in_one_line
from jobs.options import EXAMPLES, Debug, Force, Set, with_force
from jobs.submit_cli import submit
from pipeline.config import PseudolabelConfig, StorageConfig, TranscribeConfig, load_config

app = typer.Typer(
    name="shardscribe",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Batch transcription of speech archives with Qwen3-ASR on Ray.",
    epilog="Start with [bold]shardscribe demo[/bold]. Exit codes: 0 all well, 3 some recordings failed (their rows say "
    "why), 1 the job could not finish, 2 a mistake in the command or configuration.",
)
app.add_typer(submit, name="submit")


@app.command(
    epilog=EXAMPLES + "shardscribe transcribe conf/transcribe.yaml\n\n"
    "shardscribe transcribe conf/transcribe.yaml --dry-run\n\n"
    "shardscribe transcribe conf/transcribe.yaml --set output=s3://bucket/out "
    "--set 'inputs=[\"s3://bucket/calls-{00000..00127}.tar\"]' --set engine.model=Qwen/Qwen3-ASR-0.6B"
)
def transcribe(
    conf: Annotated[Path, typer.Argument(help="YAML configuration; conf/transcribe.yaml is a complete one.")],
    overrides: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and what is done; write nothing.")] = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Transcribe audio shards to Parquet. Run the same command again to resume."""
    _transcribe(TranscribeConfig, conf, with_force(overrides, force), dry_run, debug)


@app.command(
    epilog=EXAMPLES + "shardscribe pseudolabel conf/pseudolabel.yaml --set engine.model=Qwen/Qwen3-ASR-1.7B\n\n"
    "shardscribe pseudolabel conf/pseudolabel.yaml --set 'agree_with={model: Qwen/Qwen3-ASR-0.6B, name: offline}'\n\n"
    "shardscribe funnel demo-out/pseudolabel"
)
def pseudolabel(
    conf: Annotated[Path, typer.Argument(help="YAML configuration; conf/pseudolabel.yaml is a complete one.")],
    overrides: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and what is done; write nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Transcribe with a teacher and mark what is not to be trained on. Run the same command again to resume."""
    _transcribe(PseudolabelConfig, conf, overrides, dry_run, debug)


@app.command(
    epilog=EXAMPLES + "shardscribe follow conf/follow.yaml\n\n"
    "shardscribe follow conf/follow.yaml --set 'inputs=[/var/calls, /run/radio.fifo]' --set output=out/live\n\n"
    "shardscribe follow conf/follow.yaml --until-idle"
)
def follow(
    conf: Annotated[Path, typer.Argument(help="YAML configuration; conf/follow.yaml is a complete one.")],
    overrides: Set = None,
    until_idle: Annotated[
        bool, typer.Option("--until-idle", help="End when all that is there was heard to its end.")
    ] = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Transcribe growing files, FIFOs and arriving files as they come. Ctrl-C stops, the same command goes on."""
    console = Console(stderr=True)
    with mistakes_in_one_line(console, debug):
        from pipeline.follow.config import FollowConfig

        config = load_config(FollowConfig, conf, with_force(overrides, force))
        from jobs import follow as job

        code = job.run(config, until_idle, Console(), console)
    raise typer.Exit(code)


def _transcribe(
    model: type[TranscribeConfig], conf: Path, overrides: list[str] | None, dry_run: bool, debug: bool
) -> None:
    console = Console(stderr=True)
    with mistakes_in_one_line(console, debug):
        config = load_config(model, conf, overrides or [])
        from jobs import transcribe as job

        code = job.dry_run(config, Console()) if dry_run else job.run(config, console)
    raise typer.Exit(code)


@app.command(epilog=EXAMPLES + "shardscribe status out/calls\n\nshardscribe status s3://bucket/out")
def status(
    out: Annotated[str, typer.Argument(help="The output folder of a transcribe job, local or any fsspec URL.")],
    conf: Annotated[Path | None, typer.Option("--conf", help="Take storage options from this configuration.")] = None,
    debug: Debug = False,
) -> None:
    """Print how far a job is, from its output alone: units, hours, failures, speed, ETA."""
    with mistakes_in_one_line(Console(stderr=True), debug):
        storage = StorageConfig() if conf is None else load_config(TranscribeConfig, conf, []).storage
        from jobs import status as job

        job.run(out, storage.access, Console())


@app.command(epilog=EXAMPLES + "shardscribe funnel out/labels\n\nshardscribe funnel s3://bucket/labels --json")
def funnel(
    out: Annotated[str, typer.Argument(help="The output folder of a job, as for status.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, seconds instead of hours.")] = False,
    conf: Annotated[Path | None, typer.Option("--conf", help="Take storage options from this configuration.")] = None,
    debug: Debug = False,
) -> None:
    """Print how many rows and hours are left after each filter, by language."""
    with mistakes_in_one_line(Console(stderr=True), debug):
        storage = StorageConfig() if conf is None else load_config(TranscribeConfig, conf, []).storage
        from jobs import funnel as job

        job.run(out, storage.access, as_json, Console())


@app.command(
    epilog=EXAMPLES + "shardscribe export out/labels --to hf --out data/hf --language Vietnamese\n\n"
    "shardscribe export out/labels --to nemo --audio copy --out s3://bucket/nemo\n\n"
    "shardscribe export out/calls --to srt --out subtitles"
)
def export(
    output: Annotated[str, typer.Argument(metavar="OUT", help="The output folder of a job, as for status.")],
    to: Annotated[str, typer.Option("--to", help="nemo, hf, lhotse, webdataset, srt, vtt or jsonl.")],
    out: Annotated[
        str | None, typer.Option("--out", metavar="FOLDER", help="A new folder; default: OUT/exports/FORMAT.")
    ] = None,
    only_kept: Annotated[
        bool | None,
        typer.Option("--keep-only/--all", help="Rows that no filter caught; default but for srt, vtt and jsonl."),
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option("--language", help="Only this language, by name or code; may be repeated.")
    ] = None,
    audio: Annotated[
        str | None,
        typer.Option("--audio", help="nemo: reference (the inputs' files, the default) or copy (tarred FLAC)."),
    ] = None,
    conf: Annotated[Path | None, typer.Option("--conf", help="Take storage options from this configuration.")] = None,
    debug: Debug = False,
) -> None:
    """Write an output's segments for other tools; hf, lhotse and webdataset hold the audio, read again from the inputs.

    What a format cannot say is left out: jsonl alone has every column. Exit code 3: the audio of some segments could
    not be read again.
    """
    console = Console(stderr=True)
    with mistakes_in_one_line(console, debug):
        storage = StorageConfig() if conf is None else load_config(TranscribeConfig, conf, []).storage
        from jobs import export as job

        code = job.run(output, storage.access, to, out, only_kept, language or [], audio, console)
    raise typer.Exit(code)


@app.command(
    epilog=EXAMPLES + "shardscribe report out/calls\n\n"
    "shardscribe report s3://bucket/out --conf conf/archive-s3.yaml --out calls.html --samples 100"
)
def report(
    output: Annotated[str, typer.Argument(metavar="OUT", help="The output folder of a transcribe job, as for status.")],
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="The page; default: report.html in a local OUT, else here."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=0, help="Segments to show and to play.")] = 24,
    audio: Annotated[
        bool, typer.Option("--audio/--no-audio", help="Embed the segments' audio, from the inputs.")
    ] = True,
    conf: Annotated[Path | None, typer.Option("--conf", help="Take storage options from this configuration.")] = None,
    debug: Debug = False,
) -> None:
    """Write one HTML page about a job: speed, languages, failures, confidence, and segments to listen to."""
    with mistakes_in_one_line(Console(stderr=True), debug):
        storage = StorageConfig() if conf is None else load_config(TranscribeConfig, conf, []).storage
        from jobs import report as job

        job.run(output, storage.access, out, samples, audio, Console())


app.command("evaluate", epilog=evaluate_cli.EPILOG)(evaluate_cli.evaluate)


@app.command(epilog=EXAMPLES + "shardscribe demo\n\nshardscribe demo --out /tmp/demo --model embedded/teacher")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the transcripts go.")] = Path("demo-out"),
    model: Annotated[str, typer.Option("--model", help="Any model that `engine.model` takes.")] = "embedded/student",
    debug: Debug = False,
) -> None:
    """Transcribe the embedded sample shards with an embedded checkpoint and show the results."""
    console = Console(stderr=True)
    with mistakes_in_one_line(console, debug):
        from jobs import demo as job
        from jobs import transcribe as main_job

        config = job.config(out, model)
        code = main_job.run(config, console)
        if code != EXIT_UNFINISHED:
            job.show(config, Console())
    raise typer.Exit(code)


@app.command(
    epilog=EXAMPLES + "shardscribe pack vrfai/Qwen3-ASR-0.6B-int4-QAD models/int4\n\nshardscribe pack quantized packed"
)
def pack(
    model: Annotated[str, typer.Argument(metavar="IN", help="An INT4 checkpoint of ModelOpt: a folder or a Hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    debug: Debug = False,
) -> None:
    """Write an INT4 checkpoint as packed weights, a quarter of the size, which load without ModelOpt."""
    with mistakes_in_one_line(Console(stderr=True), debug):
        from jobs import pack as job

        job.run(model, out, Console())


@app.command(
    epilog=EXAMPLES + "shardscribe quantize conf/quantize.yaml\n\n"
    "shardscribe quantize conf/quantize.yaml --set model=Qwen/Qwen3-ASR-0.6B --set output=models/int4 "
    "--set 'calibration.sources=[labels/out]'"
)
def quantize(
    conf: Annotated[Path, typer.Argument(help="YAML configuration; conf/quantize.yaml is a complete one.")],
    overrides: Set = None,
    debug: Debug = False,
) -> None:
    """Quantize a checkpoint to INT4 with ModelOpt's AWQ, calibrated on speech of every language, and write its card."""
    console = Console(stderr=True)
    with mistakes_in_one_line(console, debug):
        from pipeline.distill.config import QuantizeConfig

        config = load_config(QuantizeConfig, conf, overrides or [])
        from jobs import quantize as job

        job.run(config, console)


@app.command(
    epilog=EXAMPLES + "shardscribe distill conf/distill.yaml\n\n"
    "shardscribe distill conf/distill.yaml --set student=models/int4/fake-quant --set teacher=Qwen/Qwen3-ASR-1.7B "
    "--set 'labels.sources=[labels/out]' --set ray.workers=8"
)
def distill(
    conf: Annotated[Path, typer.Argument(help="YAML configuration; conf/distill.yaml is a complete one.")],
    overrides: Set = None,
    debug: Debug = False,
) -> None:
    """Train a quantized student on a teacher's labels. Run the same command again to resume."""
    console = Console(stderr=True)
    with mistakes_in_one_line(console, debug):
        from pipeline.distill.config import DistillConfig

        config = load_config(DistillConfig, conf, overrides or [])
        from jobs import distill as job

        job.run(config, console)


@app.command(
    "distill-tower",
    epilog=EXAMPLES + "shardscribe distill-tower conf/distill-tower.yaml\n\n"
    "shardscribe distill-tower conf/distill-tower.yaml --set model=Qwen/Qwen3-ASR-0.6B "
    "--set 'speech.sources=[labels/out]'",
)
def distill_tower(
    conf: Annotated[Path, typer.Argument(help="YAML configuration; conf/distill-tower.yaml is a complete one.")],
    overrides: Set = None,
    debug: Debug = False,
) -> None:
    """Train a causal audio tower on what the offline tower of its model hears. Run the same command again to resume."""
    console = Console(stderr=True)
    with mistakes_in_one_line(console, debug):
        from pipeline.distill.config import TowerConfig

        config = load_config(TowerConfig, conf, overrides or [])
        from jobs import distill_tower as job

        job.run(config, console)


@app.command(epilog=EXAMPLES + "shardscribe bench\n\nshardscribe bench 0.6b --clips 48 --out bench.json")
def bench(
    figures: Annotated[
        list[str] | None,
        typer.Argument(help="engine, int4, reading: the default; 0.6b (random weights), streams, pipeline, growth."),
    ] = None,
    clips: Annotated[
        int | None,
        typer.Option(
            "--clips",
            min=1,
            help="Clips of 1 to 30 s for the engines, or streams; default: 256, 32 of 0.6b on a CPU, 96 streams.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of torch; default: all cores.")] = None,
    hours: Annotated[
        list[float] | None, typer.Option("--hours", help="Of audio, for growth; repeat it. Default: 1, 10 and 100.")
    ] = None,
    model: Annotated[str, typer.Option("--model", help="Of streams.")] = "embedded/student",
    tower: Annotated[str, typer.Option("--tower", help="Of streams.")] = "embedded/tower",
    out: Annotated[Path | None, typer.Option("--out", help="Write the figures as JSON, too.")] = None,
    debug: Debug = False,
) -> None:
    """Measure this machine: engines beside qwen-asr, INT4 beside 16 bit, what decoding and VAD cost."""
    with mistakes_in_one_line(Console(stderr=True), debug):
        from jobs import bench as job

        job.run(figures or [], clips, threads, hours or [], (model, tower), out, Console())


@app.command(epilog=EXAMPLES + "shardscribe models")
def models(debug: Debug = False) -> None:
    """List the checkpoints that come with the package, with their card."""
    with mistakes_in_one_line(Console(stderr=True), debug):
        from jobs import models as job

        job.run(Console())


@app.command(epilog=EXAMPLES + "shardscribe family --fsdd data/fsdd --work build/family")
def family(
    fsdd: Annotated[Path, typer.Option("--fsdd", help="Folder of WebDataset shards of the Free Spoken Digit Dataset.")],
    work: Annotated[Path, typer.Option("--work", help="Where speech, logs and checkpoints go.")] = Path("build/family"),
    only: Annotated[list[str] | None, typer.Option("--only", help="Train this one, do nothing else.")] = None,
    install: Annotated[bool, typer.Option("--install", help="Replace the checkpoints of this package.")] = False,
    debug: Debug = False,
) -> None:
    """Make the embedded checkpoints anew: synthesize speech, train, evaluate, write the card. Takes two hours."""
    console = Console(stderr=True)
    with mistakes_in_one_line(console, debug):
        from jobs import family as job

        job.run(fsdd, work, only or [], install, console)


@app.command("family-tower", epilog=EXAMPLES + "shardscribe family-tower --fsdd data/fsdd --work build/tables")
def family_tower(
    fsdd: Annotated[Path, typer.Option("--fsdd", help="Folder of WebDataset shards of the Free Spoken Digit Dataset.")],
    work: Annotated[
        Path, typer.Option("--work", help="Where speech, labels and the tower go; `tables` can share it.")
    ] = Path("build/tables"),
    install: Annotated[bool, typer.Option("--install", help="Replace the tower of this package.")] = False,
    debug: Debug = False,
) -> None:
    """Train the embedded causal tower: speak, label, distill the offline tower. Takes three quarters of an hour."""
    console = Console(stderr=True)
    with mistakes_in_one_line(console, debug):
        from jobs import family_tower as job

        job.run(fsdd, work, install, console)


@app.command(epilog=EXAMPLES + "shardscribe tables --fsdd data/fsdd --work build/tables")
def tables(
    fsdd: Annotated[Path, typer.Option("--fsdd", help="Folder of WebDataset shards of the Free Spoken Digit Dataset.")],
    work: Annotated[Path, typer.Option("--work", help="Where speech, labels and models go.")] = Path("build/tables"),
    bits: Annotated[
        list[int] | None, typer.Option("--bits", min=2, max=4, help="Quantize and distill only these, measure nothing.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Label, quantize, distill and score the embedded student: what INT4 costs and distillation wins back. An hour."""
    console = Console(stderr=True)
    with mistakes_in_one_line(console, debug):
        from jobs import tables as job

        job.run(fsdd, work, bits or [], console)


if __name__ == "__main__":  # as a cluster runs a submitted job, where no script may be installed
    app()
