"""Convolutions of 8-frame chunks against the tower's own modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.engine.causal.convolutions import ChunkConvolutions
from tests.engine.causal.test_tower import random_tower


def expected(tower: Any, chunks: Tensor) -> Tensor:
    x = chunks.transpose(1, 2)[:, None]
    for conv in (tower.conv2d1, tower.conv2d2, tower.conv2d3):
        x = F.gelu(conv(x))
    out: Tensor = tower.conv_out(x.permute(0, 3, 1, 2).flatten(2))[:, 0]
    return out


@pytest.mark.parametrize("num_chunks", [0, 1, 7, 5000])
def test_they_are_the_modules_own(num_chunks: int) -> None:
    tower, chunks = random_tower(16, 2, 1, seed=3), torch.randn(num_chunks, 8, 128)
    with torch.no_grad():
        torch.testing.assert_close(ChunkConvolutions(tower)(chunks), expected(tower, chunks), atol=1e-5, rtol=1e-4)


def test_in_bfloat16_they_are_those_of_float32() -> None:
    """Where conv2d itself is not, on a CPU with AMX."""
    tower, chunks = random_tower(16, 2, 1, seed=3), torch.randn(300, 8, 128)
    with torch.no_grad():
        want = expected(tower, chunks)
        got = ChunkConvolutions(tower.to(torch.bfloat16))(chunks.to(torch.bfloat16)).float()
    assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_gradients_are_the_modules_own() -> None:
    ours, chunks = random_tower(16, 2, 1, seed=3), torch.randn(50, 8, 128)
    theirs = copy.deepcopy(ours)
    ChunkConvolutions(ours)(chunks).square().sum().backward()
    expected(theirs, chunks).square().sum().backward()
    for name in ("conv2d1.weight", "conv2d1.bias", "conv2d2.weight", "conv2d3.bias", "conv_out.weight"):
        one, other = (each.get_parameter(name).grad for each in (ours, theirs))
        assert one is not None and other is not None and other.any()
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-3)
