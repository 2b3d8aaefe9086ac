"""Replays under the streaming contract: the clock, what is published and when, and what is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config import EngineConfig
from pipeline.engine.causal.batch import StreamBatch
from pipeline.engine.causal.commit import CommitPolicy
from pipeline.engine.causal.roll import RollPolicy
from pipeline.engine.causal.settings import Settings
from pipeline.engine.causal.tower import Geometry
from pipeline.engine.cpu_attention import attend
from pipeline.engine.flops import FlopMeter
from pipeline.engine.model import LoadedModel
from pipeline.evaluate import streaming_report as report
from pipeline.evaluate.contract import Contract, Update, without_tail
from pipeline.evaluate.replay import Minute, Talk, count, counted_minutes, measure, replay
from pipeline.evaluate.streaming_systems import CausalSystem, OfflineSystem
from tests.engine.causal.streams import loaded_from, text_of, transcribed
from tests.engine.tiny import noise

SECOND = 16_000
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
SENTENCES = [{"text": " ".join(WORDS), "offset": 0.0, "duration": 8.0}]


class Clock:
    """Seconds of work that fakes do."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """Says the words of each second of audio once it is over, after `work_s` (of the number of the chunk) of work."""

    name = "fake"
    about: dict[str, Any] = {}

    def __init__(self, clock: Clock, work_s: Callable[[int], float] = lambda _: 0.0) -> None:
        self.lm_head = nn.Linear(4, 8, bias=False)
        self._clock, self._work_s = clock, work_s

    def begin(self, language: str) -> None:
        self.num_samples = self.num_chunks = 0

    def hear(self, pcm: np.ndarray) -> list[Update]:
        self._clock.now += self._work_s(self.num_chunks)
        self.num_chunks += 1
        self.num_samples += len(pcm)
        with torch.no_grad():
            self.lm_head(torch.ones(3, 4))
        return [self.update(self.num_samples // SECOND)] if self.num_samples % SECOND == 0 else []

    def end(self) -> list[Update]:
        self._clock.now += 2.0
        return [replace(self.update(len(WORDS)), is_final=True)]

    def update(self, seconds: int) -> Update:
        return Update(0.0, float(seconds), " ".join(WORDS[:seconds]), word_ends_s=self.ends(seconds))

    def ends(self, seconds: int) -> list[float]:
        return [second - 0.3 for second in range(1, seconds + 1)]


def talk(seconds: float = 8.0, sentences: Any = SENTENCES) -> Talk:
    return Talk("talk", "English", " ".join(WORDS), np.zeros(int(seconds * SECOND), np.int16), sentences)


def published_at(found: Fake, clock: Clock) -> list[float]:
    """When the words of a talk come out."""
    result = replay(found, talk(), 1.0, clock)
    assert result.text == " ".join(WORDS) and result.errors.rate == 0
    spoken = np.cumsum([len(word) for word in WORDS]) / len("".join(WORDS)) * 8
    assert result.latencies_s is not None
    return [round(float(latency + end), 6) for latency, end in zip(result.latencies_s, spoken, strict=True)]


def test_work_begins_when_its_audio_is_there_and_what_came_before_is_done() -> None:
    clock = Clock()
    assert published_at(Fake(clock), clock) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert published_at(Fake(clock, lambda _: 0.25), clock) == [1.25, 2.25, 3.25, 4.25, 5.25, 6.25, 7.25, 8.25]
    stalls = Fake(clock, lambda number: 3.5 if number == 1 else 0.5)
    assert published_at(stalls, clock) == [1.5, 5.5, 6, 6.5, 7, 7.5, 8, 8.5], (
        "3.5 s behind, it catches up half a s each"
    )


def test_time_is_by_minute_and_the_end_is_its_own() -> None:
    clock = Clock()
    result = replay(Fake(clock, lambda number: 0.5 if number < 60 else 0.25), talk(90.0), 1.0, clock)
    assert [(minute.audio_s, minute.compute_s) for minute in result.minutes] == [(60.0, 30.0), (30.0, 7.5)]
    assert result.end_s == 2.0 and result.rtf == pytest.approx(39.5 / 90)
    assert (
        all(minute.rss_bytes > 1e7 for minute in result.minutes)
        and result.peak_rss_bytes >= result.minutes[0].rss_bytes
    )


def test_words_that_end_in_the_newest_250_ms_come_with_the_next_update() -> None:
    class Late(Fake):
        def ends(self, seconds: int) -> list[float]:
            return [second - 0.2 for second in range(1, seconds + 1)]

    clock = Clock()
    assert published_at(Late(clock), clock) == [2, 3, 4, 5, 6, 7, 8, 10.0], "the last one with the end"


def test_what_was_rewritten_is_counted_and_not_shown() -> None:
    class Rewrites(Fake):
        def update(self, seconds: int) -> Update:
            said = super().update(seconds)
            return replace(said, text=said.text.replace("two", "too")) if seconds in (4, 5) else said

    clock = Clock()
    result = replay(Rewrites(clock), talk(), 1.0, clock)
    assert (result.num_retractions, result.num_refused, result.num_updates) == (2, 2, 9)
    assert result.text == " ".join(WORDS) and result.errors.rate == 0

    class Retracts(Fake):
        def end(self) -> list[Update]:
            return [Update(0.0, 8.0, "one two four", is_final=True)]

    result = replay(Retracts(clock), talk(), 1.0, clock)
    assert (result.num_retractions, result.num_refused) == (1, 0), "the last update counts, too"
    assert result.text.startswith(" ".join(WORDS))


def test_a_system_may_hold_back_more_than_the_contract() -> None:
    held = Update(3.0, 3.0, "one two three", held_from=3)
    assert held.offered == "one" and without_tail(held) == "one"
    assert without_tail(replace(held, word_ends_s=[2.8, 2.9, 3.0])) == "", "and the contract more than a system"
    assert Contract().take(replace(held, is_final=True)) == "one two three", "the end flushes"


def test_operations_are_counted_in_some_minutes_by_a_second_pass() -> None:
    clock = Clock()
    meters = count(Fake(clock), talk(180.0), [0, 2], 1.0)
    a_chunk = 2 * 3 * 4 * 8
    assert {number: (meter.total, meter.lm_head) for number, meter in meters.items()} == {
        0: (60 * a_chunk, 60 * a_chunk),
        2: (60 * a_chunk, 60 * a_chunk),
    }
    assert counted_minutes(61, 60, 10) == [0, 9, 19, 29, 39, 49, 59]
    assert counted_minutes(1, 0, 10) == [0] and counted_minutes(3, 2, 10) == [0, 1]
    found = measure(Fake(Clock()), talk(130.0))
    assert [minute.flops for minute in found.minutes] == [600 * a_chunk, 600 * a_chunk, None]


def test_flat_is_flat() -> None:
    flat = report.flatness([2.0, 2.0, 2.0])
    assert flat is not None and (flat.first, flat.drift, flat.spread) == (2.0, pytest.approx(0), 0.0)
    rising = report.flatness([1.0, 2.0, 3.0])
    assert rising is not None and (rising.drift, rising.spread) == (pytest.approx(1.0), 1.0)
    assert report.flatness([1.0]) is None
    assert report.computes_of([Minute(60.0, flops=int(6e10), lm_head_flops=int(6e9)), Minute(60.0)]) == [
        report.Compute(1, 1.0, 0.1)
    ]


# operations of the engines' own forwards


def test_attention_of_a_decode_step_is_counted_by_what_each_row_has_filled() -> None:
    queries, cache = torch.randn(2, 3, 2, 8), torch.randn(4, 3, 32, 8)
    positions, slots = torch.tensor([4, 9]), torch.tensor([3, 1])
    want = attend(queries, cache, cache, positions, slots)
    with (meter := FlopMeter(nn.Linear(1, 1))), torch.inference_mode():
        got = attend(queries, cache, cache, positions, slots)
    assert torch.equal(got, want)
    assert meter.total == 4 * (5 + 10) * 3 * 2 * 8 and meter.lm_head == 0


def test_attention_convolutions_and_the_output_layer_are_counted() -> None:
    head = nn.Linear(16, 50, bias=False)
    with (meter := FlopMeter(head)), torch.inference_mode():
        q = torch.randn(1, 2, 5, 8)
        nn.functional.scaled_dot_product_attention(q, q, q)
        head(torch.randn(3, 16))
        nn.functional.linear(torch.randn(7, 16), torch.randn(4, 16), torch.randn(4))
    attention, output, other = 2 * (2 * 2 * 5 * 5 * 8), 2 * 3 * 16 * 50, 2 * 7 * 16 * 4
    assert (meter.total, meter.lm_head) == (attention + output + other, output)
    if torch.backends.mkldnn.is_available():
        convolution = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        x = torch.randn(1, 2, 8, 6).contiguous(memory_format=torch.channels_last)
        arguments = convolution.padding, convolution.stride, convolution.dilation, 1, "gelu", [], "none"
        with (meter := FlopMeter(head)), torch.inference_mode():
            y = torch.ops.mkldnn._convolution_pointwise(x, convolution.weight, convolution.bias, *arguments)
        assert meter.total == 2 * y.numel() * 2 * 3 * 3
    before = meter.total
    with meter, torch.inference_mode():
        head(torch.randn(1, 16))
    assert meter.total == before + 2 * 16 * 50, "a meter goes on where it was"


SETTINGS = Settings(Geometry(96, 40), CommitPolicy(2), RollPolicy(2.0, 4.0), max_new_tokens=24, slots=1)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return loaded_from(tiny_checkpoint)


def test_operations_of_a_block_are_those_of_its_layers(loaded: LoadedModel) -> None:
    """By hand, for the first block of a stream: the tower on 12 steps, the text layers on the prompt and on each token
    that is decoded after it."""
    config = loaded.model.thinker.config
    audio, text = config.audio_config, config.text_config
    system = CausalSystem("ours", loaded, SETTINGS, loaded.info)
    system.begin("English")
    block, pcm = 96 * 160 + 200, noise(2.0)
    with (meter := FlopMeter(system.lm_head)):
        (update,) = system.hear(pcm[: block + 100])
    (stream,) = system._batch._streams.values()
    steps, d = 12, audio.d_model
    tower = audio.encoder_layers * (2 * steps * (4 * d * d + 2 * d * audio.encoder_ffn_dim) + 4 * steps * steps * d)
    tower += 2 * steps * (d * d + d * audio.output_dim)
    channels, mels = audio.downsample_hidden_size, audio.num_mel_bins
    at = [(8, mels, 1), (4, mels // 2, channels), (2, mels // 4, channels), (1, mels // 8, channels)]
    for (frames, _, inputs), (halves, half_mels, outputs) in zip(at, at[1:], strict=False):
        tower += 2 * steps * half_mels * (3 * frames * inputs) * (halves * outputs)
    tower += 2 * steps * (channels * mels // 8) * d
    hidden, head_dim = text.hidden_size, text.head_dim
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    qkv, out = hidden * (heads + 2 * kv_heads) * head_dim, heads * head_dim * hidden
    mlp, output = 3 * hidden * text.intermediate_size, hidden * text.vocab_size
    prompt = len(stream.prompt.head) + steps + len(stream.prompt.tail)
    said = len(stream.segment.token_ids)
    rounded, layers = -(-prompt // 64) * 64, text.num_hidden_layers
    prefill = layers * 2 * prompt * qkv + (layers - 1) * 2 * prompt * (out + mlp) + 2 * (out + mlp)
    prefill += 4 * rounded * heads * head_dim * ((layers - 1) * prompt + 1)
    steps_of_decoding = range(prompt, prompt + said - 1)
    decode = sum(layers * (2 * (qkv + out + mlp) + 4 * (at + 1) * heads * head_dim) for at in steps_of_decoding)
    assert meter.lm_head == 2 * said * output
    mel = meter.total - tower - prefill - decode - meter.lm_head
    frames = 96
    assert mel == 2 * frames * 201 * mels, "the filters of the log-mel; its Fourier transform is not counted"


def test_our_engine_never_takes_back_a_word(loaded: LoadedModel) -> None:
    pcm = noise(30.0, 5)
    system = CausalSystem("ours", loaded, SETTINGS, loaded.info)
    found = measure(system, replace(talk(), pcm=pcm), None)
    (updates,) = transcribed(StreamBatch(loaded, replace(SETTINGS, max_waiting_s=1e6)), [pcm])
    assert found.text == text_of(updates).rstrip() and found.text
    assert (found.num_retractions, found.num_refused) == (0, 0) and found.num_updates > 20
    again = measure(system, replace(talk(), pcm=pcm), None)
    assert again.text == found.text


def test_the_end_of_a_segment_keeps_its_newest_250_ms_until_the_next_update(loaded: LoadedModel) -> None:
    system = CausalSystem("ours", loaded, SETTINGS, loaded.info)
    system.begin("English")
    pcm = noise(12.0, 5)
    updates = [update for at in range(0, len(pcm), 1600) for update in system.hear(pcm[at : at + 1600])]
    updates += system.end()
    assert [update.is_final for update in updates] == [False] * (len(updates) - 1) + [True]
    for update in updates:
        assert 0 <= update.open_s <= 4.0 + 0.96 and update.open_from <= len(update.text)
    before = [update.held_from or 0 for update in updates]
    assert before == sorted(before)


def test_the_offline_engine_is_the_ceiling_and_has_no_latency(tiny_checkpoint: Path) -> None:
    config = EngineConfig(model=str(tiny_checkpoint), dtype="float32", device="cpu", threads=1, max_new_tokens=6)
    system = OfflineSystem("offline", config)
    found = system.measure(replace(talk(), pcm=noise(70.0, 3)))
    system.close()
    assert found.latencies_s is None and len(found.minutes) == 2
    assert found.minutes[0].flops and found.minutes[0].lm_head_flops
    assert found.minutes[0].flops > found.minutes[0].lm_head_flops
