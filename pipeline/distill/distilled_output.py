"""OUT/model of a distilled student: fake-quant, and of INT4 export and packed, as `shardscribe quantize` has them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline import redact
from pipeline.distill.config import DistillConfig
from pipeline.distill.examples import ExampleRef
from pipeline.distill.quantize import load
from pipeline.distill.quantized_output import write_other_forms
from pipeline.distill.training_output import Facts, heldout_table, speech_text
from pipeline.engine.checkpoint import Checkpoint, resolve
from pipeline.engine.fake_quant import read_fake_quant


def fill(
    best: Path,
    folder: Path,
    config: DistillConfig,
    student: Checkpoint,
    teacher: Checkpoint | None,
    refs: Sequence[ExampleRef],
) -> Facts:
    """From the best step's checkpoint; what could not be read back does not come out."""
    fake = folder / "fake-quant"
    shutil.copytree(best, fake)
    numbers = read_fake_quant(fake).numbers
    wrapper = load(resolve(str(fake), quantization="fake_quant"), torch.device("cpu"))
    write_other_forms(wrapper.model, student.path, folder, numbers == "int4")
    teachers = {ref.teacher for ref in refs} if teacher is None else {redact.names(teacher.model_id)}
    return {
        "student": redact.names(student.model_id),
        "student_revision": student.revision,
        "teachers": sorted(teachers),
        "numbers": numbers,
    }


def card(facts: Facts) -> str:
    """Markdown, from what training.json holds."""
    config = facts["config"]
    loss = f"{config['alpha_kd']:g} KL + {1 - config['alpha_kd']:g} cross-entropy"
    teachers = ", ".join(f"`{name}`" for name in facts["teachers"])
    live = "live" if config["teacher"] else "as stored"
    learned = ", ".join(f"`{name}`" for name in config["trainable"])
    runs = (
        "`engine: {model: .../packed, quantization: int4}` runs it; `fake-quant` and `export` run the same way."
        if facts["numbers"] == "int4"
        else "`engine: {model: .../fake-quant, quantization: fake_quant}` runs it at full size."
    )
    table = heldout_table(facts, {"ce": "cross-entropy", "kl": "KL"})
    return f"""# {facts["student"]}, distilled through its {facts["numbers"]} weights

Quantization-aware distillation from {teachers} ({live}): {config["steps"]} steps of {config["accumulate"]} x
{config["ray"]["workers"]} batches of {config["batch_audio_s"]:g} s, {loss} at temperature {config["temperature"]:g},
AdamW at {config["learning_rate"]:g} with a cosine, seed {config["seed"]}. Learned: {learned}; scales and all else stood
still. {runs}

Labels: {speech_text(facts)}.

## Held-out speech

Teacher-forced cross-entropy of its texts and KL from the teacher, in nats a token; errors (WER, CER where a language
has no spaces) as the engine decodes it. In bold: the step that this is, chosen by {config["best_by"]}.

{table}
"""
