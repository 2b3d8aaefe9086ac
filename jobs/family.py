"""Makes the embedded family anew: speech, tokenizer, two checkpoints, held-out sets, samples, and the card."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from pipeline.config import ConfigError
from pipeline.engine.checkpoint import EMBEDDED_FOLDER

CHECKPOINTS = ("teacher", "student")


def run(fsdd: Path, work: Path, only: list[str], install: bool, console: Console) -> None:
    """Run the recipe in `work`, stage by stage; what a former run finished is kept.

    `only` limits training to some checkpoints, so that two can train side by side. `install` copies the result over the
    checkpoints that come with the package. Raises ConfigError when `fsdd` holds no digit shards.
    """
    if not any(fsdd.glob("*.tar")):
        from pipeline.embedded.speech import DIGITS_SOURCE

        raise ConfigError(f"{fsdd} holds no .tar shards of spoken digits; their source is {DIGITS_SOURCE}")
    from pipeline.embedded import card, evaluation, recipe, shards

    for name in only or CHECKPOINTS:
        if not (work / name / "model.safetensors").exists():
            console.print(f"training {name}; progress in {work / name}.jsonl", highlight=False)
            recipe.train_checkpoint(name, work, fsdd)
    if only:
        return
    if not (work / "samples").exists():
        console.print("speaking the held-out sets and samples")
        sets = shards.heldout_sets(work, recipe.digit_speakers(fsdd), recipe.SEED)
        for name, items in sets.items():
            shards.write_shard(work / "heldout" / f"{name}.tar", [(item, "opus") for item in items])
        shards.write_samples(work / "samples", sets, recipe.SEED)
    scores: dict[str, dict[str, object]] = {}
    for name in CHECKPOINTS:
        found = evaluation.evaluate(str(work / name), work / "heldout")
        scores[name] = {key: asdict(score) for key, score in found.items()}
        figures = ", ".join(f"{key} {100 * score.counts.rate:.2f} %" for key, score in found.items())
        console.print(f"{name}: {figures}", highlight=False, soft_wrap=True)
    (work / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    (work / "README.md").write_text(card.card(work, CHECKPOINTS), encoding="utf-8")
    if install:
        for name in (*CHECKPOINTS, "heldout", "samples"):
            shutil.rmtree(EMBEDDED_FOLDER / name, ignore_errors=True)
            shutil.copytree(work / name, EMBEDDED_FOLDER / name)
        for name in CHECKPOINTS:
            shutil.copy(work / f"{name}.jsonl", EMBEDDED_FOLDER / name / "training.jsonl")
        for file in ("README.md", "scores.json"):
            shutil.copy(work / file, EMBEDDED_FOLDER / file)
        console.print(f"installed in {EMBEDDED_FOLDER}", highlight=False)
