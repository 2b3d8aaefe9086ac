"""The training loop, as one worker runs it: steps, states to go on from, held-out scores, the best step kept."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.alone import alone_in
from pipeline.config import ConfigError
from pipeline.distill import state as states
from pipeline.distill.config import TrainingConfig
from pipeline.distill.examples import ExampleRef
from pipeline.distill.log import TrainingLog
from pipeline.distill.state import State
from pipeline.distill.worker import TrainingError, Worker
from pipeline.engine.model import bfloat16_is_fast


class HasExamples(Protocol):
    @property
    def refs(self) -> Sequence[ExampleRef]: ...


B = TypeVar("B", bound=HasExamples)
Forward = Callable[..., Tensor]
"""The model that learns, in the dtype of the training, wherever its weights are."""


class Task(Protocol[B]):
    """What is learned. Of several workers all make the same one; only the first one writes."""

    @property
    def model(self) -> nn.Module:
        """Its parameters that require gradients learn, in float32."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Of the model, which fsdp2 shards one by one."""

    def feed(self, skip: int) -> Generator[B]:
        """This worker's batches without end, from the one after `skip` on."""

    def size(self, batch: B) -> int:
        """How many tokens (steps) of it the losses are means over."""

    def losses(self, forward: Forward, batch: B) -> dict[str, Tensor]:
        """Means over its tokens; "loss" is to go down."""

    def heldout(self, forward: Forward) -> dict[str, float]:
        """Losses on held-out speech; the first of them can decide which step is the best."""

    def write(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """What engines run, in `folder`, there whole or not at all; `weights` are those that learn."""

    def error_rates(self, folder: Path) -> dict[str, float]:
        """Of what is in `folder`, as an engine decodes held-out speech; by language."""


MakeTask = Callable[[torch.dtype], Task[Any]]


def train(config: TrainingConfig, make_task: MakeTask, worker: Worker) -> None:
    """All steps that are left, from the newest state in the output where there is one. The best step stays in OUT/best.

    `make_task` is given the dtype of forward passes. Raises TrainingError for a loss that is not finite, and what the
    task raises.
    """
    output = Path(config.output).expanduser().absolute()
    if not output.is_dir():
        raise ConfigError(f"output: {output} is not there on this node; name a folder that all nodes share")
    with alone_in(output, TrainingError) if worker.rank == 0 else contextlib.nullcontext():
        worker.total([0])  # the others look for a state only then
        dtype = forward_dtype(config, worker.device)
        loop = Loop(config, make_task(dtype), worker, dtype)
        try:
            loop.run()
        finally:
            loop.close()


def best_folder(output: Path, step: int) -> Path:
    return output / "best" / f"step-{step:08d}"


def schedule(config: TrainingConfig, step: int) -> float:
    """Factor of the learning rate in step number `step` (from 0): warm-up, then a cosine to `final_share`."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    fallen = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * fallen))


def forward_dtype(config: TrainingConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        chosen: torch.dtype = getattr(torch, config.dtype)
        return chosen
    return torch.bfloat16 if device.type == "cuda" or bfloat16_is_fast() else torch.float32


class Loop(Generic[B]):
    def __init__(self, config: TrainingConfig, task: Task[B], worker: Worker, dtype: torch.dtype) -> None:
        self._config, self._task, self._worker, self._dtype = config, task, worker, dtype
        self._output = Path(config.output).expanduser().absolute()
        self._model = _parallel(task, config, worker)
        self._weights = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        fused = worker.device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            self._weights, config.learning_rate, weight_decay=config.weight_decay, fused=fused
        )
        self._step, self._best_step, self._best_score = 0, 0, (math.inf, math.inf)
        if found := states.newest(self._output / "state"):
            states.restore(self._model, self._optimizer, found)
            self._step, self._best_step, self._best_score = found.step, found.best_step, found.best_score
        self._is_new = found is None
        self._feed = task.feed(self._step * config.accumulate)
        self._log = TrainingLog(self._output, self._step) if worker.rank == 0 else None
        self._told_at = time.monotonic()
        self._since: list[dict[str, float]] = []  # steps that were not told of

    def close(self) -> None:
        self._feed.close()
        if self._log is not None:
            self._log.close()

    def run(self) -> None:
        config = self._config
        if self._is_new:
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

    def _learn(self, batches: list[B]) -> dict[str, float]:
        """A step on all workers' batches together; its losses are means over their tokens."""
        config, worker = self._config, self._worker
        rate = config.learning_rate * schedule(config, self._step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        sizes = [self._task.size(batch) for batch in batches]
        (num_tokens,) = worker.total([sum(sizes)])
        sums: dict[str, float] = {}
        strange: list[str] = []
        for number, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
            # gradients are means over workers, and what is wanted is a mean over tokens
            losses = self._backward(batch, size * worker.world / num_tokens, number == len(batches) - 1)
            sums = {name: sums.get(name, 0.0) + size * value for name, value in losses.items()}
            if not all(map(math.isfinite, losses.values())):
                strange += [ref.example_id for ref in batch.refs]
        norm = nn.utils.clip_grad_norm_(self._weights, config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        audio_s = sum(ref.duration_s for batch in batches for ref in batch.refs)
        *totals, audio_s = worker.total([*sums.values(), audio_s])
        means = {name: total / num_tokens for name, total in zip(sums, totals, strict=True)}
        if not math.isfinite(means["loss"]) or not math.isfinite(float(norm)):
            every = [ref.example_id for batch in batches for ref in batch.refs]
            self._refuse(means["loss"], worker.all_of(every if math.isfinite(means["loss"]) else strange))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return means | {"lr": rate, "grad_norm": float(norm), "tokens": num_tokens, "audio_s": audio_s}

    def _backward(self, batch: B, share: float, is_last: bool) -> dict[str, float]:
        """The losses of a batch, of whose gradients `share` is added up."""
        alone: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(self._model, DistributedDataParallel) and not is_last:
            alone = self._model.no_sync()
        with alone:
            losses = self._task.losses(self._forward, batch)
            (losses["loss"] * share).backward()
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def _forward(self, *inputs: Any) -> Tensor:
        enabled = self._dtype != torch.float32
        with torch.autocast(self._worker.device.type, self._dtype if enabled else None, enabled=enabled):
            found: Tensor = self._model(*inputs)
        return found

    def _refuse(self, loss: float, example_ids: list[str]) -> None:
        kept = states.newest_file(self._output / "state")
        raise TrainingError(
            f"step {self._step + 1}: the loss is {loss} and its gradients {'' if math.isfinite(loss) else 'too '}"
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
        own = [name for name in since[0] if name not in ("lr", "grad_norm", "tokens", "audio_s")]
        entry: dict[str, Any] = {"step": self._step, "kind": "step"}
        entry |= {name: sum(each[name] * each["tokens"] for each in since) / tokens for name in own}
        entry |= {"lr": since[-1]["lr"], "grad_norm": max(each["grad_norm"] for each in since)}
        entry |= {"tokens_s": tokens / took, "rtfx": sum(each["audio_s"] for each in since) / took}
        self._log.add(entry)

    def _evaluate(self) -> None:
        """On held-out speech, by the engine that will run it; the best step so far is kept."""
        began = time.monotonic()
        with torch.no_grad():
            losses = self._task.heldout(self._forward)
        weights, _ = states.gather(self._model, self._optimizer)
        if self._log is not None:
            folder = best_folder(self._output, self._step)
            self._task.write(weights, folder)
            rates = self._task.error_rates(folder)
            error_rate, loss = sum(rates.values()) / len(rates), next(iter(losses.values()))
            score = (error_rate, loss) if self._config.best_by == "errors" else (loss, error_rate)
            if score < self._best_score:
                self._best_step, self._best_score = self._step, score
            else:
                shutil.rmtree(folder)
            entry = {"step": self._step, "kind": "heldout", **losses, "error_rate": error_rate}
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


def _parallel(task: Task[Any], config: TrainingConfig, worker: Worker) -> nn.Module:
    if worker.world == 1:
        return task.model
    if config.ray.parallel == "ddp":
        on_cuda = worker.device.type == "cuda"
        return DistributedDataParallel(task.model, device_ids=[worker.device.index] if on_cuda else None)
    mesh = init_device_mesh(worker.device.type, (worker.world,))
    for layer in task.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(task.model, mesh=mesh)
    return task.model
