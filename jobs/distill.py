"""`shardscribe distill`: a quantized student learns from its teacher on Ray Train, and goes on where it was stopped."""

from __future__ import annotations

from functools import partial

from rich.console import Console

from pipeline.config import ConfigError
from pipeline.distill.config import DistillConfig
from pipeline.distill.distilled_output import card, fill
from pipeline.distill.examples import ExampleRef, read_examples
from pipeline.distill.pair import student_checkpoint
from pipeline.distill.run import run_training, told_end
from pipeline.distill.student import train
from pipeline.distill.training_output import TrainingOutput, absolute
from pipeline.engine.checkpoint import resolve


def run(config: DistillConfig, console: Console) -> None:
    """Raises ConfigError, CheckpointError and StorageError for what cannot be trained on as configured, TrainingError
    when training cannot go on; the last state is kept."""
    config = absolute(config, ("student", "teacher"))
    output = TrainingOutput(config)
    student = student_checkpoint(config)
    teacher = resolve(config.teacher, config.teacher_revision, key="teacher") if config.teacher is not None else None
    labels = config.labels
    refs = read_examples(labels.sources, config.storage.access, labels.languages, labels.min_s, labels.max_s)
    _check_labels(config, refs)
    output.claim({"student": student.revision, "teacher": None if teacher is None else teacher.revision}, refs)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    if output.model.exists():
        say(f"nothing left to do in {output.folder}")
        return
    hours = sum(ref.duration_s for ref in refs) / 3600
    say(f"{len(refs):,} examples, {hours:,.2f} h; {config.steps:,} steps. Output: {output.folder}")
    run_training(partial(train, config), config, output.folder, say)
    filled = partial(fill, config=config, student=student, teacher=teacher, refs=refs)
    say(told_end(output.finish(refs, filled, card), output.model))


def _check_labels(config: DistillConfig, refs: list[ExampleRef]) -> None:
    if config.teacher is None and (strange := next((ref for ref in refs if not ref.teacher), None)):
        raise ConfigError(
            f"teacher: null takes what the labels' jobs stored, and {strange.example_id} is of a manifest; name a "
            "teacher"
        )
