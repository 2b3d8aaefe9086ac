"""Streams fed in tests, and what they said."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.config import EngineConfig
from pipeline.engine.causal.batch import StreamBatch
from pipeline.engine.causal.state import Stream, Update
from pipeline.engine.model import LoadedModel, load_model


def loaded_from(model: str | Path) -> LoadedModel:
    return load_model(EngineConfig(model=str(model), dtype="float32", device="cpu"))


def text_of(updates: Sequence[Update]) -> str:
    assert not any(update.error for update in updates)
    return "".join(update.text for update in updates)


def transcribed(
    batch: StreamBatch, clips: Sequence[np.ndarray], language: str | None = "English"
) -> list[list[Update]]:
    """All at once, each given whole."""
    for number, pcm in enumerate(clips):
        stream = batch.open(str(number), language)
        batch.push(stream, pcm)
        batch.end(stream)
    said = run(batch)
    return [said[str(number)] for number in range(len(clips))]


def run(batch: StreamBatch) -> dict[str, list[Update]]:
    """Until there is nothing to do: updates by stream."""
    said: dict[str, list[Update]] = defaultdict(list)
    while batch.has_work:
        for update in batch.turn():
            said[update.stream_id].append(update)
    return said


def at_random(
    batch: StreamBatch, clips: Sequence[np.ndarray], rng: random.Random, language: str | None = "English"
) -> list[list[Update]]:
    """Streams join when they like, in chunks of any size, between any number of turns."""
    to_come = list(range(len(clips)))
    rng.shuffle(to_come)
    open_streams: dict[int, tuple[Stream, int]] = {}
    said: list[list[Update]] = [[] for _ in clips]
    while to_come or open_streams or batch.has_work:
        while to_come and rng.random() < 0.3:
            number = to_come.pop()
            open_streams[number] = batch.open(str(number), language), 0
        for number, (stream, at) in list(open_streams.items()):
            if rng.random() < 0.5:
                continue
            size = rng.choice([1, 160, 1000, 16_000, 50_000, 200_000])
            batch.push(stream, clips[number][at : at + size])
            open_streams[number] = stream, at + size
            if at + size >= len(clips[number]):
                batch.end(stream)
                del open_streams[number]
        for _ in range(rng.randrange(0, 30)):
            for update in batch.turn():
                said[int(update.stream_id)].append(update)
    return said
