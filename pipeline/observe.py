"""What a run tells Prometheus, through Ray: the driver what is committed, every engine what it decodes.

Ray exports counter `x` as `ray_x_total` and anything else as `ray_x`. A node that goes takes its counters with it: what
must add up in the end is counted by the driver, what rates are made of by the engines. A node that stays keeps the
counters of runs that have ended: `run_id` tells them apart. A gauge is there only while someone sets it.

infra/grafana-dashboard.json shows each of these metrics.
"""

from __future__ import annotations

import threading
import time

from ray.util.metrics import Counter, Gauge, Histogram

from pipeline.commit import Receipt
from pipeline.engine.base import Batch

_UNIT_S = [1.0, 2, 5, 10, 20, 30, 60, 120, 180, 300, 450, 600, 900, 1200, 1800, 2700, 3600, 7200]

_GAUGE_EVERY_S = 5.0  # Ray 2.60 reports every 10 s, and drops a gauge that was not set between two reports


class RunMetrics:
    """The driver's: what this run has committed, and the audio that it is expected to (seconds)."""

    def __init__(self, run_id: str, expected_s: float) -> None:
        self._run = {"run_id": run_id}
        self._audio_s = _counter("committed_audio_seconds", "Audio of the units committed.")
        self._units = _counter("committed_units", "Units committed.")
        self._segments = _counter("committed_segments", "Rows committed, failed ones among them.")
        self._failures = _counter("failures", "Failed rows by their reason code.", "reason")
        self._retries = _counter("storage_retries", "Storage requests made again for the units committed.")
        expected = _counter("expected_audio_seconds", "Audio to do when the run began, estimated from file sizes.")
        _add(expected, expected_s, self._run)

    def add(self, receipt: Receipt) -> None:
        """Count a committed unit."""
        _add(self._audio_s, receipt.audio_s, self._run)
        _add(self._units, 1, self._run)
        _add(self._segments, receipt.num_segments, self._run)
        _add(self._retries, receipt.num_retries, self._run)
        for reason, count in receipt.errors.items():
            _add(self._failures, count, self._run | {"reason": reason})


class EngineMetrics:
    """An engine actor's: how much it decodes, how well its batches are filled, and what waits for it."""

    def __init__(self, run_id: str) -> None:
        self._run = {"run_id": run_id}
        self._audio_s = _counter("engine_audio_seconds", "Audio in the batches that the engine ran.")
        self._padded_s = _counter("engine_padded_audio_seconds", "The same with the padding to each batch's longest.")
        self._batches = _counter("engine_batches", "Batches that the engine ran.")
        self._busy_s = _counter("engine_busy_seconds", "Wall time that the engine spent in batches.")
        description = "Wall time of a unit in the engine, the waiting for its batches included."
        self._unit_s = Histogram("shardscribe_engine_unit_seconds", description, _UNIT_S, ("run_id",))
        description = "Segments that waited when the last batch ended; an engine that lives has this series."
        self._waiting = Gauge("shardscribe_engine_waiting_segments", description, ("run_id",))
        self._num_waiting = 0
        threading.Thread(target=self._keep_gauge, name="gauge", daemon=True).start()

    def batch(self, batch: Batch) -> None:
        """Count a batch; an engine's `Observer`."""
        _add(self._audio_s, batch.audio_s, self._run)
        _add(self._padded_s, batch.padded_s, self._run)
        _add(self._batches, 1, self._run)
        _add(self._busy_s, batch.busy_s, self._run)
        self._num_waiting = batch.num_waiting
        self._waiting.set(batch.num_waiting, self._run)

    def unit(self, busy_s: float) -> None:
        """Count a unit that took `busy_s` seconds from its arrival to its last hypothesis."""
        self._unit_s.observe(busy_s, self._run)

    def _keep_gauge(self) -> None:
        while True:
            self._waiting.set(self._num_waiting, self._run)
            time.sleep(_GAUGE_EVERY_S)


def _counter(name: str, description: str, *tags: str) -> Counter:
    return Counter(f"shardscribe_{name}", description, ("run_id", *tags))


def _add(counter: Counter, value: float, tags: dict[str, str]) -> None:
    if value > 0:  # Ray refuses 0, and so cannot begin a counter there
        counter.inc(value, tags)
