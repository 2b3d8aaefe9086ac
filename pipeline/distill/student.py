"""Quantization-aware distillation: a student's quantized weights learn, through their fake quantization, to say what
its teacher says. Scales, audio tower, norms, embeddings and head stand still.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.distill import loop
from pipeline.distill.config import DistillConfig
from pipeline.distill.examples import read_examples
from pipeline.distill.feed import Batch, Reader, feed
from pipeline.distill.heldout import Heldout
from pipeline.distill.loop import Forward
from pipeline.distill.loss import Likeliest, distillation_loss
from pipeline.distill.pair import load_pair
from pipeline.distill.quantize import load
from pipeline.distill.quantized_output import write_fake_quant
from pipeline.distill.sampling import draw
from pipeline.distill.worker import Worker
from pipeline.engine.checkpoint import Checkpoint


def train(config: DistillConfig, worker: Worker) -> None:
    """See loop.train. Raises ConfigError, CheckpointError and StorageError for inputs that cannot be used."""
    loop.train(config, lambda dtype: QuantizedStudent(config, worker, dtype), worker)


class QuantizedStudent:
    """The task of `loop`."""

    def __init__(self, config: DistillConfig, worker: Worker, dtype: torch.dtype) -> None:
        self._config, self._worker, self._dtype = config, worker, dtype
        options, labels, held = config.storage.access, config.labels, config.heldout
        self._refs = read_examples(labels.sources, options, labels.languages, labels.min_s, labels.max_s)
        held_refs = read_examples(held.sources, options, held.languages, held.min_s, held.max_s)
        held_refs = draw(held_refs, held.samples_per_language, held.seed)
        pair = load_pair(config, worker.device, dtype)
        self._processor, self._teacher = pair.processor, pair.teacher
        self._heldout = Heldout(held_refs, pair.processor, dtype, config.batch_audio_s, options)
        self._writer = Writer(pair.checkpoint) if worker.rank == 0 else None
        self.model = pair.model
        self.layers = list(pair.model.thinker.model.layers)

    def feed(self, skip: int) -> Generator[Batch]:
        config = self._config
        reader = partial(Reader, self._processor, self._dtype, config.teacher is None, config.storage.access)
        return feed(self._refs, config, reader, self._worker.rank, skip)

    def size(self, batch: Batch) -> int:
        return len(batch.targets)

    def losses(self, forward: Forward, batch: Batch) -> dict[str, Tensor]:
        device, config = self._worker.device, self._config
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.tensors.items()}
        teacher = self._taught(batch, tensors)
        loss = distillation_loss(
            forward(tensors), batch.targets.to(device), teacher, config.alpha_kd, config.temperature
        )
        return {"loss": loss.total, "kl": loss.kl, "ce": loss.ce}

    def _taught(self, batch: Batch, tensors: dict[str, Tensor]) -> Tensor | Likeliest:
        if batch.likeliest is not None:
            device = self._worker.device
            return Likeliest(batch.likeliest.ids.to(device), batch.likeliest.logprobs.to(device))
        assert self._teacher is not None
        with torch.no_grad():
            logits: Tensor = self._teacher(tensors)
        return logits

    def heldout(self, forward: Forward) -> dict[str, float]:
        return self._heldout.losses(forward, self._teacher, self._worker.device)

    def write(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        assert self._writer is not None
        self._writer.write(weights, folder)

    def error_rates(self, folder: Path) -> dict[str, float]:
        return self._heldout.error_rates(folder, self._worker.device)


class Writer:
    """A twin of the student on the CPU, with what its fake quantization makes of the weights that learn.

    Rounded weights lie on their grid: neither bfloat16 nor another rounding moves them off, so that what is written
    says what was trained.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._source = checkpoint.path
        self._model: Any = load(checkpoint, torch.device("cpu")).model

    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """A checkpoint in `folder` with these `weights` (names from `thinker` on), there whole or not at all."""
        for name, weight in weights.items():
            linear = self._model.get_submodule(name.removesuffix(".weight"))
            linear.get_parameter("weight").copy_(linear.weight_quantizer(weight))
        partial_folder = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        write_fake_quant(self._model, self._source, partial_folder)
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)
