"""On the PYTHONPATH of Ray's workers, this makes recordings deadly and engines light: the product has no hook for it.

A decoder dies over a file that ends in `POISON:<way>`. A model folder with a file `light` is an engine that loads at
once, writes the same text for everything, and dies over a recording named `deaf-<way>`.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any


def die(way: str) -> None:
    if way == "segfault":
        ctypes.string_at(0)
    elif way == "endless":
        while True:
            time.sleep(1)


def poison_audio(audio: ModuleType) -> None:
    real = audio.decode

    def decode(file: Any, *arguments: Any) -> Any:
        file.seek(-min(64, file.seek(0, 2)), 2)
        found = re.search(rb"POISON:(\w+)$", file.read())
        file.seek(0)
        if found:
            die(found[1].decode())
        yield from real(file, *arguments)

    audio.decode = decode  # type: ignore[attr-defined]


def poison_engine(create: ModuleType) -> None:
    real = create.create_engine
    create.create_engine = lambda config, observe=None: (  # type: ignore[attr-defined]
        _Engine(config) if Path(config.model, "light").exists() else real(config, observe)
    )


class _Engine:
    def __init__(self, config: Any) -> None:
        from pipeline.attempts import Watchdog
        from pipeline.engine.base import EngineInfo
        from pipeline.engine.batching import BatchWorker

        self.info = EngineInfo("reference", config.model, "none", "none", "float32", "cpu", "windowed", 0)
        worker = BatchWorker(self._transcribe, config.batch_size, 480.0, Watchdog(config.stall_timeout_s))
        self.submit, self.close = worker.submit, worker.close

    def _transcribe(self, segments: Any) -> Any:
        from pipeline.schema import Hypothesis

        for segment in segments:
            found = re.search(r"deaf-(\w+)", segment.segment_id)
            if found:
                die(found[1])
        return [Hypothesis("heard", "heard", "English", [7], [-0.1], "stop") for _ in segments]


class _Finder(importlib.abc.MetaPathFinder):
    PATCHES = {"pipeline.audio": poison_audio, "pipeline.engine.create": poison_engine}

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        patch = self.PATCHES.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if patch is not None else None
        if patch is None or spec is None or spec.loader is None:
            return None
        real = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            real(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
