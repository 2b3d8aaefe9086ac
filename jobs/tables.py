"""`shardscribe tables`: the flywheel on the embedded family, from unlabeled speech to the table of what was won."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from jobs import distill, quantize, transcribe
from pipeline.config import ConfigError, PseudolabelConfig, validate
from pipeline.distill.config import DistillConfig, QuantizeConfig
from pipeline.embedded.tables import STUDENT, TEACHER, Measured, System, read_or_measure, to_markdown
from pipeline.embedded.unlabeled import write_unlabeled

SEEDS = (0, 1, 2)
BITS = (4, 3, 2)
_TOP = 16
_RATES = {4: 2e-5, 3: 4e-5, 2: 1e-4}  # of learning, by bits: the coarser, the further is the way


def run(fsdd: Path, work: Path, bits: list[int], console: Console) -> None:
    """Stage by stage; what a former run finished in `work` stays. `bits` limits quantizing and distilling, so that two
    can work side by side; then nothing is measured. Raises ConfigError when `fsdd` holds no digit shards."""
    if not any(fsdd.glob("*.tar")):
        raise ConfigError(f"{fsdd} holds no .tar shards of spoken digits, which the family's speech is mixed with")
    torch.set_num_threads(1)
    console.print("speaking without texts")
    folders = write_unlabeled(work, fsdd)
    labels = {part: label(folder, work / "labels" / part, console) for part, folder in folders.items()}
    systems = [System("teacher", "teacher", 16, None, None), System("student", "student", 16, None, None)]
    for number in bits or BITS:
        systems.append(_quantized("rtn", number, 0, work, labels["train"], console))
        awq = [_quantized("awq_full", number, seed, work, labels["train"], console) for seed in SEEDS]
        systems += awq + [_distilled(each, work, labels, console) for each in awq]
    if bits:
        return
    measured: dict[str, tuple[System, Measured]] = {}
    bench = None
    for system in systems:
        console.print(f"measuring {system.name}", highlight=False)
        found, bench = read_or_measure(system, work / "measured", bench)
        measured[system.name] = system, found
    text = to_markdown(measured)
    (work / "tables.md").write_text(text, encoding="utf-8")
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def label(speech: Path, output: Path, console: Console) -> str:
    """Has the teacher write down what it hears in a folder of shards, into `output`, with its likeliest tokens."""
    options = {
        "inputs": [str(speech / "*.tar")],
        "output": str(output),
        "engine": {"model": TEACHER, "top_logprobs": _TOP},
    }
    if transcribe.run(validate(PseudolabelConfig, options, "label"), console):
        raise ConfigError(f"{speech} was not labelled as a whole: see above")
    return str(output)


def _quantized(algorithm: str, bits: int, seed: int, work: Path, labels: str, console: Console) -> System:
    kind = algorithm.partition("_")[0]
    name = f"int{bits}-{kind}" + (f"-{seed}" if kind == "awq" else "")
    folder = work / "quantized" / name
    options: dict[str, Any] = {
        "model": STUDENT,
        "output": str(folder),
        "calibration": {"sources": [labels], "samples_per_language": 8, "seed": seed},
        "format": f"int{bits}",
        "algorithm": algorithm,
        "threads": 1,
    }
    if not folder.exists():
        quantize.run(validate(QuantizeConfig, options, "tables"), console)
    return System(name, kind, bits, seed if kind == "awq" else None, folder)


def _distilled(awq: System, work: Path, labels: dict[str, str], console: Console) -> System:
    assert awq.folder is not None and awq.seed is not None
    name = f"int{awq.bits}-qad-{awq.seed}"
    options: dict[str, Any] = {
        "student": str(awq.folder / "fake-quant"),
        "teacher": None,  # as it is stored beside its labels
        "output": str(work / "distilled" / name),
        "labels": {"sources": [labels["train"]]},
        "heldout": {"sources": [labels["dev"]], "samples_per_language": 40},
        "steps": 300,
        "learning_rate": _RATES[awq.bits],
        "warmup_steps": 30,
        "batch_audio_s": 60,
        "evaluate_every": 100,
        "best_by": "loss",
        "log_every": 25,
        "seed": awq.seed,
    }
    distill.run(validate(DistillConfig, options, "tables"), console)
    return System(name, "qad", awq.bits, awq.seed, work / "distilled" / name / "model")
