"""The pipeline as Ray Data runs it, and the only file that knows Ray Data.

    splits -> read + segment (CPU tasks) -> transcribe + label + commit (engine actors) -> receipts

One row is one unit, its audio nested: rows are never split or merged on the way, blocks are.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import pickle
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import units
from pipeline.attempts import Attempts, Ledger
from pipeline.commit import Receipt, commit_unit
from pipeline.config import EngineConfig, RayConfig, TranscribeConfig
from pipeline.engine.checkpoint import CheckpointError
from pipeline.label import label_unit
from pipeline.observe import EngineMetrics
from pipeline.output import Output
from pipeline.read import read_units
from pipeline.segment import segment_unit
from pipeline.transcribe import Transcriber
from pipeline.units import Done, Split, TranscribedUnit

_READ_TASK_BYTES = 600 << 20  # what reading and decoding a unit takes at most
_MAX_BLOCKS = 20_000  # of the input; more splits than that share a block, and with it a read task


class SharedLedger:
    """`Attempts` of all processes of a run, in an actor beside the driver; usable wherever it is sent."""

    def __init__(self) -> None:
        # hard, which costs nothing as the driver dies with its node: Ray puts a soft one without CPUs anywhere
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = dict(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
        self._ledger: Any = ray.remote(Ledger).options(**options).remote()

    def begin(self, work: str) -> int:
        return int(ray.get(self._ledger.begin.remote(work)))

    def end(self, work: str) -> None:
        ray.get(self._ledger.end.remote(work))


def transcribe(
    splits: Sequence[Split],
    done: dict[str, Done],
    config: TranscribeConfig,
    run_id: str,
    attempts: Attempts,
    num_groups: int | None = None,
) -> Iterator[Receipt]:
    """Work off `splits`, or the first `num_groups` of each, on the connected Ray cluster, less what is `done`.

    Yields a receipt per committed unit.

    An exception of a step ends the job and is raised here; what was committed stays. A read task that died over a
    recording may have lost a unit, as Ray takes what it gives the next time for what it gave before: compare names
    afterwards.
    """
    try:
        yield from _receipts(dataset(splits, done, config, run_id, attempts, num_groups))
        return
    except RayTaskError as error:
        failure = _of_the_step(error)
    # not from within: the frames behind Ray's error hold the engine actors, and they their resources
    gc.collect()
    raise failure


def _receipts(receipts: ray.data.Dataset) -> Iterator[Receipt]:
    tables: Iterable[pa.Table] = receipts.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
    for table in tables:
        yield pickle.loads(table["receipt"][0].as_py())


def _of_the_step(error: RayTaskError) -> BaseException:
    """What a step raised, without the advice that Ray Data writes below its message."""
    cause: BaseException = error.cause
    if cause.args and isinstance(cause.args[0], str):
        cause.args = (cause.args[0].partition("\nFailed to apply UDF")[0], *cause.args[1:])
    return cause


def dataset(
    splits: Sequence[Split],
    done: dict[str, Done],
    config: TranscribeConfig,
    run_id: str,
    attempts: Attempts,
    num_groups: int | None = None,
) -> ray.data.Dataset:
    """The steps from splits to receipts, not yet running."""
    places = Places.on_cluster(config.ray)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the driver shows its own
    context.raise_original_map_exception = True  # the driver tells ours by their types
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would log is raised, and told once
    context.target_max_block_size = 1  # a block ends after the row that fills it: every unit is one, however short
    rows = [{"split": split.to_json(), "done": pickle.dumps(done.get(split.split_id, Done()))} for split in splits]
    return (
        ray.data.from_items(rows, override_num_blocks=min(len(rows), _MAX_BLOCKS))
        .map_batches(
            _reader(config, attempts, num_groups),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            compute=ray.data.TaskPoolStrategy(size=places.read_tasks),
            # Ray Data would run this step inside the engine's actors; unlike remote args keep them apart
            memory=_READ_TASK_BYTES,
        )
        .map_batches(
            _EngineActor,
            fn_constructor_args=(config, attempts, run_id),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=config.ray.num_cpus,
            num_gpus=places.num_gpus,
            compute=ray.data.ActorPoolStrategy(
                size=places.engines,
                max_tasks_in_flight_per_actor=config.ray.units_in_flight,
                max_concurrent_calls_per_actor=config.ray.units_in_flight,
            ),
        )
    )


class Places:
    """How many tasks and actors, of what size: what the config leaves open follows from the cluster."""

    def __init__(self, read_tasks: int, engines: int, num_gpus: float) -> None:
        self.read_tasks, self.engines, self.num_gpus = read_tasks, engines, num_gpus

    @classmethod
    def on_cluster(cls, config: RayConfig) -> Places:
        resources = ray.cluster_resources()
        gpus = resources.get("GPU", 0.0)
        num_gpus = config.num_gpus if config.num_gpus is not None else (1.0 if gpus else 0.0)
        engines = config.engines or (max(1, int(gpus / num_gpus)) if num_gpus else 1)
        read_tasks = config.read_tasks or max(1, int(resources.get("CPU", 1)) // 2)
        return cls(read_tasks, engines, num_gpus)


def _reader(
    config: TranscribeConfig, attempts: Attempts, num_groups: int | None
) -> Callable[[pa.Table], Iterator[pa.Table]]:
    def read_and_segment(table: pa.Table) -> Iterator[pa.Table]:
        for row in table.to_pylist():
            split, done = Split.from_json(row["split"]), pickle.loads(row["done"])
            for unit in read_units(split, done, config, attempts, num_groups):
                audio = units.to_table(segment_unit(unit, config.segmentation))
                del unit  # or the task would hold two copies while it waits
                yield audio

    return read_and_segment


class _EngineActor:
    """Async, so that Ray runs several units in one actor at once: their segments share the engine's batches.

    A unit keeps its place among them until it is committed: a death never costs more than what is in flight, and
    engines wait for a store that is away instead of decoding what a death would then take.
    """

    def __init__(self, config: TranscribeConfig, attempts: Attempts, run_id: str) -> None:
        engine = _with_threads(config.engine, config.ray)
        second = _with_threads(config.agree_with, config.ray) if config.agree_with else None
        self._commit = _committer(config, run_id)
        self._commits = ThreadPoolExecutor(1)  # one at a time: a process counts its storage retries as a whole
        self._metrics = EngineMetrics(run_id)
        self._refused: CheckpointError | None = None
        try:
            self._transcriber = Transcriber(engine, config.segmentation, attempts, self._metrics.batch, second)
        except CheckpointError as error:  # of what is raised here Ray passes on the text alone, and tries again
            self._refused = error

    async def __call__(self, table: pa.Table) -> AsyncIterator[dict[str, Any]]:
        if self._refused is not None:
            raise self._refused
        transcribed = await self._transcriber(units.from_table(table))
        self._metrics.unit(transcribed.busy_s)
        receipt = await asyncio.get_running_loop().run_in_executor(self._commits, self._commit, transcribed)
        yield {"receipt": [pickle.dumps(receipt)]}


def _with_threads(config: EngineConfig, ray_config: RayConfig) -> EngineConfig:
    return config.model_copy(update={"threads": config.threads or max(1, int(ray_config.num_cpus))})


def _committer(config: TranscribeConfig, run_id: str) -> Callable[[TranscribedUnit], Receipt]:
    def label_and_commit(unit: TranscribedUnit) -> Receipt:
        return commit_unit(Output(config.output, config.storage.access), unit, label_unit(unit, config), config, run_id)

    return label_and_commit
