"""`shardscribe bench`: the figures of pipeline/bench.py as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from jobs import bench_pipeline
from pipeline import bench, bench_streams
from pipeline.bench import Figure
from pipeline.config import ConfigError
from pipeline.machine import cpu_name, versions

PACKAGES = ("shardscribe", "torch", "transformers", "qwen-asr", "ray", "nvidia-modelopt")
FIGURES = ("engine", "0.6b", "int4", "reading", "streams", "pipeline", "growth")
DEFAULT = ("engine", "int4", "reading")
NUM_CLIPS = 256
NUM_STREAMS = {"cpu": 96, "cuda": 512}
NUM_CLIPS_06B = {"cpu": 32, "cuda": 256}  # whole batches of qwen-asr's; a CPU without AMX takes minutes for one


def run(
    names: Sequence[str],
    num_clips: int | None,
    threads: int | None,
    hours: Sequence[float],
    models: tuple[str, str],
    out: Path | None,
    console: Console,
) -> None:
    """Measure, print a table, and write JSON to `out`. Raises ConfigError for a name that is no figure.
    `num_clips` None, no `hours`: those that the figure is made for. `models`: model and tower of streams."""
    if unknown := set(names) - set(FIGURES):
        raise ConfigError(f"{', '.join(sorted(unknown))}: no figure; there are {', '.join(FIGURES)}")
    threads = threads or os.cpu_count() or 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measures: dict[str, Callable[[], list[Figure]]] = {
        "engine": lambda: bench.engines(num_clips or NUM_CLIPS, threads),
        "0.6b": lambda: bench.engines_06b(num_clips or NUM_CLIPS_06B[device.type], threads, device),
        "int4": lambda: bench.int4(device, threads),
        "reading": bench.reading,
        "streams": lambda: bench_streams.streams(*models, num_clips or NUM_STREAMS[device.type], threads),
        "pipeline": lambda: bench_pipeline.pipeline(console),
        "growth": lambda: bench_pipeline.growth(console, hours or bench_pipeline.GROWTH_HOURS),
    }
    machine = described(device, threads)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False, soft_wrap=True)
    found: list[Figure] = []
    for name in names or DEFAULT:
        with console.status(f"measuring {name}"):
            found += measures[name]()
    console.print(table(found))
    if out is not None:
        figures = [asdict(figure) | {"is_met": figure.is_met} for figure in found]
        out.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1))
        console.print(f"written to {out}", highlight=False)


def described(device: torch.device, threads: int) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": name, "threads": threads, "python": platform.python_version()} | versions(PACKAGES)


def table(figures: Sequence[Figure]) -> Table:
    view = Table(box=None, pad_edge=False)
    for column in ("figure", "value", "target", ""):
        view.add_column(column, justify="right" if column in ("value", "target") else "left")
    for figure in figures:
        target = "" if figure.target is None else f"{'<=' if figure.at_most else '>='} {figure.target:g}"
        verdict = {None: "", True: "met", False: "missed"}[figure.is_met]
        view.add_row(figure.name, f"{figure.value:,.3g} {figure.unit}".strip(), target, verdict)
    return view
