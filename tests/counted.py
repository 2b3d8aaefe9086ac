"""The `shardscribe` command with engine actors that write down what they decode, as a line of JSON each time.

    python -c 'from tests.counted import main; main()' transcribe CONF

The actors' environment says where (`DECODED`, a folder on the one machine that all nodes are on); a job writes to
`<last part of its output>.jsonl` there. A line is in the file before a kill can undo what it tells of.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from pipeline import graph, units
from pipeline.attempts import Attempts
from pipeline.config import TranscribeConfig

VARIABLE = "DECODED"


@dataclass(frozen=True, slots=True)
class Event:
    """An engine actor has begun with a unit, or ended, which is to say committed it; `at` in seconds since the epoch,
    `pid` is the actor's."""

    what: Literal["begun", "ended"]
    at: float
    unit: str
    audio_s: float
    pid: int


def events(folder: Path, output: str) -> list[Event]:
    """What the jobs that wrote to `output` noted, in order."""
    file = _file(folder, output)
    if not file.exists():
        return []
    return [Event(**json.loads(line)) for line in file.read_text().splitlines()]


def _file(folder: Path, output: str) -> Path:
    return folder / f"{output.rsplit('/', 1)[-1]}.jsonl"


class _EngineActor(graph._EngineActor):  # the same name, and so the same process title
    def __init__(self, config: TranscribeConfig, attempts: Attempts, run_id: str) -> None:
        super().__init__(config, attempts, run_id)
        self._file = _file(Path(os.environ[VARIABLE]), config.output)

    async def __call__(self, table: pa.Table) -> AsyncIterator[dict[str, Any]]:
        unit = units.from_table(table)
        self._note("begun", unit)
        async for row in super().__call__(table):
            self._note("ended", unit)
            yield row

    def _note(self, what: str, unit: units.Unit) -> None:
        line = {"what": what, "at": time.time(), "unit": unit.key.name, "audio_s": unit.audio_s, "pid": os.getpid()}
        with self._file.open("a") as file:  # one short write: lines of two actors do not mix
            file.write(json.dumps(line) + "\n")


def main() -> None:
    from jobs.cli import app

    graph._EngineActor = _EngineActor  # type: ignore[misc]
    app()
