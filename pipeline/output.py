"""The folder that a job writes: what lies where, what is committed, and which configuration it belongs to.

OUT/transcripts/<unit>.parquet   one object a unit; the object's existence is the commit
OUT/logits/<unit>.parquet        likeliest tokens of its segments, there before the unit is (engine.top_logprobs)
OUT/shardscribe.yaml             the resolved configuration and its hash
OUT/plan.json                    the splits of the newest run, so that `status` can tell what is missing
OUT/calibration/                 thresholds.yaml fitted before the job, and the sample transcribed for it
"""

from __future__ import annotations

import json
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline import listing, redact, storage
from pipeline.config import ENGINE_SPEED_KEYS, ConfigError, TranscribeConfig
from pipeline.streams_config import SPEED_KEYS
from pipeline.units import Done, Split, UnitKey

RECORD_KEY = b"shardscribe"  # of each object's key-value metadata: its run record, JSON
_METADATA_READERS = 16
_READ_AHEAD = 64  # units in memory at once: some kilobytes each of light columns, a megabyte of all
_NO_RESULT = {"inputs", "output", "ray"} | {
    f"{section}.{key}"
    for section in ("engine", "agree_with")
    for key in (*ENGINE_SPEED_KEYS, *(f"streams.{key}" for key in SPEED_KEYS))
}


@dataclass(frozen=True, slots=True)
class PlannedSplit:
    split_id: str
    estimated_s: float


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run set out to do: `started_at` in seconds since the epoch, `unit_s` the audio that a unit aims at."""

    run_id: str
    started_at: float
    unit_s: float
    splits: list[PlannedSplit]


class Output:
    """One output folder, local or at any fsspec URL."""

    def __init__(self, url: str, options: storage.Options) -> None:
        self.url = storage.resolve(url)
        self._options = options
        self.transcripts_url = storage.join(self.url, "transcripts")
        self.logits_url = storage.join(self.url, "logits")

    def claim(
        self, config: TranscribeConfig, model_revision: str | None = None, agree_with_revision: str | None = None
    ) -> None:
        """Write the resolved configuration, or make sure that the one already there gives the same results.

        The revisions say which weights a folder holds at the moment; None for a Hub id, whose revision is config.
        Raises ConfigError when the output belongs to a configuration that would give other rows.
        """
        url = storage.join(self.url, "shardscribe.yaml")
        document = {
            "config_hash": config.result_hash(),
            "model_revision": model_revision,
            "agree_with_revision": agree_with_revision,
            "config": _public(config),
        }
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        if storage.commit(url, text.encode(), self._options):
            return
        there = yaml.safe_load(storage.read_bytes(url, self._options))
        changed = list(changed_keys(there["config"], document["config"], _NO_RESULT))
        for section, model, revision in (
            ("engine", config.engine.model, "model_revision"),
            ("agree_with", config.agree_with.model if config.agree_with else "", "agree_with_revision"),
        ):
            if there[revision] != document[revision] and not {section, f"{section}.model"} & set(changed):
                changed.append(f"the weights in {model}")
        if any(there[key] != document[key] for key in ("config_hash", "model_revision", "agree_with_revision")):
            raise ConfigError(
                f"{self.url} holds results of another configuration (changed: {', '.join(changed)}); "
                "write to a new output, or set that back to go on with this one"
            )

    def commit_logits(self, key: UnitKey, data: bytes) -> None:
        """Put a unit's likeliest tokens in place, before the unit itself; those that are there stay."""
        storage.commit(storage.join(self.logits_url, f"{key.name}.parquet"), data, self._options)

    def commit_unit(self, key: UnitKey, data: bytes) -> bool:
        """Put a unit's Parquet bytes in place; False when the unit was already there."""
        return storage.commit(storage.join(self.transcripts_url, f"{key.name}.parquet"), data, self._options)

    def committed(self) -> dict[str, Done]:
        """Split id -> its committed units, from one listing of names."""
        keys: dict[str, list[UnitKey]] = defaultdict(list)
        for name in listing.file_names(self.transcripts_url, self._options):
            key = UnitKey.parse(name)
            if key is not None:
                keys[key.split_id].append(key)
        return {split_id: Done.of(found) for split_id, found in keys.items()}

    def write_plan(self, plan: RunPlan) -> None:
        document = {
            "run_id": plan.run_id,
            "started_at": plan.started_at,
            "unit_s": plan.unit_s,
            "splits": [[split.split_id, round(split.estimated_s, 1)] for split in plan.splits],
        }
        storage.write_bytes(storage.join(self.url, "plan.json"), json.dumps(document).encode(), self._options)

    def read_plan(self) -> RunPlan:
        """Raises ConfigError when there is no output of ours at the URL."""
        url = storage.join(self.url, "plan.json")
        if not storage.exists(url, self._options):
            raise ConfigError(f"{self.url} holds no plan.json: no `shardscribe transcribe` has written there")
        document = json.loads(storage.read_bytes(url, self._options))
        splits = [PlannedSplit(split_id, estimated_s) for split_id, estimated_s in document["splits"]]
        return RunPlan(document["run_id"], document["started_at"], document["unit_s"], splits)

    def records(self, keys: Iterable[UnitKey]) -> Iterator[dict[str, Any]]:
        """The run records of committed units, read from the objects' footers by several threads."""
        with ThreadPoolExecutor(_METADATA_READERS) as pool:
            yield from pool.map(self._record, keys)

    def tables(self, keys: Iterable[UnitKey], columns: list[str]) -> Iterator[tuple[UnitKey, dict[str, Any], pa.Table]]:
        """Each unit's run record and `columns`, in the order of `keys`; some units are read ahead."""
        pending: deque[Future[tuple[UnitKey, dict[str, Any], pa.Table]]] = deque()
        with ThreadPoolExecutor(_METADATA_READERS) as pool:
            for key in keys:
                pending.append(pool.submit(self._table, key, columns))
                if len(pending) == _READ_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _table(self, key: UnitKey, columns: list[str]) -> tuple[UnitKey, dict[str, Any], pa.Table]:
        url = storage.join(self.transcripts_url, f"{key.name}.parquet")
        try:
            with storage.open_read(url, self._options) as opened:
                file = pq.ParquetFile(opened)
                return key, json.loads(file.metadata.metadata[RECORD_KEY]), file.read(columns, use_threads=False)
        except pa.ArrowInvalid as error:
            raise storage.StorageError(
                f"{url} is no readable unit: {error}; delete it and run the job again"
            ) from error

    def _record(self, key: UnitKey) -> dict[str, Any]:
        url = storage.join(self.transcripts_url, f"{key.name}.parquet")
        with storage.open_read(url, self._options) as file:
            metadata = pq.read_metadata(file).metadata
        return json.loads(metadata[RECORD_KEY])  # type: ignore[no-any-return]


def _public(config: TranscribeConfig) -> dict[str, Any]:
    """The configuration without what may hold credentials: storage options, and parts of URLs."""
    data = config.model_dump(mode="json", exclude={"storage"})
    for source in data["inputs"]:
        source["path"] = redact.names(source["path"])
    calibrate = data["labels"]["calibrate"]
    if calibrate is not None and calibrate["output"] is not None:
        calibrate["output"] = redact.names(calibrate["output"])
    return data | {"output": redact.names(data["output"])}


def new_run_id() -> str:
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"


def planned(splits: Iterable[Split]) -> list[PlannedSplit]:
    return [PlannedSplit(split.split_id, split.estimated_s) for split in splits]


def changed_keys(old: Any, new: Any, ignored: Collection[str] = (), path: str = "") -> Iterator[str]:
    """Paths of the keys whose values differ, without the `ignored` ones."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            below = f"{path}.{key}" if path else key
            if below not in ignored:
                yield from changed_keys(old.get(key), new.get(key), ignored, below)
    elif old != new:
        yield path
