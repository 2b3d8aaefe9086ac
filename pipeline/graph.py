"""The pipeline as Ray Data runs it, and the only file that knows Ray Data.

    splits -> read + segment (CPU tasks) -> transcribe (engine actors) -> label + commit (tasks) -> receipts

One row is one unit, its audio nested: rows are never split or merged on the way, blocks are.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipeline import units
from pipeline.commit import Receipt, commit_unit
from pipeline.config import RayConfig, TranscribeConfig
from pipeline.engine.checkpoint import CheckpointError
from pipeline.label import label
from pipeline.output import Output
from pipeline.read import read_units
from pipeline.segment import segment_unit
from pipeline.transcribe import Transcriber
from pipeline.units import Done, Split

_READ_TASK_BYTES = 600 << 20  # what reading and decoding a unit takes at most
_MAX_BLOCKS = 20_000  # of the input; more splits than that share a block, and with it a read task


def transcribe(
    splits: Sequence[Split], done: dict[str, Done], config: TranscribeConfig, run_id: str
) -> Iterator[Receipt]:
    """Work off `splits` on the connected Ray cluster, less what is `done`; yields a receipt per committed unit.

    An exception of a step ends the job and is raised here; what was committed stays.
    """
    receipts = dataset(splits, done, config, run_id)
    tables: Iterable[pa.Table] = receipts.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
    for table in tables:
        yield Receipt(**table.to_pylist()[0])


def dataset(splits: Sequence[Split], done: dict[str, Done], config: TranscribeConfig, run_id: str) -> ray.data.Dataset:
    """The steps from splits to receipts, not yet running."""
    places = Places.on_cluster(config.ray)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the driver shows its own
    context.raise_original_map_exception = True  # the driver tells ours by their types
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would log is raised, and told once
    context.target_max_block_size = (
        1 << 20
    )  # a block ends after the row that fills it: every unit is a block of its own
    rows = [{"split": split.to_json(), "done": pickle.dumps(done.get(split.split_id, Done()))} for split in splits]
    return (
        ray.data.from_items(rows, override_num_blocks=min(len(rows), _MAX_BLOCKS))
        .map_batches(
            _reader(config),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            compute=ray.data.TaskPoolStrategy(size=places.read_tasks),
            # Ray Data would run this step inside the engine's actors; unlike remote args keep them apart
            memory=_READ_TASK_BYTES,
        )
        .map_batches(
            _EngineActor,
            fn_constructor_args=(config,),
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
        .map_batches(_committer(config, run_id), batch_size=1, batch_format="pyarrow", num_cpus=0)
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


def _reader(config: TranscribeConfig) -> Callable[[pa.Table], Iterator[pa.Table]]:
    def read_and_segment(table: pa.Table) -> Iterator[pa.Table]:
        for row in table.to_pylist():
            for unit in read_units(Split.from_json(row["split"]), pickle.loads(row["done"]), config):
                audio = units.to_table(segment_unit(unit, config.segmentation))
                del unit  # or the task would hold two copies while it waits
                yield audio

    return read_and_segment


class _EngineActor:
    """Async, so that Ray runs several units in one actor at once: their segments share the engine's batches."""

    def __init__(self, config: TranscribeConfig) -> None:
        threads = config.engine.threads or max(1, int(config.ray.num_cpus))
        self._refused: CheckpointError | None = None
        try:
            self._transcriber = Transcriber(config.engine.model_copy(update={"threads": threads}))
        except CheckpointError as error:  # of what is raised here Ray passes on the text alone, and tries again
            self._refused = error

    async def __call__(self, table: pa.Table) -> AsyncIterator[dict[str, Any]]:
        if self._refused is not None:
            raise self._refused
        transcribed = await self._transcriber(units.from_table(table))
        yield {"unit": [pickle.dumps(transcribed)]}


def _committer(config: TranscribeConfig, run_id: str) -> Callable[[pa.Table], dict[str, Any]]:
    def label_and_commit(table: pa.Table) -> dict[str, Any]:
        unit = pickle.loads(table["unit"][0].as_py())
        labels = [label(row.hypothesis, row.duration, row.speech_ratio, config.labels) for row in unit.segments]
        output = Output(config.output, config.storage.options)
        receipt = commit_unit(output, unit, labels, config, run_id)
        return {name: [getattr(receipt, name)] for name in Receipt.__dataclass_fields__}

    return label_and_commit
