"""The engine of streams: recordings through `submit`, live streams from other threads, and its end."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import EngineConfig
from pipeline.engine.base import Batch, EngineError, EngineFailure
from pipeline.engine.causal.batch import StreamBatch
from pipeline.engine.causal.engine import CausalEngine
from pipeline.engine.causal.state import StreamError, Update
from pipeline.engine.causal.weights import save_tower
from pipeline.engine.checkpoint import CheckpointError
from pipeline.schema import Hypothesis, Segment
from tests.engine.causal.streams import loaded_from, text_of, transcribed
from tests.engine.causal.test_batch import SETTINGS
from tests.engine.causal.test_tower import random_tower
from tests.engine.causal.upstream import tower_of
from tests.engine.tiny import noise, segment

TIMEOUT_S = 30
STREAMS = {
    "block_frames": 96, "left_steps": 40, "hold_back": 2, "min_s": 2.0, "max_s": 4.0, "roll": "mark",
    "max_new_tokens": 24, "max_waiting_s": 4.0,
}  # fmt: skip


def new_engine(checkpoint: Path, observe: Any = None, **engine: Any) -> CausalEngine:
    options = {"name": "causal", "model": str(checkpoint), "dtype": "float32", "device": "cpu", "slots": 3}
    streams = {"streams": STREAMS, "tower": "offline"}
    return CausalEngine(EngineConfig.model_validate(options | streams | engine), observe)


@pytest.fixture
def engine(tiny_checkpoint: Path) -> Iterator[CausalEngine]:
    engine = new_engine(tiny_checkpoint)
    yield engine
    engine.close()


def expected(checkpoint: Path, pcm: np.ndarray, language: str | None) -> str:
    (updates,) = transcribed(StreamBatch(loaded_from(checkpoint), SETTINGS), [pcm], language)
    return text_of(updates)


def test_recordings_are_streams(tiny_checkpoint: Path, engine: CausalEngine) -> None:
    """Longer than what a stream may have waiting, and more than slots."""
    segments = [segment(0.4 + 1.7 * i, i, ["English", "Chinese"][i % 2]) for i in range(8)]
    results = engine.submit(segments).result(TIMEOUT_S)
    for each, got in zip(segments, results, strict=True):
        assert isinstance(got, Hypothesis)
        assert got.text == expected(tiny_checkpoint, each.pcm, each.language) and got.language in ("", each.language)
        assert len(got.token_ids) == len(got.token_logprobs) and got.finish_reason in ("stop", "length")


def test_segments_that_cannot_run_fail_by_name_and_alone(engine: CausalEngine) -> None:
    segments = [segment(1, 1), segment(1, 2, "Klingon"), Segment("empty", np.zeros(0, np.int16))]
    first, second, empty = engine.submit(segments).result(TIMEOUT_S)
    assert isinstance(first, Hypothesis) and isinstance(empty, Hypothesis) and empty.text == ""
    assert isinstance(second, EngineFailure) and second.code == "unsupported_language"
    assert engine.submit([]).result(TIMEOUT_S) == []


def test_live_streams_of_many_threads(tiny_checkpoint: Path, engine: CausalEngine) -> None:
    said: dict[str, list[Update]] = {}
    clips = [noise(2.0 + i, i) for i in range(6)]

    def speak(number: int) -> None:
        rng, name, at = random.Random(number), f"live-{number}", 0
        said[name] = []
        live = engine.open(name, said[name].append, "English")
        while at < len(clips[number]):
            size = rng.choice([100, 1600, 20_000, 30_000])
            live.push(clips[number][at : at + size], timeout_s=TIMEOUT_S)
            at += size
        live.end()

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    engine.close()
    for number, clip in enumerate(clips):
        updates = said[f"live-{number}"]
        assert updates[-1].is_last and text_of(updates) == expected(tiny_checkpoint, clip, "English")


def test_what_a_live_stream_cannot_take_is_refused(engine: CausalEngine) -> None:
    said: list[Update] = []
    live = engine.open("a", said.append)
    with pytest.raises(StreamError, match="open already"):
        engine.open("a", said.append)
    for chunk, rate, code in (
        (np.zeros(9, np.float32), 16_000, "bad_audio"),
        (np.zeros(9, np.int16), 8000, "wrong_rate"),
    ):
        with pytest.raises(StreamError) as refused:
            live.push(chunk, rate)
        assert refused.value.code == code
    with pytest.raises(StreamError, match="a chunk of 3.5 s; 3.0 s go at once"):
        live.push(noise(3.5))
    assert live.room == 48_240
    live.end()
    with pytest.raises(StreamError, match="ended"):
        live.push(noise(1.0))


def test_closing_ends_what_is_live_and_then_takes_nothing(tiny_checkpoint: Path) -> None:
    engine, said = new_engine(tiny_checkpoint), list[Update]()
    engine.open("a", said.append, "English").push(noise(2.0))
    engine.close()
    engine.close()
    assert said[-1].is_last and said[-1].heard_s == 2.0
    with pytest.raises(EngineError):
        engine.submit([segment(1)])
    with pytest.raises(EngineError):
        engine.open("b", said.append)


def test_a_cancelled_submission_frees_its_streams(tiny_checkpoint: Path) -> None:
    engine = new_engine(tiny_checkpoint)
    future = engine.submit([segment(300.0, i) for i in range(4)])
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result(0)
    assert isinstance(engine.submit([segment(1.0)]).result(TIMEOUT_S)[0], Hypothesis)
    engine.close()
    assert not engine._recordings and not len(engine._batch)


def test_a_bug_breaks_the_engine_and_everybody_hears_of_it(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, said = new_engine(tiny_checkpoint), list[Update]()
    live = engine.open("a", said.append)

    def broken(*_: Any) -> Any:
        raise TypeError("ours")

    monkeypatch.setattr(StreamBatch, "turn", broken)
    with pytest.raises(EngineError, match="TypeError: ours"):  # at once, where the thread turns before it is asked
        engine.submit([segment(2.0)]).result(TIMEOUT_S)
    engine.close()
    assert said[-1].error is not None and said[-1].error.code == "engine_error"
    with pytest.raises(StreamError, match="ended"):
        live.push(noise(1.0))


def test_an_observer_hears_of_all_audio(tiny_checkpoint: Path) -> None:
    batches: list[Batch] = []
    engine = new_engine(tiny_checkpoint, observe=batches.append)
    engine.submit([segment(3.0, 1), segment(5.0, 2)]).result(TIMEOUT_S)
    engine.close()
    assert sum(batch.audio_s for batch in batches) == pytest.approx(8.0, abs=0.16)


def test_a_tower_of_its_own_runs_and_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_tower(tower_of(tiny_checkpoint), tmp_path / "same.safetensors", {})
    engine = new_engine(tiny_checkpoint, tower=str(tmp_path / "same.safetensors"))
    (got,) = engine.submit([segment(3.0, 1, "English")]).result(TIMEOUT_S)
    engine.close()
    assert isinstance(got, Hypothesis) and got.text == expected(tiny_checkpoint, segment(3.0, 1).pcm, "English")
    assert engine.info.engine == "causal" and "+tower@" in engine.info.model_revision
    save_tower(random_tower(16, 2, 1, seed=1), tmp_path / "other.safetensors", {})
    with pytest.raises(CheckpointError, match="no tower of"):
        new_engine(tiny_checkpoint, tower=str(tmp_path / "other.safetensors"))
