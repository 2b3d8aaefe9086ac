"""`shardscribe distill-tower`: a causal audio tower learns from the offline tower of its model, from audio alone."""

from __future__ import annotations

from functools import partial

from rich.console import Console

from pipeline.distill.config import TowerConfig
from pipeline.distill.examples import read_examples
from pipeline.distill.run import run_training, told_end
from pipeline.distill.tower import train
from pipeline.distill.tower_output import card, fill
from pipeline.distill.training_output import TrainingOutput, absolute
from pipeline.engine.causal.tower_file import local_revision
from pipeline.engine.checkpoint import resolve


def run(config: TowerConfig, console: Console) -> None:
    """Raises ConfigError, CheckpointError and StorageError for what cannot be trained on as configured, TrainingError
    when training cannot go on; the last state is kept."""
    config = absolute(config, ("model", "tower"))
    output = TrainingOutput(config)
    model = resolve(config.model, config.revision, key="model")
    speech = config.speech
    texts = config.text_weight > 0
    refs = read_examples(speech.sources, config.storage.access, speech.languages, speech.min_s, speech.max_s, texts)
    begun = local_revision(config.tower)
    output.claim({"model": model.revision} | ({"tower": begun} if begun else {}), refs)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    if output.model.exists():
        say(f"nothing left to do in {output.folder}")
        return
    hours = sum(ref.duration_s for ref in refs) / 3600
    say(f"{len(refs):,} examples, {hours:,.2f} h; {config.steps:,} steps. Output: {output.folder}")
    run_training(partial(train, config), config, output.folder, say)
    say(told_end(output.finish(refs, partial(fill, model=model), card), output.model))
