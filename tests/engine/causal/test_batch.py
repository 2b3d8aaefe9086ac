"""Many streams at once: whatever meets in a batch, each says what it says alone; and what goes wrong stays its own."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.engine.causal.batch import StreamBatch
from pipeline.engine.causal.commit import CommitPolicy
from pipeline.engine.causal.roll import RollPolicy
from pipeline.engine.causal.settings import Settings
from pipeline.engine.causal.state import Resume, StreamError, Update
from pipeline.engine.causal.tower import Geometry
from pipeline.engine.model import LoadedModel
from tests.engine.causal.streams import at_random, loaded_from, run, text_of, transcribed
from tests.engine.tiny import noise

SETTINGS = Settings(
    Geometry(96, 40),
    CommitPolicy(2),
    RollPolicy(2.0, 4.0, "mark"),
    max_new_tokens=24,
    slots=64,
    max_waiting_s=1e6,
)
SECONDS = [9.1, 0.3, 4.0, 0.0, 13.37, 0.96, 0.0125, 6.05, 2.2, 7.7]


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return loaded_from(tiny_checkpoint)


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [noise(SECONDS[i % len(SECONDS)] * (1 + i / 100), i) for i in range(30)]


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel, clips: list[np.ndarray]) -> list[list[Update]]:
    """What each says alone."""
    return [transcribed(StreamBatch(loaded, SETTINGS), [clip])[0] for clip in clips]


def assert_same(found: list[list[Update]], expected: list[list[Update]]) -> None:
    for got, want in zip(found, expected, strict=True):
        assert [replace(update, stream_id="", segment=None, resume=None) for update in got] == [
            replace(update, stream_id="", segment=None, resume=None) for update in want
        ]
        for one, other in zip(got, want, strict=True):
            if one.segment is None or other.segment is None:
                assert one.segment is other.segment
                continue
            assert one.segment.token_logprobs == pytest.approx(other.segment.token_logprobs, abs=1e-3)
            assert replace(one.segment, token_logprobs=[]) == replace(other.segment, token_logprobs=[])


def test_they_say_something(expected: list[list[Update]]) -> None:
    texts = [text_of(updates) for updates in expected]
    assert len({text for text in texts if text}) > 15
    segments = [update.segment for updates in expected for update in updates if update.segment]
    assert {segment.why for segment in segments} >= {"cap", "end"}
    assert all(updates[-1].is_last for updates in expected)


@pytest.mark.parametrize("seed", range(3))
def test_no_batch_changes_a_text(
    loaded: LoadedModel, clips: list[np.ndarray], expected: list[list[Update]], seed: int
) -> None:
    """Random joins, leaves and chunk sizes, from one sample to many blocks."""
    rng = random.Random(seed)
    settings = replace(SETTINGS, slots=rng.choice([3, 8, 40]), batch=rng.choice([1, 5, 64]))
    batch = StreamBatch(loaded, settings)
    assert_same(at_random(batch, clips, rng), expected)
    assert len(batch) == batch.num_in_slots == batch.num_waiting == 0


@pytest.mark.parametrize("slots", [1, 2, 30])
def test_more_streams_than_slots_wait_for_one(
    loaded: LoadedModel, clips: list[np.ndarray], expected: list[list[Update]], slots: int
) -> None:
    batch = StreamBatch(loaded, replace(SETTINGS, slots=slots))
    assert_same(transcribed(batch, clips), expected)


@pytest.mark.parametrize("seed", range(2))
def test_a_stalled_stream_makes_room_and_goes_on_where_it_was(
    loaded: LoadedModel, clips: list[np.ndarray], expected: list[list[Update]], seed: int
) -> None:
    """With a clock by which every stream has stalled whenever it has nothing to do."""
    rng = random.Random(seed)
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    batch = StreamBatch(loaded, replace(SETTINGS, slots=2, park_after_s=0.0), clock)
    assert_same(at_random(batch, clips, rng), expected)


def test_a_stream_that_stalls_holds_nobody_up(loaded: LoadedModel) -> None:
    now = [0.0]
    batch = StreamBatch(loaded, replace(SETTINGS, slots=1), lambda: now[0])
    stalled, other = batch.open("stalled"), batch.open("other")
    pcm = noise(3.0, 1)
    batch.push(stalled, pcm)
    run(batch)
    batch.push(other, pcm)
    batch.end(other)
    assert not batch.has_work and batch.num_waiting == 1 and batch.turn() == []
    now[0] = SETTINGS.park_after_s
    said = run(batch)["other"]
    assert said[-1].is_last
    batch.end(stalled)
    assert run(batch)["stalled"][-1].is_last and len(batch) == 0


def test_text_is_the_plain_greedy_one(loaded: LoadedModel, clips: list[np.ndarray]) -> None:
    """Without the last hypothesis as a draft, tokens are the same."""
    batch, plain = StreamBatch(loaded, SETTINGS), StreamBatch(loaded, SETTINGS)
    addition = plain._addition

    def without_draft(stream: Any) -> Any:
        stream.segment.draft = []
        return addition(stream)

    plain._addition = without_draft  # type: ignore[method-assign]
    assert_same(transcribed(batch, clips), transcribed(plain, clips))


def test_torchs_attention_gives_the_same_as_that_of_a_cpu(
    loaded: LoadedModel, clips: list[np.ndarray], expected: list[list[Update]]
) -> None:
    """It is what steps take on CUDA."""
    batch = StreamBatch(loaded, replace(SETTINGS, slots=5))
    batch._decoder._attends_on_cpu = False
    assert_same(transcribed(batch, clips), expected)


def test_segments_tile_the_stream_and_texts_are_whats_published(expected: list[list[Update]], clips: Any) -> None:
    for updates, clip in zip(expected, clips, strict=True):
        segments = [update.segment for update in updates if update.segment]
        at = 0.0
        for number, segment in enumerate(segments):
            assert (segment.index, segment.offset_s) == (number, pytest.approx(at))
            at += segment.duration_s
        assert at == pytest.approx(len(clip) // 160 / 100, abs=0.08) or len(clip) <= 200
        assert "".join("".join(segment.text.split()) for segment in segments) == "".join(text_of(updates).split())


def test_a_stream_goes_on_after_an_interruption(loaded: LoadedModel) -> None:
    """At the start of its open segment: nothing is said twice, nothing is lost."""
    pcm, language = noise(14.0, 4), "English"
    (want,) = transcribed(StreamBatch(loaded, SETTINGS), [pcm], language)
    for stop_after in range(1, len(want)):
        batch = StreamBatch(loaded, SETTINGS)
        stream = batch.open("0", language)
        batch.push(stream, pcm)
        batch.end(stream)
        said: list[Update] = []
        while len(said) < stop_after:
            said += batch.turn()
        resume = stream.resume
        assert stream.num_heard * 160 - resume.first_sample <= 4.0 * 16_000 + 200, "at most a segment is heard again"
        later = StreamBatch(loaded, SETTINGS)
        again = later.open("0", language, resume=resume)
        later.push(again, pcm[resume.first_sample :])
        later.end(again)
        rest = run(later)["0"]
        texts = [update.segment.text for update in [*said, *rest] if update.segment]
        assert texts == [update.segment.text for update in want if update.segment]
        assert text_of([*said, *rest]) == text_of(want)


def test_a_new_stream_resumes_at_its_start() -> None:
    assert Resume().first_sample == 0


@pytest.mark.parametrize(
    ("chunk", "rate", "code", "said"),
    [
        (np.zeros(100, np.float32), 16_000, "bad_audio", r"float32 \[100\]"),
        (np.full(100, np.nan), 16_000, "bad_audio", "float64"),
        (np.zeros((2, 100), np.int16), 16_000, "bad_audio", r"int16 \[2, 100\]"),
        ([0] * 100, 16_000, "bad_audio", "list"),
        (np.zeros(100, np.int16), 8_000, "wrong_rate", "8000 Hz"),
        (np.zeros(17 * 16_000, np.int16), 16_000, "overrun", "16.0 s waiting"),
    ],
)
def test_a_chunk_that_cannot_be_is_refused_by_name_and_leaves_no_trace(
    loaded: LoadedModel, chunk: Any, rate: int, code: str, said: str
) -> None:
    batch = StreamBatch(loaded, replace(SETTINGS, max_waiting_s=16.0))
    pcm = noise(3.0, 2)
    (want,) = transcribed(StreamBatch(loaded, SETTINGS), [pcm])
    stream = batch.open("0", "English")
    batch.push(stream, pcm[:20_000])
    with pytest.raises(StreamError, match=said) as refused:
        batch.push(stream, chunk, rate)
    assert refused.value.code == code
    batch.push(stream, pcm[20_000:])
    batch.end(stream)
    with pytest.raises(StreamError, match="has ended"):
        batch.push(stream, pcm)
    assert text_of(run(batch)["0"]) == text_of(want)


def test_streams_are_opened_by_name_and_only_so_many(loaded: LoadedModel) -> None:
    batch = StreamBatch(loaded, replace(SETTINGS, max_streams=2))
    first = batch.open("a")
    with pytest.raises(StreamError, match="open already"):
        batch.open("a")
    batch.open("b", "Chinese")
    with pytest.raises(StreamError, match="too_many_streams"):
        batch.open("c")
    batch.drop(first)
    for language, context, code in (("Klingon", "", "unsupported_language"), (None, "<|audio_pad|>", "bad_context")):
        with pytest.raises(StreamError) as refused:
            batch.open("c", language, context)
        assert refused.value.code == code
    batch.open("c", context="a word " * 300)  # which needs wider slots
    batch.push(batch._streams["c"], noise(2.0))
    assert run(batch)["c"]


@pytest.mark.parametrize("place", ["encode", "extend", "step"])
def test_what_one_stream_breaks_breaks_no_other(
    loaded: LoadedModel, clips: list[np.ndarray], expected: list[list[Update]], place: str
) -> None:
    batch = StreamBatch(loaded, SETTINGS)
    part = {"encode": batch._tower, "extend": batch._decoder, "step": batch._decoder}[place]
    work = getattr(part, place)

    def choking(first: Any, *rest: Any) -> Any:
        slots = [each if isinstance(each, int) else each.slot for each in first]
        holders = [batch._slots.holders[slot] for slot in slots]
        if any(holder is not None and holder.stream_id == "4" for holder in holders):
            raise RuntimeError("bad kernel")
        return work(first, *rest)

    setattr(part, place, choking)
    found = transcribed(batch, clips)
    (last,) = [update for update in found[4] if update.error]
    assert last.error is not None and (last.error.code, last.error.segment_id) == ("engine_error", "4")
    assert_same(found[:4] + found[5:], expected[:4] + expected[5:])


def test_nan_logits_fail_their_stream_by_name(
    loaded: LoadedModel, clips: list[np.ndarray], expected: list[list[Update]]
) -> None:
    """Few slots, which others have after them."""
    batch = StreamBatch(loaded, replace(SETTINGS, slots=3))
    encode = batch._tower.encode

    def poisoned(slots: Any, mel: torch.Tensor, steps: Any) -> torch.Tensor:
        mel = mel.clone()
        for row, slot in zip(mel, slots, strict=True):
            holder = batch._slots.holders[slot]
            if holder is not None and holder.stream_id in ("0", "7"):
                row.fill_(float("nan"))
        return encode(slots, mel, steps)

    batch._tower.encode = poisoned  # type: ignore[method-assign]
    found = transcribed(batch, clips)
    for number, (got, want) in enumerate(zip(found, expected, strict=True)):
        if number in (0, 7):
            assert [update.error.code for update in got if update.error] == ["not_finite"]
        else:
            assert_same([got], [want])


def test_clipped_and_constant_audio_is_heard_and_harms_nobody(
    loaded: LoadedModel, clips: list[np.ndarray], expected: list[list[Update]]
) -> None:
    """At full scale, as a broken line gives it, and with gaps of nothing."""
    size = 5 * 16_000
    odd = [
        np.full(size, 32767, np.int16),
        np.full(size, -32768, np.int16),
        np.where(np.arange(size) % 80 < 40, 32767, -32768).astype(np.int16),
        np.where(np.arange(size) // 8000 % 2, noise(5.0, 77), 0).astype(np.int16),
        np.eye(1, size, 100, dtype=np.int16)[0] * 32767,
    ]
    said = transcribed(StreamBatch(loaded, SETTINGS), [*odd, *clips[:5]])
    for updates in said[: len(odd)]:
        assert updates[-1].is_last and not any(update.error for update in updates)
        assert updates[-1].heard_s == pytest.approx(5.0, abs=0.08)
    assert_same(said[len(odd) :], expected[:5])


def test_thousands_that_end_at_once(loaded: LoadedModel) -> None:
    batch = StreamBatch(loaded, replace(SETTINGS, slots=64, batch=64, max_new_tokens=3))
    pcm, streams = noise(0.5, 3), []
    for number in range(2000):
        stream = batch.open(str(number), "English")
        batch.push(stream, pcm)
        streams.append(stream)
    assert not batch.has_work, "half a block of each"
    for stream in streams:
        batch.end(stream)
    said = run(batch)
    assert len(said) == 2000 and len({text_of(updates) for updates in said.values()}) == 1
    assert all(updates[-1].is_last for updates in said.values()) and len(batch) == 0


def test_an_hour_of_silence_takes_no_memory(loaded: LoadedModel) -> None:
    """What is held of a stream is its open segment's audio, and counters."""
    batch = StreamBatch(loaded, replace(SETTINGS, max_new_tokens=2))
    stream = batch.open("0", "English")
    minute = np.zeros(60 * 16_000, np.int16)
    num_segments = 0
    for _ in range(60):
        batch.push(stream, minute)
        while batch.has_work:
            num_segments += sum(update.segment is not None for update in batch.turn())
        assert stream.audio.num_bytes <= 2 * 16_000 * (4.0 + 1.0)
        assert len(stream.segment.committer.published) < 50 and len(stream.segment.token_ids) <= 2
    assert num_segments >= 899 and stream.heard_s > 3598
