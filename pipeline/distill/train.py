"""Quantization-aware distillation, as one worker of it runs: the student's quantized weights learn, through their fake
quantization, to say what the teacher says. Scales, audio tower, norms, embeddings and head stand still.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import ConfigError
from pipeline.distill import state as states
from pipeline.distill.alone import alone_in
from pipeline.distill.config import DistillConfig
from pipeline.distill.examples import read_examples
from pipeline.distill.feed import Batch, feed
from pipeline.distill.forward import Listener
from pipeline.distill.heldout import Heldout, score
from pipeline.distill.log import TrainingLog
from pipeline.distill.loss import Likeliest, Loss, distillation_loss
from pipeline.distill.pair import load_pair
from pipeline.distill.sampling import draw
from pipeline.distill.state import State
from pipeline.distill.student import Student
from pipeline.distill.worker import TrainingError, Worker
from pipeline.engine.model import bfloat16_is_fast


def best_folder(output: Path, step: int) -> Path:
    return output / "best" / f"step-{step:08d}"


def schedule(config: DistillConfig, step: int) -> float:
    """Factor of the learning rate in step number `step` (from 0): warm-up, then a cosine to `final_share`."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    fallen = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * fallen))


def train(config: DistillConfig, worker: Worker) -> None:
    """All steps that are left."""
    output = Path(config.output).expanduser().absolute()
    if not output.is_dir():
        raise ConfigError(f"output: {output} is not there on this node; name a folder that all nodes share")
    with alone_in(output) if worker.rank == 0 else contextlib.nullcontext():
        worker.total([0])  # the others look for a state only then
        training = Training(config, worker)
        try:
            training.run()
        finally:
            training.close()


class Training:
    """Goes on from the newest state in the output, where there is one. `run` leaves the best step's student in
    OUT/best.

    Raises TrainingError for a loss that is not finite; ConfigError, CheckpointError and StorageError for inputs that
    cannot be used.
    """

    def __init__(self, config: DistillConfig, worker: Worker) -> None:
        self._config, self._worker = config, worker
        self._output = Path(config.output).expanduser().absolute()
        options = config.storage.access
        labels, held = config.labels, config.heldout
        refs = read_examples(labels.sources, options, labels.languages, labels.min_s, labels.max_s)
        held_refs = read_examples(held.sources, options, held.languages, held.min_s, held.max_s)
        held_refs = draw(held_refs, held.samples_per_language, held.seed)
        self._dtype = _dtype(config, worker.device)
        pair = load_pair(config, worker.device, self._dtype)
        self._teacher = pair.teacher
        self._heldout = Heldout(held_refs, pair.processor, self._dtype, config.batch_audio_s, options)
        self._model = _parallel(pair.model, config, worker)
        self._weights = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        fused = worker.device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            self._weights, config.learning_rate, weight_decay=config.weight_decay, fused=fused
        )
        self._step, self._best_step, self._best_score = 0, 0, (math.inf, math.inf)
        if found := states.newest(self._output / "state"):
            states.restore(self._model, self._optimizer, found)
            self._step, self._best_step, self._best_score = found.step, found.best_step, found.best_score
        self._feed = feed(refs, config, pair.processor, self._dtype, worker.rank, self._step * config.accumulate)
        self._log = TrainingLog(self._output, self._step) if worker.rank == 0 else None
        self._student = Student(pair.checkpoint) if worker.rank == 0 else None
        self._told_at = time.monotonic()
        self._since: list[dict[str, float]] = []  # steps that were not told of

    def close(self) -> None:
        self._feed.close()
        if self._log is not None:
            self._log.close()

    def run(self) -> None:
        config = self._config
        if not self._has_state():
            self._evaluate()
            self._save()
        while self._step < config.steps:
            self._since.append(self._learn(list(islice(self._feed, config.accumulate))))
            self._step += 1
            is_last = self._step == config.steps
            if self._step % config.log_every == 0 or is_last:
                self._tell()
            judged = self._step % config.evaluate_every == 0 or is_last
            if judged:
                self._evaluate()
            if judged or self._step % config.save_every == 0:
                self._save()

    def _has_state(self) -> bool:
        return states.newest_file(self._output / "state") is not None

    def _learn(self, batches: list[Batch]) -> dict[str, float]:
        """A step on all workers' batches together; its losses are means over their tokens."""
        config, worker = self._config, self._worker
        rate = config.learning_rate * schedule(config, self._step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        (num_tokens,) = worker.total([sum(len(batch.targets) for batch in batches)])
        sums, strange = [0.0, 0.0, 0.0], []
        for number, batch in enumerate(batches):
            # gradients are means over workers, and what is wanted is a mean over tokens
            loss = self._backward(batch, worker.world / num_tokens, number == len(batches) - 1)
            its = [len(batch.targets) * float(each.detach()) for each in (loss.total, loss.kl, loss.ce)]
            sums = [total + each for total, each in zip(sums, its, strict=True)]
            if not all(map(math.isfinite, its)):
                strange += [ref.example_id for ref in batch.refs]
        norm = nn.utils.clip_grad_norm_(self._weights, config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, dist.tensor.DTensor) else norm
        total, kl, ce, audio_s = worker.total([*sums, sum(batch.audio_s for batch in batches)])
        if not math.isfinite(total) or not math.isfinite(float(norm)):
            every = [ref.example_id for batch in batches for ref in batch.refs]
            self._refuse(total, worker.all_of(strange if not math.isfinite(total) else every))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        means = {"loss": total / num_tokens, "kl": kl / num_tokens, "ce": ce / num_tokens}
        return means | {"lr": rate, "grad_norm": float(norm), "tokens": num_tokens, "audio_s": audio_s}

    def _backward(self, batch: Batch, share: float, is_last: bool) -> Loss:
        """The loss of a batch; `share` of a token's goes to the gradients."""
        device = self._worker.device
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.tensors.items()}
        targets, teacher = batch.targets.to(device), self._taught(batch, tensors)
        alone: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(self._model, DistributedDataParallel) and not is_last:
            alone = self._model.no_sync()
        with alone:
            loss = distillation_loss(
                self._logits(tensors), targets, teacher, self._config.alpha_kd, self._config.temperature
            )
            (loss.total * len(targets) * share).backward()
        return loss

    def _logits(self, tensors: Any) -> Tensor:
        enabled = self._dtype != torch.float32
        with torch.autocast(self._worker.device.type, self._dtype if enabled else None, enabled=enabled):
            logits: Tensor = self._model(tensors)
        return logits

    def _taught(self, batch: Batch, tensors: dict[str, Tensor]) -> Tensor | Likeliest:
        if batch.likeliest is not None:
            device = self._worker.device
            return Likeliest(batch.likeliest.ids.to(device), batch.likeliest.logprobs.to(device))
        assert self._teacher is not None
        with torch.no_grad():
            logits: Tensor = self._teacher(tensors)
        return logits

    def _refuse(self, total: float, example_ids: list[str]) -> None:
        kept = states.newest_file(self._output / "state")
        raise TrainingError(
            f"step {self._step + 1}: the loss is {total} and its gradients {'' if math.isfinite(total) else 'too '}"
            f"not finite, on the batch of {', '.join(example_ids)}. {kept} is the last good state, and OUT/best what "
            "scored best; lower learning_rate, or leave these examples out"
        )

    def _tell(self) -> None:
        """Means over the steps since the last time, on the first worker."""
        since, self._since = self._since, []
        now = time.monotonic()
        took, self._told_at = now - self._told_at, now
        if self._log is None:
            return
        tokens = sum(each["tokens"] for each in since)
        entry: dict[str, Any] = {"step": self._step, "kind": "step"}
        entry |= {name: sum(each[name] * each["tokens"] for each in since) / tokens for name in ("loss", "kl", "ce")}
        entry |= {"lr": since[-1]["lr"], "grad_norm": max(each["grad_norm"] for each in since)}
        entry |= {"tokens_s": tokens / took, "rtfx": sum(each["audio_s"] for each in since) / took}
        self._log.add(entry)

    def _evaluate(self) -> None:
        """On held-out speech, by the engine that will run it; the best step so far is kept."""
        began = time.monotonic()
        losses = self._heldout.losses(self._logits, self._teacher, self._worker.device)
        weights, _ = states.gather(self._model, self._optimizer)
        if self._student is not None and self._log is not None:
            folder = best_folder(self._output, self._step)
            self._student.write(weights, folder)
            rates = self._heldout.error_rates(folder, self._worker.device)
            found = score(rates, losses["ce"])
            if found < self._best_score:
                self._best_step, self._best_score = self._step, found
            else:
                shutil.rmtree(folder)
            entry = {"step": self._step, "kind": "heldout", **losses, "error_rate": found[0]}
            entry |= {f"error_rate/{language}": rate for language, rate in rates.items()}
            self._log.add(entry | {"best_step": self._best_step})
        self._told_at += time.monotonic() - began

    def _save(self) -> None:
        weights, optimizer = states.gather(self._model, self._optimizer)
        if self._worker.rank == 0:
            state = State(self._step, weights, optimizer, self._best_step, self._best_score)
            states.save(self._output / "state", state)
            for folder in (self._output / "best").iterdir():  # which no state names any more
                if folder != best_folder(self._output, self._best_step):
                    shutil.rmtree(folder)


def _dtype(config: DistillConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        chosen: torch.dtype = getattr(torch, config.dtype)
        return chosen
    return torch.bfloat16 if device.type == "cuda" or bfloat16_is_fast() else torch.float32


def _parallel(model: Listener, config: DistillConfig, worker: Worker) -> nn.Module:
    if worker.world == 1:
        return model
    if config.ray.parallel == "ddp":
        on_cuda = worker.device.type == "cuda"
        return DistributedDataParallel(model, device_ids=[worker.device.index] if on_cuda else None)
    mesh = init_device_mesh(worker.device.type, (worker.world,))
    for layer in model.thinker.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
