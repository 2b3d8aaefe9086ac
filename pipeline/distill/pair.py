"""A student with ModelOpt's fake quantization and the teacher that it learns from."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from pipeline.config import ConfigError
from pipeline.distill.config import DistillConfig
from pipeline.distill.forward import Listener
from pipeline.distill.quantize import load, quantized_linears
from pipeline.engine.checkpoint import Checkpoint, CheckpointError, resolve
from pipeline.engine.quantized import form_of


@dataclass(frozen=True, slots=True)
class Pair:
    """`model` is the student; those of its parameters that learn are float32 and require gradients."""

    checkpoint: Checkpoint
    model: Listener
    processor: Any
    teacher: Listener | None


def student_checkpoint(config: DistillConfig) -> Checkpoint:
    """Raises CheckpointError for what is no student: not there, or not quantized."""
    checkpoint = resolve(config.student, key="student", quantization="fake_quant")
    if form_of(checkpoint.path) != "fake_quant":
        raise CheckpointError(
            f"student: {checkpoint.path} has no fake quantization to train through; run `shardscribe quantize` and "
            "take its fake-quant folder"
        )
    return checkpoint


def load_pair(config: DistillConfig, device: torch.device, dtype: torch.dtype) -> Pair:
    """Raises CheckpointError when the two do not fit together, ConfigError when nothing would learn."""
    checkpoint = student_checkpoint(config)
    student = load(checkpoint, device)
    teacher = None
    if config.teacher is not None:
        other = resolve(config.teacher, config.teacher_revision, key="teacher")
        wrapper = load(other, device)
        require_alike(student.processor, wrapper.processor, checkpoint.path, other.path)
        wrapper.model.to(dtype).requires_grad_(False)
        teacher = Listener(wrapper.model.thinker)
    student.model.to(dtype).requires_grad_(False)
    model = Listener(student.model.thinker)
    learns = False
    for name, linear in quantized_linears(model).items():
        if any(fnmatch(name, pattern) for pattern in config.trainable):
            weight = linear.get_parameter("weight")
            weight.data = weight.data.float()
            weight.requires_grad_(True)
            learns = True
    if not learns:
        raise ConfigError(f"trainable: {', '.join(config.trainable)} names no quantized layer of {checkpoint.path}")
    return Pair(checkpoint, model, student.processor, teacher)


def require_alike(student: Any, teacher: Any, student_path: Path, teacher_path: Path) -> None:
    """Raises CheckpointError unless both processors make the same tokens of texts and the same features of audio."""
    ours, theirs = student.tokenizer, teacher.tokenizer
    if ours.get_vocab() != theirs.get_vocab() or ours.backend_tokenizer.to_str() != theirs.backend_tokenizer.to_str():
        raise CheckpointError(
            f"teacher: {teacher_path} has another tokenizer ({len(theirs):,} tokens) than {student_path} "
            f"({len(ours):,}): their tokens cannot be compared; take a teacher of the same family"
        )
    front_ends = [each.feature_extractor.to_dict() for each in (student, teacher)]
    differ = sorted(key for key in front_ends[0].keys() | front_ends[1].keys() if _differs(front_ends, key))
    if differ:
        raise CheckpointError(
            f"teacher: {teacher_path} hears other features than {student_path} ({', '.join(differ)} differ); take a "
            "teacher of the same family"
        )


def _differs(front_ends: list[dict[str, Any]], key: str) -> bool:
    first, second = (each.get(key) for each in front_ends)
    return bool(first != second)
