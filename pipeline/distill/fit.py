"""Training on Ray Train; the only file that knows it."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray._raylet import PlacementGroupID
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

from pipeline.config import ConfigError
from pipeline.distill.config import TrainingRayConfig
from pipeline.distill.worker import TrainingError, Worker
from pipeline.engine.base import EngineError
from pipeline.engine.checkpoint import CheckpointError
from pipeline.storage import StorageError

_OURS = (ConfigError, CheckpointError, EngineError, StorageError, TrainingError)  # which another try would not mend

Loop = Callable[[Worker], None]


def fit(loop: Loop, config: TrainingRayConfig, folder: Path, device: str) -> None:
    """Runs `loop` in every worker, together, on the connected cluster; `folder`, which all nodes share, is for Ray.

    Workers that die are started again, all of them, so many times as `config.retries` says. Raises what the loop
    raised, TrainingError when workers die too often.
    """
    gpus = ray.cluster_resources().get("GPU", 0.0)
    num_gpus = config.num_gpus if config.num_gpus is not None else (1.0 if gpus and device != "cpu" else 0.0)
    resources = {"CPU": config.num_cpus} | ({"GPU": num_gpus} if num_gpus else {})
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    for attempt in range(config.retries + 1):
        trainer = TorchTrainer(
            _run,
            train_loop_config={"loop": loop, "num_threads": max(1, int(config.num_cpus))},
            torch_config=TorchConfig(backend="nccl" if num_gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=config.workers, use_gpu=bool(num_gpus), resources_per_worker=resources
            ),
            run_config=RunConfig(name="train", storage_path=str(folder), failure_config=FailureConfig(max_failures=0)),
        )
        failure: BaseException
        before = _places()
        interrupted = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit()
            return
        except ray.train.TrainingFailedError as error:
            failures = getattr(error, "worker_failures", {}).values()
            died = TrainingError(f"workers failed {attempt + 1} times, at last with: {error}")
            failure = next(filter(None, map(_mistake, failures)), died)
        finally:
            signal.signal(signal.SIGINT, interrupted)  # Ray's own stays, and holds on to its controller
        # not from within: the frames behind Ray's error hold it, too
        gc.collect()
        _give_up_places(before)
        if failure is not died or attempt == config.retries:
            raise failure


def _places() -> set[str]:
    """Placement groups of this job (whose id theirs end with) that hold resources."""
    job: str = ray.get_runtime_context().get_job_id()
    groups = ray.util.placement_group_table()
    return {name for name, group in groups.items() if name.endswith(job) and group["state"] != "REMOVED"}


def _give_up_places(before: set[str]) -> None:
    """Those that are not of `before`: Ray leaves the workers' one behind when a worker has died, and the next attempt
    would wait for it for ever."""
    for name in _places() - before:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def _run(options: dict[str, Any]) -> None:
    import torch

    context = ray.train.get_context()
    torch.set_num_threads(options["num_threads"])
    worker = Worker(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    options["loop"](worker)


def _mistake(failure: BaseException) -> BaseException | None:
    seen: BaseException | None = failure
    while seen is not None:
        if isinstance(seen, _OURS):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return None
