"""The main job, also with a teacher (`shardscribe pseudolabel`): audio in, one Parquet object per unit out.

fit     thresholds of the filters, where `labels.calibrate` asks for it and no run before did
plan    inputs become splits; what is committed already is taken off
run     pipeline.graph works the rest off on Ray
prove   every planned split is complete in the output, by its names alone
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from pipeline import calibrate, redact, retry
from pipeline import output as outputs
from pipeline.cluster import connected
from pipeline.config import ConfigError, TranscribeConfig
from pipeline.engine.causal.tower_file import local_weights
from pipeline.output import Output, RunPlan
from pipeline.progress import Progress, duration
from pipeline.sources.plan import plan
from pipeline.summary import Summary, print_summary, summarize
from pipeline.units import Done, Split

EXIT_OK, EXIT_UNFINISHED, EXIT_SOME_FAILED = 0, 1, 3
MAX_ROUNDS = 3  # over the splits that a crash left incomplete


@dataclass(frozen=True, slots=True)
class Work:
    """All splits of the inputs, what of them is committed, and those with something left to do."""

    splits: list[Split]
    done: dict[str, Done]
    pending: list[Split]

    @property
    def pending_s(self) -> float:
        """Estimated seconds of audio still to do: whole splits, so an upper bound for those begun."""
        return sum(split.estimated_s for split in self.pending)


def plan_work(config: TranscribeConfig, output: Output) -> Work:
    """List the inputs and compare them with what the output holds.

    Raises ConfigError when the output holds units that these inputs do not give.
    """
    splits = list(plan(config.inputs, config.storage.access, config.units.target_s))
    done = output.committed()
    strange = sorted(done.keys() - {split.split_id for split in splits})
    if strange:
        raise ConfigError(
            f"{output.url} holds units of {len(strange)} splits that these inputs do not give (such as "
            f"{strange[0]}): the inputs have changed since. Restore them, or write to a new output"
        )
    return Work(splits, done, incomplete(splits, done))


def incomplete(splits: Sequence[Split], done: dict[str, Done], num_groups: int | None = None) -> list[Split]:
    """Those that still have a unit to come, of their first `num_groups`, by the names of what is committed."""
    return [split for split in splits if split.split_id not in done or not done[split.split_id].complete(num_groups)]


def dry_run(config: TranscribeConfig, console: Console) -> int:
    """Print the plan: units, hours, what is done. Writes nothing."""
    output = Output(config.output, config.storage.access)
    labels = []
    if config.labels.calibrate is not None:
        fit = calibrate.read_fit(output, config.storage.access, config)
        config = fit.applied(config) if fit is not None else config
        labels = [
            f"labels    thresholds {'are' if fit else 'will be'} fitted in {redact.names(calibrate.folder(output))}"
        ]
    work = plan_work(config, output)
    num_bytes = sum(split.num_bytes for split in work.splits)
    total_s = sum(split.estimated_s for split in work.splits)
    units = sum(max(1, round(split.estimated_s / config.units.target_s)) for split in work.splits)
    committed = sum(len(done.keys) for done in work.done.values())
    lines = [
        f"inputs    {redact.names(', '.join(source.path for source in config.inputs))}",
        f"          {len(work.splits):,} splits, {num_bytes / 1e9:,.2f} GB, "
        f"~{duration(total_s)} of audio, ~{units:,} units",
        f"output    {redact.names(output.url)}",
        f"          {committed:,} units committed, {len(work.splits) - len(work.pending):,} splits complete",
        f"to do     {len(work.pending):,} splits, at most ~{duration(work.pending_s)} of audio",
        f"engine    {config.engine.name}, {config.engine.model}, config {config.result_hash()}",
        *labels,
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    return EXIT_OK


def run(config: TranscribeConfig, console: Console) -> int:
    """Run the job to its end and return its exit code: 0, 3 when some recordings failed, 1 when units are missing.

    Raises ConfigError for what the user can mend; any other exception ends the job with what was committed kept.
    """
    output = Output(config.output, config.storage.access)
    before, num_retries = retry.num_retries(), 0
    config = calibrated(config, output, console)
    work = plan_work(config, output)
    claim(output, config)
    run_id = outputs.new_run_id()
    if work.pending:
        output.write_plan(RunPlan(run_id, time.time(), config.units.target_s, outputs.planned(work.splits)))
        console.print(
            f"{len(work.splits):,} splits, {len(work.splits) - len(work.pending):,} complete; "
            f"~{duration(work.pending_s)} of audio to do at most. Output: {redact.names(output.url)}",
            highlight=False,
            soft_wrap=True,
        )
        num_retries = _transcribe(config, work, output, run_id, console)
    else:
        console.print(f"nothing left to do in {redact.names(output.url)}", highlight=False, soft_wrap=True)
    code = report(summarize(output), console)
    num_retries += retry.num_retries() - before
    if num_retries:
        console.print(f"storage    {num_retries:,} requests made again in this run", highlight=False, soft_wrap=True)
    return code


def claim(output: Output, config: TranscribeConfig) -> None:
    second = config.agree_with
    output.claim(config, local_weights(config.engine), local_weights(second) if second is not None else None)


def calibrated(config: TranscribeConfig, output: Output, console: Console) -> TranscribeConfig:
    """The configuration with the thresholds that `labels.calibrate` asks for, fitted once for an output."""
    options = config.labels.calibrate
    if options is None:
        return config
    access = config.storage.access
    fit = calibrate.read_fit(output, access, config)
    if fit is None:
        sample = Output(options.output, access) if options.output else _sample(config, output, options.units, console)
        calibrate.write_fit(output, access, calibrate.fit(sample, config))
        fit = calibrate.read_fit(output, access, config)
        assert fit is not None
    by_language = ", ".join(
        f"{language} ({count:,} segments{'' if language in fit.languages else ', not fitted'})"
        for language, count in fit.num_segments.items()
    )
    console.print(f"thresholds fitted on {fit.sample}: {by_language}", highlight=False, soft_wrap=True)
    return fit.applied(config)


def _sample(config: TranscribeConfig, output: Output, num_units: int, console: Console) -> Output:
    """Transcribe about `num_units` units, spread evenly over the splits, into a folder of their own in `output`."""
    labels = config.labels.model_copy(update={"calibrate": None})
    config = config.model_copy(update={"output": calibrate.folder(output), "labels": labels})
    splits = list(plan(config.inputs, config.storage.access, config.units.target_s))
    num_groups = math.ceil(num_units / len(splits))
    num_splits = min(num_units, len(splits))
    chosen = [splits[i * len(splits) // num_splits] for i in range(num_splits)]
    sample = Output(config.output, config.storage.access)
    claim(sample, config)
    done = sample.committed()
    work = Work(chosen, done, incomplete(chosen, done, num_groups))
    if work.pending:
        console.print(
            f"a sample first, to fit thresholds on: {num_groups} units of {num_splits:,} of {len(splits):,} splits",
            highlight=False,
            soft_wrap=True,
        )
        _transcribe(config, work, sample, outputs.new_run_id(), console, num_groups)
    return sample


def _transcribe(
    config: TranscribeConfig, work: Work, output: Output, run_id: str, console: Console, num_groups: int | None = None
) -> int:
    """Returns how many storage requests were made again for the units that were committed."""
    with connected(config.ray.address, config.ray.object_store_bytes):
        from pipeline import graph  # not above: Ray takes a second, and planning does not need it
        from pipeline.observe import RunMetrics

        metrics = RunMetrics(run_id, work.pending_s)
        with Progress(console, work.pending_s) as progress:
            attempts = graph.SharedLedger()
            pending, done = work.pending, work.done
            for _ in range(MAX_ROUNDS):
                for receipt in graph.transcribe(pending, done, config, run_id, attempts, num_groups):
                    progress.add(receipt)
                    metrics.add(receipt)
                done = output.committed()
                pending = incomplete(pending, done, num_groups)
                if not pending:
                    break
        console.print(progress.line(), highlight=False, soft_wrap=True)
        return progress.num_retries


def report(summary: Summary, console: Console) -> int:
    """Print what the output holds and return the exit code."""
    print_summary(summary, console)
    if not summary.is_complete:
        return EXIT_UNFINISHED
    return EXIT_SOME_FAILED if summary.num_failed else EXIT_OK
