"""`shardscribe family-tower`: the embedded causal tower, from speech without texts to the file that is shipped.

It learns from audio alone first, and then from its teacher's labels, too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from jobs import distill_tower
from jobs.tables import label
from pipeline.config import ConfigError, validate
from pipeline.distill.config import TowerConfig
from pipeline.embedded.unlabeled import write_unlabeled
from pipeline.engine.checkpoint import EMBEDDED_FOLDER

STUDENT = "embedded/student"
INSTALLED = EMBEDDED_FOLDER / "tower"
FILES = ("model.safetensors", "README.md")


def run(fsdd: Path, work: Path, install: bool, console: Console) -> None:
    """Stage by stage; what a former run finished in `work` stays. `install` copies the tower over the one that comes
    with the package. Raises ConfigError when `fsdd` holds no digit shards."""
    if not any(fsdd.glob("*.tar")):
        raise ConfigError(f"{fsdd} holds no .tar shards of spoken digits, which the family's speech is mixed with")
    console.print("speaking without texts")
    folders = write_unlabeled(work, fsdd)
    labels = {part: label(folder, work / "labels" / part, console) for part, folder in folders.items()}
    shared = {
        "model": STUDENT,
        "speech": {"sources": [labels["train"]]},
        "heldout": {"sources": [labels["dev"]], "samples_per_language": 40},
        "learning_rate": 5e-4,
        "batch_audio_s": 60,
        "log_every": 25,
    }
    stages = {
        "tower": {"steps": 3000, "warmup_steps": 100, "evaluate_every": 250, "save_every": 250, "best_by": "loss"},
        "tower-text": {
            "tower": str(work / "tower" / "model"),
            "text_weight": 1.0,
            "learning_rate": 3e-4,
            "steps": 500,
            "warmup_steps": 20,
            "evaluate_every": 100,
            "save_every": 100,
            "ray": {"workers": 2},
        },
    }
    for name, options in stages.items():
        given = shared | options | {"output": str(work / name)}
        distill_tower.run(validate(TowerConfig, given, "family-tower"), console)
    if install:
        shutil.rmtree(INSTALLED, ignore_errors=True)
        INSTALLED.mkdir()
        for name in FILES:
            shutil.copy(work / "tower-text" / "model" / name, INSTALLED / name)
        for name in stages:
            shutil.copy(work / name / "training.jsonl", INSTALLED / f"{name}.jsonl")
        console.print(f"installed in {INSTALLED}", highlight=False)
