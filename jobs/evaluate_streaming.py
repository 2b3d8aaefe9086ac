"""Replays recordings to streaming systems in real time and scores what they publish under the streaming contract."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import storage
from pipeline.config import ConfigError, EngineConfig, TranscribeConfig, load_config
from pipeline.evaluate import streaming_report as report
from pipeline.evaluate.replay import Replay, StreamingSystem, Talk, measure
from pipeline.evaluate.talks import languages, read_talks

SYSTEMS = ("causal", "windowed", "offline")
CONTRACTS = ("streaming",)


@dataclass(frozen=True, slots=True)
class Request:
    """What to replay, to what, and where the figures go. Operations are counted in every `count_every`-th minute."""

    manifests: Sequence[str]
    model: str
    out: str
    systems: Sequence[str] = ("causal",)
    language: str | None = None
    conf: Path | None = None
    overrides: Sequence[str] = field(default_factory=list)
    count_every: int = 10


@dataclass(frozen=True, slots=True)
class _System:
    about: dict[str, Any]
    measure: Callable[[Talk], Replay]
    close: Callable[[], None]


def request(
    contract: str, manifests: Sequence[str], model: str | None, out: str | None, systems: Sequence[str], **others: Any
) -> Request:
    """Raises ConfigError for what does not go with the contract."""
    if contract not in CONTRACTS:
        raise ConfigError(f"--contract {contract}: there is {', '.join(CONTRACTS)}")
    if not (manifests and model and out):
        raise ConfigError("--contract streaming replays recordings: it needs --manifest FILE, --model MODEL, --out DIR")
    if unknown := [name for name in systems if name not in SYSTEMS]:
        raise ConfigError(f"--system {unknown[0]}: there are {', '.join(SYSTEMS)}")
    return Request(manifests, model, out, tuple(dict.fromkeys(systems)) or ("causal",), **others)


def configured(request: Request) -> TranscribeConfig:
    """The main job's configuration for the request; each system takes of it what concerns it."""
    given: list[tuple[str, Any]] = [
        ("inputs", list(request.manifests)),
        ("output", request.out),
        ("engine.model", request.model),
    ]
    if "causal" in request.systems:
        given += [("engine.name", "causal"), ("segmentation.policy", "stream")]
    if request.language is not None:
        given.append(("engine.language", request.language))
    settings = [*request.overrides, *(f"{key}={json.dumps(value)}" for key, value in given)]
    return load_config(TranscribeConfig, request.conf, settings)


def run(request: Request, console: Console, messages: Console) -> None:
    """Replay, print a table, and write streaming.json and .md. Raises ConfigError for what cannot be replayed."""
    config = configured(request)
    spoken = languages(config)
    threads = config.engine.threads or max(1, int(config.ray.num_cpus))
    engine = config.engine.model_copy(update={"threads": threads})
    replays: list[Replay] = []
    about: dict[str, Any] = {}
    for name in request.systems:
        with messages.status(f"loading {name}"):
            system = _create(name, engine, config, spoken, request.count_every)
        about[name] = system.about
        for talk in read_talks(config):
            with messages.status(f"{name}: {talk.name}, {talk.duration_s / 60:.1f} min"):
                replays.append(system.measure(talk))
        system.close()
    found = report.rows(replays)
    headers, *lines = [line[:-1] for line in (list(report.HEADERS), *map(report.cells, found))]  # no streams per core
    _show([headers, *lines], console)
    files = {
        "streaming.json": json.dumps(report.to_json(about, replays, found, threads), ensure_ascii=False, indent=1),
        "streaming.md": report.markdown(headers, lines),
    }
    for file, text in files.items():
        url = storage.join(storage.resolve(request.out), file)
        storage.write_bytes(url, text.encode(), config.storage.access)
        console.print(url, highlight=False, markup=False, soft_wrap=True)


def _create(
    name: str, engine: EngineConfig, config: TranscribeConfig, spoken: Sequence[str], count_every: int
) -> _System:
    if name == "offline":
        from pipeline.evaluate.streaming_systems import OfflineSystem

        segmentation = config.segmentation.model_copy(update={"policy": "sentence"})
        offline = OfflineSystem(name, as_offline(engine), segmentation)
        return _System(offline.about, lambda talk: offline.measure(talk, count_every), offline.close)
    live = _causal(name, engine, spoken) if name == "causal" else _windowed(name, engine)
    return _System(live.about, lambda talk: measure(live, talk, count_every), lambda: None)


def _causal(name: str, engine: EngineConfig, spoken: Sequence[str]) -> StreamingSystem:
    from pipeline.engine.causal.load import load_causal
    from pipeline.engine.causal.tower_file import untrained
    from pipeline.evaluate.streaming_systems import CausalSystem

    causal = load_causal(engine)
    for language in spoken:
        if causal.languages is not None and language not in causal.languages:
            raise ConfigError(f"engine.tower {engine.tower}: {untrained(language, causal.languages)}")
    return CausalSystem(name, causal.loaded, causal.settings, causal.info)


def _windowed(name: str, engine: EngineConfig) -> StreamingSystem:
    import torch

    from pipeline.evaluate.upstream import UpstreamSystem

    torch.set_num_threads(engine.threads or 1)
    return UpstreamSystem(name, engine, "windowed")


def as_offline(engine: EngineConfig) -> EngineConfig:
    return engine.model_copy(update={"name": "offline", "tower": None, "tower_revision": None})


def _show(table: Sequence[Sequence[str]], console: Console) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *figures in table:
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(figures, widths[1:], strict=True))]
        console.print("  ".join(cells).rstrip(), highlight=False, markup=False, soft_wrap=True)
