"""The tower over streams against qwen3-asr-causal's, block by block, and against itself in one pass."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_asr.core.transformers_backend.configuration_qwen3_asr import Qwen3ASRAudioEncoderConfig
from qwen_asr.core.transformers_backend.modeling_qwen3_asr import Qwen3ASRAudioEncoder
from torch import Tensor

from pipeline.engine.causal.stream_mel import StreamAudio, StreamMel
from pipeline.engine.causal.tower import Geometry, StreamTower, encode_whole, position_embedding
from tests.engine.causal.recordings import joined
from tests.engine.causal.upstream import STUDENT, causal_encoder, tower_of

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def student() -> Any:
    return tower_of(STUDENT)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Any:
    return tower_of(tiny_checkpoint)


def random_tower(d_model: int, heads: int, layers: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen3ASRAudioEncoderConfig(
        d_model=d_model,
        encoder_attention_heads=heads,
        encoder_layers=layers,
        encoder_ffn_dim=2 * d_model,
        downsample_hidden_size=4,
        output_dim=d_model + 8,
    )
    tower = Qwen3ASRAudioEncoder._from_config(config, attn_implementation="sdpa").eval()
    for parameter in tower.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return tower


def mel_of(num_frames: int, seed: int = 0, batch: int = 1) -> Tensor:
    """[batch, num_frames, 128] in the range of log-mels."""
    return torch.randn(batch, num_frames, 128, generator=torch.Generator().manual_seed(seed)) * 0.6 - 0.3


def alone(tower: Any, geometry: Geometry, mel: Tensor) -> Tensor:
    """[T // 8, output_dim] of a stream that has a batch for itself; its last block need not be full."""
    stream, parts = StreamTower(tower, geometry, 1), []
    for block in mel.split(geometry.block_frames):
        steps = len(block) // 8
        padded = torch.zeros(1, geometry.block_frames, mel.shape[1])
        padded[0, : len(block)] = block
        parts.append(stream.encode([0], padded, [steps])[0, :steps])
    return torch.cat(parts)


@pytest.mark.parametrize("block_frames", [192, 96])
def test_ten_minutes_of_speech_are_those_of_upstream(student: Any, block_frames: int) -> None:
    """7,500 steps: the ring of 195 wraps 38 times, positions pass the table of 1,500."""
    audio, stream = StreamAudio(), StreamTower(student, Geometry(block_frames), 3)
    audio.append(joined("english", 600).pcm)
    audio.is_ended = True
    mel, _ = StreamMel(128, torch.device("cpu"))([audio.window(0, audio.num_frames)], [-math.inf])
    encoder = causal_encoder(student, block_frames)
    assert encoder.left_context_steps == stream.geometry.left_steps
    state, worst = encoder.init_state(), 0.0
    with torch.inference_mode():
        for block in mel.split(block_frames, dim=1):
            want, state = encoder.forward_chunk(block, state)
            if block.shape[1] == block_frames:
                got = stream.encode([1], block)
                worst = max(worst, float((got - want).abs().max()))
                assert want.abs().max() > 0.5, "not compared with nothing"
    assert state.emitted_steps == stream.num_steps[1] == 60_000 // block_frames * block_frames // 8 > 7400
    assert worst < TOLERANCE


@settings(max_examples=12, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([4, 8, 18]),
    layers=st.integers(1, 3),
    block_frames=st.sampled_from([8, 96, 192, 200]),
    left_frames=st.integers(210, 1500),
    num_blocks=st.integers(1, 20),
    tail=st.integers(0, 191),
    seed=st.integers(0, 99),
)
def test_random_shapes_are_those_of_upstream(
    heads: int,
    head_dim: int,
    layers: int,
    block_frames: int,
    left_frames: int,
    num_blocks: int,
    tail: int,
    seed: int,
) -> None:
    """With a last block that is not full."""
    tower = random_tower(heads * head_dim, heads, layers, seed)
    encoder = causal_encoder(tower, block_frames, left_frames)
    mel = mel_of(num_blocks * block_frames + min(tail, block_frames - 1), seed)
    with torch.inference_mode():
        want, state = encoder.forward_chunk(mel, encoder.init_state())
        rest, _ = encoder.flush_pending(state)
    want = torch.cat([want, rest[..., : want.shape[-1]]], dim=1) if rest.shape[1] else want
    got = alone(tower, Geometry(block_frames, encoder.left_context_steps), mel[0])
    torch.testing.assert_close(got, want[0], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("seed", range(4))
def test_streams_of_all_ages_join_and_leave_and_do_not_meet(tiny: Any, seed: int) -> None:
    rng, geometry = random.Random(seed), Geometry(96, 30)
    lengths = [rng.randrange(8, 1500) for _ in range(40)]
    waiting = [mel_of(length, 1000 * seed + i)[0] for i, length in enumerate(lengths)]
    want = [alone(tiny, geometry, mel) for mel in waiting]
    stream = StreamTower(tiny, geometry, 7)
    holders: dict[int, tuple[int, int]] = {}  # slot -> recording, frames done
    found: list[list[Tensor]] = [[] for _ in waiting]
    todo = list(range(len(waiting)))
    while todo or holders:
        for slot in set(range(7)) - set(holders):
            if todo and rng.random() < 0.7:
                holders[slot] = (todo.pop(), 0)
                stream.reset([slot])
        slots = [slot for slot in holders if rng.random() < 0.6]
        rng.shuffle(slots)
        mel, steps = torch.full((len(slots), 96, 128), float("nan")), []
        for row, slot in enumerate(slots):
            recording, done = holders[slot]
            block = waiting[recording][done : done + 96]
            mel[row] = 0.0
            mel[row, : len(block)] = block
            steps.append(len(block) // 8)
            holders[slot] = recording, done + 96
        if not slots:
            continue
        embeddings = stream.encode(slots, mel, steps)
        for slot, row, count in zip(slots, embeddings, steps, strict=True):
            recording, done = holders[slot]
            found[recording].append(row[:count])
            if done >= lengths[recording]:
                del holders[slot]
    for parts, one in zip(found, want, strict=True):
        torch.testing.assert_close(torch.cat(parts), one, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("geometry", [Geometry(192), Geometry(96), Geometry(96, 12), Geometry(192, 188)], ids=str)
def test_one_pass_gives_what_streams_give(tiny: Any, geometry: Geometry) -> None:
    clips = [mel_of(length, length)[0] for length in (2500, 1111, 64)]
    num_steps = torch.tensor([len(clip) // 8 for clip in clips])
    mel = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    with torch.no_grad():
        whole = encode_whole(tiny, mel, geometry, num_steps=num_steps)
    for row, count, clip in zip(whole, num_steps.tolist(), clips, strict=True):
        torch.testing.assert_close(row[:count], alone(tiny, geometry, clip), atol=2e-5, rtol=1e-4)


def test_one_pass_may_begin_at_any_position(tiny: Any) -> None:
    geometry, mel = Geometry(96), mel_of(400, batch=2)
    with torch.no_grad():
        at = encode_whole(tiny, mel, geometry, torch.tensor([0, 5990]))
        torch.testing.assert_close(at[0], encode_whole(tiny, mel, geometry)[0])
        assert (at[1] - encode_whole(tiny, mel, geometry)[1]).abs().max() > 0.1


def test_gradients_reach_every_weight_and_keep_to_their_clip(tiny: Any) -> None:
    tower = copy.deepcopy(tiny).train()
    mel = mel_of(400, batch=2).requires_grad_()
    found = encode_whole(tower, mel, Geometry(96, 12), num_steps=torch.tensor([50, 10]))
    (found[0].square().sum() + found[1, :10].square().sum()).backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in tower.parameters())
    assert mel.grad is not None and mel.grad[1, :80].any() and not mel.grad[1, 80:].any()


def test_positions_go_on_beyond_the_table_by_its_formula(student: Any) -> None:
    table = student.positional_embedding.positional_embedding
    torch.testing.assert_close(position_embedding(torch.arange(1500), table.shape[1]), table, atol=1e-6, rtol=0)
    beyond = position_embedding(torch.tensor([[1500, 100_000]]), table.shape[1])
    assert beyond.shape == (1, 2, table.shape[1]) and beyond.abs().max() <= 1


@pytest.mark.parametrize(("block_frames", "left_steps"), [(0, 195), (100, 195), (192, 23)])
def test_a_geometry_that_makes_no_sense_is_refused(block_frames: int, left_steps: int) -> None:
    with pytest.raises(ValueError, match="block"):
        Geometry(block_frames, left_steps)
