"""The offline engine: the reference's tokens however segments meet in it, and nothing lost when parts fail."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import EngineConfig
from pipeline.engine.base import Batch, EngineError, EngineFailure, Result
from pipeline.engine.create import create_engine
from pipeline.engine.decoder import Choice, SlotDecoder
from pipeline.engine.offline import OfflineEngine
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis, Segment
from tests.engine.tiny import segment

TIMEOUT_S = 60
SECONDS = [0.5, 1.2345, 2.0, 4.71, 7.9, 9.03, 17.5, 0.2, 30.0]


def new_engine(checkpoint: Path, observe: Any = None, **changes: Any) -> OfflineEngine:
    options = {"name": "offline", "model": str(checkpoint), "device": "cpu", "dtype": "float32", "max_new_tokens": 16}
    engine = create_engine(EngineConfig.model_validate(options | changes), observe)
    assert isinstance(engine, OfflineEngine)
    return engine


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[OfflineEngine]:
    engine = new_engine(tiny_checkpoint, slots=5, prefill_tokens=400, look_ahead=7)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> dict[str, Hypothesis]:
    """What the reference says about each of forty segments, by id."""
    options = {"model": str(tiny_checkpoint), "device": "cpu", "dtype": "float32", "max_new_tokens": 16}
    reference = create_engine(EngineConfig.model_validate(options | {"name": "reference"}))
    found = hypotheses(reference.submit(SEGMENTS).result(TIMEOUT_S))
    reference.close()
    return {each.segment_id: one for each, one in zip(SEGMENTS, found, strict=True)}


SEGMENTS = [
    segment(SECONDS[i % len(SECONDS)] * (1 + i / 200), i, [None, "English", "Chinese"][i % 3]) for i in range(40)
]


def hypotheses(results: Sequence[Result]) -> list[Hypothesis]:
    good = [result for result in results if isinstance(result, Hypothesis)]
    assert len(good) == len(results), [result for result in results if not isinstance(result, Hypothesis)]
    return good


def assert_same(segments: Sequence[Segment], results: Sequence[Result], expected: dict[str, Hypothesis]) -> None:
    for each, got in zip(segments, hypotheses(results), strict=True):
        want = expected[each.segment_id]
        assert got.token_ids == want.token_ids
        assert (got.text, got.text_raw, got.language) == (want.text, want.text_raw, want.language)
        assert (got.finish_reason, got.token_ends) == (want.finish_reason, want.token_ends)
        assert got.token_logprobs == pytest.approx(want.token_logprobs, abs=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(range(len(SEGMENTS))),
    sizes=st.lists(st.integers(1, 12), min_size=4, max_size=40),
)
def test_tokens_are_the_references_whatever_segments_meet(
    engine: OfflineEngine, expected: dict[str, Hypothesis], order: list[int], sizes: list[int]
) -> None:
    mixed, futures = [SEGMENTS[i] for i in order], []
    for size in sizes:
        futures.append((mixed[:size], engine.submit(mixed[:size])))
        mixed = mixed[size:]
    for segments, future in futures:
        assert_same(segments, future.result(TIMEOUT_S), expected)


@pytest.mark.parametrize(
    "shape",
    [
        {"slots": 1},
        {"slots": 64, "prefill_tokens": 100_000},
        {"slots": 3, "prefill_tokens": 1, "look_ahead": 1},
        {"slots": 16, "memory_share": 1e-9},
    ],
    ids=str,
)
def test_neither_slots_nor_budgets_change_a_token(
    tiny_checkpoint: Path, expected: dict[str, Hypothesis], shape: dict[str, Any]
) -> None:
    engine = new_engine(tiny_checkpoint, **shape)
    results = engine.submit(SEGMENTS).result(TIMEOUT_S)
    engine.close()
    assert_same(SEGMENTS, results, expected)


def test_rows_are_prefilled_before_they_have_slots(
    tiny_checkpoint: Path, expected: dict[str, Hypothesis], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the encoder's thread, where the engine has two."""
    before, placed = torch.get_num_threads(), list[int]()
    place = SlotDecoder.place

    def placing(self: SlotDecoder, slots: Sequence[int], rows: Sequence[Any]) -> Choice:
        placed.extend(slots)
        return place(self, slots, rows)

    monkeypatch.setattr(SlotDecoder, "place", placing)
    engine = new_engine(tiny_checkpoint, slots=8, threads=2)
    results = engine.submit(SEGMENTS).result(TIMEOUT_S)
    engine.close()
    torch.set_num_threads(before)
    assert_same(SEGMENTS, results, expected)
    assert placed and engine.counts.prefill_ahead_s > 0


@pytest.mark.parametrize("lag", [1, 3])
def test_steps_may_run_ahead_of_the_host(tiny_checkpoint: Path, expected: dict[str, Hypothesis], lag: int) -> None:
    """As they do on CUDA, where a step is queued before the tokens of the last one are read."""
    engine = new_engine(tiny_checkpoint, slots=6, prefill_tokens=1000)
    engine._lag = lag
    results = engine.submit(SEGMENTS).result(TIMEOUT_S)
    engine.close()
    assert_same(SEGMENTS, results, expected)
    assert not engine._unread and engine.counts.useful_row_steps < engine.counts.row_steps


@pytest.mark.parametrize("lag", [0, 2])
def test_the_likeliest_tokens_are_the_references(tiny_checkpoint: Path, lag: int) -> None:
    engine = new_engine(tiny_checkpoint, slots=4, top_logprobs=8)
    engine._lag = lag
    options = {"model": str(tiny_checkpoint), "device": "cpu", "dtype": "float32", "max_new_tokens": 16}
    reference = create_engine(EngineConfig.model_validate(options | {"name": "reference", "top_logprobs": 8}))
    found, wanted = (hypotheses(each.submit(SEGMENTS[:9]).result(TIMEOUT_S)) for each in (engine, reference))
    engine.close()
    reference.close()
    for got, want in zip(found, wanted, strict=True):
        assert got.top_ids is not None and want.top_ids is not None and got.top_logprobs is not None
        assert got.top_ids.dtype == want.top_ids.dtype == np.int32
        assert got.top_ids.shape == got.top_logprobs.shape == (len(got.token_ids), 8)
        assert got.top_ids[:, 0].tolist() == got.token_ids
        assert got.top_logprobs[:, 0].tolist() == pytest.approx(got.token_logprobs, abs=1e-5)
        np.testing.assert_allclose(got.top_logprobs, want.top_logprobs, atol=1e-3)
        assert (np.diff(got.top_logprobs, axis=1) <= 0).all()


def test_rows_that_outgrow_their_cache_go_on(tiny_checkpoint: Path) -> None:
    """250 tokens for half a second: the cache begins with room for 37."""
    options: dict[str, Any] = {"max_new_tokens": 250, "max_new_tokens_per_s": 1e6}
    segments = [segment(0.5 + i / 10, i) for i in range(6)]
    reference = create_engine(
        EngineConfig(name="reference", model=str(tiny_checkpoint), device="cpu", dtype="float32", max_new_tokens=250)
    )
    engine = new_engine(tiny_checkpoint, slots=4, **options)
    found, wanted = (hypotheses(each.submit(segments).result(TIMEOUT_S)) for each in (engine, reference))
    engine.close()
    reference.close()
    assert max(len(each.token_ids) for each in found) > 100
    for got, want in zip(found, wanted, strict=True):
        if got.finish_reason == "repetition":
            assert got.token_ids == want.token_ids[: len(got.token_ids)]
        else:
            assert (got.token_ids, got.finish_reason) == (want.token_ids, want.finish_reason)


def test_a_runaway_ends_by_the_length_of_its_audio(tiny_checkpoint: Path) -> None:
    engine = new_engine(tiny_checkpoint, max_new_tokens=512, max_new_tokens_per_s=2.0)
    found = hypotheses(engine.submit([segment(1.0, 1), segment(10.0, 2)]).result(TIMEOUT_S))
    engine.close()
    for got, most in zip(found, [34, 52], strict=True):
        assert len(got.token_ids) == most and got.finish_reason == "length" or got.finish_reason == "repetition"


def saying(engine: OfflineEngine, monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    """The engine's decoder chooses `token` for every row at every step."""
    step = engine._decoder.step

    def constant(num_rows: int, length: int) -> Choice:
        choice = step(num_rows, length)
        return Choice(torch.full_like(choice.tokens, token), choice.logprobs, choice.top_logprobs, choice.top_ids)

    monkeypatch.setattr(engine._decoder, "step", constant)


def test_a_loop_ends_its_row_early_with_a_reason(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(tiny_checkpoint, max_new_tokens=512)
    saying(engine, monkeypatch, 40)
    (got,) = hypotheses(engine.submit([segment(20.0)]).result(TIMEOUT_S))
    engine.close()
    assert got.finish_reason == "repetition" and 48 <= len(got.token_ids) <= 51


def test_segments_that_cannot_run_fail_by_name_and_alone(engine: OfflineEngine) -> None:
    results = engine.submit(
        [
            segment(1, 1),
            segment(1, 2, "Klingon"),
            segment(1, 3, context="say <|audio_pad|>"),
            Segment("hours", np.zeros(1201 * SAMPLE_RATE_HZ, np.int16)),
            segment(2, 4),
        ]
    ).result(TIMEOUT_S)
    assert isinstance(results[0], Hypothesis) and isinstance(results[4], Hypothesis)
    failures = [result.code for result in results if isinstance(result, EngineFailure)]
    assert failures == ["unsupported_language", "bad_context", "segment_too_long"]


@pytest.mark.parametrize("place", ["encode", "prefill", "step"])
def test_a_segment_that_the_model_chokes_on_fails_alone(
    tiny_checkpoint: Path, expected: dict[str, Hypothesis], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    engine = new_engine(tiny_checkpoint, slots=4)
    poisoned = SEGMENTS[3]
    choke_on(engine, monkeypatch, place, poisoned, RuntimeError("bad kernel"))
    results = engine.submit(SEGMENTS[:10]).result(TIMEOUT_S)
    engine.close()
    assert results.pop(3) == EngineFailure(poisoned.segment_id, "engine_error", "RuntimeError: bad kernel")
    assert_same([each for each in SEGMENTS[:10] if each is not poisoned], results, expected)


@pytest.mark.parametrize("place", ["encode", "prefill", "step"])
def test_memory_that_runs_out_costs_nothing_but_the_segment_that_needs_more_than_there_is(
    tiny_checkpoint: Path, expected: dict[str, Hypothesis], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    engine = new_engine(tiny_checkpoint, slots=8)
    budget, poisoned = engine._budget, SEGMENTS[3]
    choke_on(engine, monkeypatch, place, poisoned, torch.OutOfMemoryError("injected"))
    results = engine.submit(SEGMENTS[:10]).result(TIMEOUT_S)
    engine.close()
    assert results.pop(3) == EngineFailure(poisoned.segment_id, "out_of_memory", "OutOfMemoryError: injected")
    assert_same([each for each in SEGMENTS[:10] if each is not poisoned], results, expected)
    assert engine._budget < budget or place == "encode"


def choke_on(
    engine: OfflineEngine, monkeypatch: pytest.MonkeyPatch, place: str, poisoned: Segment, error: Exception
) -> None:
    """`place` raises `error` whenever it is given `poisoned`."""
    if place == "encode":
        encode = engine._lane.encoder

        def encoding(audio: list[np.ndarray]) -> Any:
            if any(len(clip) == len(poisoned.pcm) for clip in audio):
                raise error
            return encode(audio)

        monkeypatch.setattr(engine._lane, "encoder", encoding)
        return
    if place == "prefill":
        embeddings = engine._prompts.embeddings

        def prefilling(rows: list[Any]) -> Any:
            if any(row.segment is poisoned for row in rows):
                raise error
            return embeddings(rows)

        monkeypatch.setattr(engine._prompts, "embeddings", prefilling)
        return
    step = engine._decoder.step

    def stepping(num_rows: int, length: int) -> Choice:
        if any(row is not None and row.segment is poisoned for row in engine._slots):
            raise error
        return step(num_rows, length)

    monkeypatch.setattr(engine._decoder, "step", stepping)


def test_a_bug_breaks_the_engine_and_every_future_hears_of_it(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(tiny_checkpoint, slots=2)

    def broken(*_: Any) -> Any:
        raise TypeError("ours")

    monkeypatch.setattr(SlotDecoder, "step", broken)
    futures = [engine.submit(SEGMENTS[:5]), engine.submit(SEGMENTS[5:9])]
    for future in futures:
        with pytest.raises(EngineError, match="the engine broke.*TypeError: ours"):
            future.result(TIMEOUT_S)
    with pytest.raises(EngineError, match="broke earlier"):
        engine.submit(SEGMENTS[:1])
    engine.close()


def test_nan_logits_are_a_failure_not_a_text(tiny_checkpoint: Path) -> None:
    engine = new_engine(tiny_checkpoint)
    with torch.no_grad():
        engine._loaded.model.thinker.model.norm.weight[0] = float("nan")
    (result,) = engine.submit([segment(1)]).result(TIMEOUT_S)
    engine.close()
    assert isinstance(result, EngineFailure) and result.code == "not_finite"


def test_a_cancelled_submission_frees_its_slots(
    tiny_checkpoint: Path, expected: dict[str, Hypothesis], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(tiny_checkpoint, slots=2, max_new_tokens=512, max_new_tokens_per_s=1e6)
    step = SlotDecoder.step

    def slow(self: SlotDecoder, *args: Any) -> Choice:
        time.sleep(0.005)
        return step(self, *args)

    monkeypatch.setattr(SlotDecoder, "step", slow)
    endless = engine.submit(SEGMENTS[:20])
    while not any(engine._slots):
        time.sleep(0.001)
    assert endless.cancel()
    with pytest.raises(CancelledError):
        endless.result(0)
    began = time.monotonic()
    assert len(engine.submit([segment(1.0)]).result(TIMEOUT_S)) == 1
    assert time.monotonic() - began < 20
    engine.close()
    assert not any(engine._slots) and not engine._lane.rows


def test_two_hundred_schedules_without_a_deadlock(engine: OfflineEngine, expected: dict[str, Hypothesis]) -> None:
    """Four threads submit, cancel and wait at random."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(50):
                chosen = rng.choices(SEGMENTS, k=rng.randrange(0, 4))
                future = engine.submit(chosen)
                if rng.random() < 0.3 and future.cancel():
                    continue
                assert_same(chosen, future.result(TIMEOUT_S), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT_S)
    assert not failures and not any(thread.is_alive() for thread in threads)


def test_an_observer_hears_of_all_audio(tiny_checkpoint: Path) -> None:
    batches: list[Batch] = []
    engine = new_engine(tiny_checkpoint, batches.append, slots=4)
    batches.clear()
    engine.submit(SEGMENTS[:12]).result(TIMEOUT_S)
    engine.close()
    assert sum(batch.audio_s for batch in batches) == pytest.approx(sum(each.duration_s for each in SEGMENTS[:12]))
    assert all(batch.audio_s <= batch.padded_s and batch.busy_s > 0 for batch in batches)
    assert batches[-1].num_waiting == 0


def test_slots_are_filled_as_soon_as_rows_end(tiny_checkpoint: Path) -> None:
    engine = new_engine(tiny_checkpoint, slots=8, max_new_tokens=40)
    engine.submit(SEGMENTS * 5).result(TIMEOUT_S)
    engine.close()
    counts = engine.counts
    assert counts.useful_row_steps / counts.row_steps > 0.9, counts


def test_info_says_what_runs(engine: OfflineEngine, tiny_checkpoint: Path) -> None:
    info = engine.info
    assert (info.engine, info.model_id, info.dtype) == ("offline", str(tiny_checkpoint), "float32")


def test_a_closed_engine_has_done_what_it_was_given_and_refuses(tiny_checkpoint: Path) -> None:
    engine = new_engine(tiny_checkpoint)
    pending = engine.submit([segment(1)])
    engine.close()
    hypotheses(pending.result(0))
    with pytest.raises(EngineError, match="after close"):
        engine.submit([segment(1)])
    engine.close()


def test_wrong_options_are_refused_at_the_start(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="'Elvish' is no language of this model"):
        new_engine(tiny_checkpoint, language="Elvish")
    with pytest.raises(ValueError, match="offline attends within windows"):
        new_engine(tiny_checkpoint, attention="published")
