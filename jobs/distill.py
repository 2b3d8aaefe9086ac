"""`shardscribe distill`: a quantized student learns from its teacher on Ray Train, and goes on where it was stopped."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import storage
from pipeline.cluster import connected
from pipeline.config import ConfigError
from pipeline.distill.config import DistillConfig
from pipeline.distill.distilled_output import DistilledOutput
from pipeline.distill.examples import ExampleRef, read_examples
from pipeline.distill.log import entries
from pipeline.distill.pair import student_checkpoint
from pipeline.engine.checkpoint import resolve

_LOOK_EVERY_S = 0.5


def run(config: DistillConfig, console: Console) -> None:
    """Raises ConfigError, CheckpointError and StorageError for what cannot be trained on as configured, TrainingError
    when training cannot go on; the last state is kept."""
    config = _absolute(config)
    output = DistilledOutput(config)
    student = student_checkpoint(config)
    teacher = resolve(config.teacher, config.teacher_revision, key="teacher") if config.teacher is not None else None
    labels = config.labels
    refs = read_examples(labels.sources, config.storage.access, labels.languages, labels.min_s, labels.max_s)
    _check_labels(config, refs)
    output.claim(student, teacher, refs)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    if output.model.exists():
        say(f"nothing left to do in {output.folder}")
        return
    hours = sum(ref.duration_s for ref in refs) / 3600
    say(f"{len(refs):,} examples, {hours:,.2f} h; {config.steps:,} steps. Output: {output.folder}")
    with connected(config.ray.address):
        from pipeline.distill.fit import fit  # not above: Ray reads its environment when it is imported
        from pipeline.distill.student import train

        with _Told(output.folder / "training.jsonl", config.steps, say):
            fit(partial(train, config), config.ray, output.folder / "ray", config.device)
    facts = output.finish(student, teacher, refs)
    first, best = facts["heldout"][0], next(e for e in facts["heldout"] if e["step"] == facts["best_step"])
    say(
        f"{output.model}: step {facts['best_step']:,}, errors {100 * first['error_rate']:.2f} -> "
        f"{100 * best['error_rate']:.2f} %, cross-entropy {first['ce']:.4f} -> {best['ce']:.4f} on held-out speech. "
        f"Card: {output.model / 'README.md'}"
    )


def _absolute(config: DistillConfig) -> DistillConfig:
    """With whole paths: workers of Ray Train are in another folder."""
    changed: dict[str, Any] = {"output": storage.resolve(config.output)}
    for key in ("student", "teacher"):
        model = getattr(config, key)
        if model is not None and (folder := Path(model).expanduser()).is_dir():
            changed[key] = str(folder.absolute())
    for key in ("labels", "heldout"):
        section = getattr(config, key)
        changed[key] = section.model_copy(update={"sources": [storage.resolve(each) for each in section.sources]})
    return config.model_copy(update=changed)


def _check_labels(config: DistillConfig, refs: list[ExampleRef]) -> None:
    if config.teacher is None and (strange := next((ref for ref in refs if not ref.teacher), None)):
        raise ConfigError(
            f"teacher: null takes what the labels' jobs stored, and {strange.example_id} is of a manifest; name a "
            "teacher"
        )


class _Told:
    """Tells what is logged while it is, from another thread."""

    def __init__(self, file: Path, steps: int, say: Any) -> None:
        self._file, self._steps, self._say = file, steps, say
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._told = {(entry["step"], entry["kind"]) for entry in entries(self._file)}
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            self._tell()
        self._tell()

    def _tell(self) -> None:
        for entry in entries(self._file):
            key = entry["step"], entry["kind"]
            if key not in self._told:
                self._told.add(key)
                self._say(_line(entry, self._steps))


def _line(entry: dict[str, Any], steps: int) -> str:
    step = f"step {entry['step']:,}/{steps:,}"
    kl = f"  KL {entry['kl']:.4f}" if "kl" in entry else ""
    if entry["kind"] == "heldout":
        rates = ", ".join(
            f"{name.removeprefix('error_rate/')} {100 * rate:.2f} %"
            for name, rate in entry.items()
            if name.startswith("error_rate/")
        )
        best = "  best so far" if entry["best_step"] == entry["step"] else ""
        return f"{step}  held-out: CE {entry['ce']:.4f}{kl}  {rates}{best}"
    return (
        f"{step}  loss {entry['loss']:.4f}{kl}  CE {entry['ce']:.4f}  lr {entry['lr']:.2e}  "
        f"{entry['tokens_s']:,.0f} tokens/s  {entry['rtfx']:.0f}x"
    )
