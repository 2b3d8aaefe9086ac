"""The batched audio tower against qwen-asr's own, clip by clip."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from qwen_asr.core.transformers_backend import Qwen3ASRForConditionalGeneration
from qwen_asr.core.transformers_backend.modeling_qwen3_asr import _get_feat_extract_output_lengths
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.engine.graphs import WindowGraphs
from pipeline.engine.reference import install_windowed_attention
from pipeline.engine.windowed import encode, num_audio_tokens, transformer

LENGTHS = [5, 7, 8, 9, 50, 96, 97, 99, 100, 101, 104, 199, 200, 201, 799, 800, 801, 850, 900, 1600, 1999, 2000]


@pytest.fixture(scope="module")
def tower(tiny_checkpoint: Path) -> Any:
    model = Qwen3ASRForConditionalGeneration.from_pretrained(tiny_checkpoint, attn_implementation="sdpa")
    tower = model.thinker.audio_tower.eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in tower.parameters():
        if parameter.dim() == 1:  # zero and one in a new model: a bias that is lost or seen twice would not show
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return tower


@pytest.fixture(scope="module")
def upstream(tower: Any) -> Any:
    """A copy that attends within windows; `encode` reads the untouched one."""
    windowed = copy.deepcopy(tower)
    install_windowed_attention(windowed)
    return windowed


def mel_of(num_frames: int, seed: int = 0) -> Tensor:
    """[num_frames, 128] in the range of log-mels."""
    return torch.randn(num_frames, 128, generator=torch.Generator().manual_seed(1000 * seed + num_frames)) * 0.6 - 0.3


def padded(clips: list[Tensor]) -> tuple[Tensor, Tensor]:
    return pad_sequence(clips, batch_first=True).transpose(1, 2), torch.tensor([len(clip) for clip in clips])


def alone(upstream: Any, clip: Tensor) -> Tensor:
    """qwen-asr's embeddings of a clip [num_tokens, output_dim]; it runs its tower on one clip at a time."""
    states: Tensor = upstream(clip.T, feature_lens=torch.tensor([len(clip)])).last_hidden_state
    return states


def check(tower: Any, upstream: Any, lengths: list[int]) -> None:
    clips = [mel_of(length, seed) for seed, length in enumerate(lengths)]
    with torch.no_grad():
        embeds, num_tokens = encode(tower, *padded(clips))
        for row, count, clip in zip(embeds, num_tokens.tolist(), clips, strict=True):
            expected = alone(upstream, clip)
            assert count == len(expected)
            assert expected.abs().max() > 0.1, "not compared with nothing"
            torch.testing.assert_close(row[:count], expected, atol=1e-4, rtol=1e-4, msg=lambda m: f"{lengths}: {m}")


@pytest.mark.parametrize("length", LENGTHS)
def test_a_clip_alone_is_that_of_qwen_asr(tower: Any, upstream: Any, length: int) -> None:
    check(tower, upstream, [length])


def test_clips_of_all_lengths_in_one_batch(tower: Any, upstream: Any) -> None:
    check(tower, upstream, LENGTHS)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(5, 99) | st.integers(5, 900) | st.integers(5, 2000), min_size=1, max_size=4))
@example([99, 100])
@example([5, 2000, 13])
@example([800, 801, 799])
def test_no_batch_changes_a_clip(tower: Any, upstream: Any, lengths: list[int]) -> None:
    check(tower, upstream, lengths)


def test_windows_matter_beyond_eight_seconds(tower: Any, upstream: Any) -> None:
    """What the tower does without them is something else, so the tests above compare with the right thing."""
    with torch.no_grad():
        torch.testing.assert_close(alone(tower, mel_of(800)), alone(upstream, mel_of(800)), atol=1e-4, rtol=1e-4)
        assert (alone(tower, mel_of(1000)) - alone(upstream, mel_of(1000))).abs().max() > 0.01


def test_audio_tokens_are_counted_as_qwen_asr_counts_them() -> None:
    frames = torch.arange(0, 12_000)
    torch.testing.assert_close(num_audio_tokens(frames), _get_feat_extract_output_lengths(frames))
    torch.testing.assert_close(num_audio_tokens(frames.view(3, 4000)).flatten(), num_audio_tokens(frames))


def test_a_clip_without_frames_has_no_tokens_and_harms_no_other(tower: Any, upstream: Any) -> None:
    clip = mel_of(120)
    with torch.no_grad():
        embeds, num_tokens = encode(tower, *padded([mel_of(0), clip]))
        torch.testing.assert_close(embeds[1, : num_tokens[1]], alone(upstream, clip), atol=1e-4, rtol=1e-4)
    assert num_tokens.tolist()[0] == 0


def test_gradients_are_those_of_qwen_asr(tower: Any, upstream: Any) -> None:
    clips = [mel_of(length, seed) for seed, length in enumerate((37, 250, 1030))]
    batched, single = copy.deepcopy(tower).train(), copy.deepcopy(tower).train()
    install_windowed_attention(single)
    embeds, num_tokens = encode(batched, *padded(clips))
    torch.stack([row[:count].square().sum() for row, count in zip(embeds, num_tokens, strict=True)]).sum().backward()
    torch.stack([alone(single, clip).square().sum() for clip in clips]).sum().backward()
    for (name, ours), theirs in zip(batched.named_parameters(), single.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        if "k_proj.bias" not in name:  # shifts all scores of a query alike: its gradient is rounding
            assert theirs.grad.abs().max() > 0, name
            error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
            assert error < 1e-3, f"{name}: {error}"


@given(batches=st.lists(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=20), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_few_numbers_of_windows_are_recorded_and_give_the_same(tower: Any, batches: list[list[int]]) -> None:
    """As on CUDA, but that a graph is recorded: what runs again is the same work on the same tensors."""
    recorded: list[Callable[[], Tensor]] = []

    def record(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        recorded.append(work)
        return work

    graphs = WindowGraphs(record)
    sizes = set()
    with torch.no_grad():
        for lengths in batches:
            mel, num_frames = padded([mel_of(length, seed) for seed, length in enumerate(lengths)])
            want, _ = encode(tower, mel, num_frames)
            got, num_tokens = encode(tower, mel, num_frames, graphs)
            sizes.add(-(-sum(-(-length // 800) for length in lengths) // 8))
            for one, other, size in zip(want, got, num_tokens.tolist(), strict=True):
                torch.testing.assert_close(other[:size], one[:size], atol=1e-5, rtol=1e-5)
    assert len(recorded) == len(sizes)


def test_more_windows_than_are_recorded_go_without_a_graph(tower: Any) -> None:
    x = torch.randn(WindowGraphs.MOST + 1, 104, tower.config.d_model)
    with torch.no_grad():
        torch.testing.assert_close(
            WindowGraphs(lambda _: pytest.fail("recorded"))(tower, x, None), transformer(tower, x, None)
        )
