"""The CPU's kernels and layers against torch's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config import EngineConfig
from pipeline.engine.cpu_convs import fused_convs
from pipeline.engine.cpu_kernels import best, exp, gated, norm, rotate
from pipeline.engine.cpu_layers import CpuTextLayers
from pipeline.engine.layers import TextLayers
from pipeline.engine.model import LoadedModel, load_model
from pipeline.engine.windowed import convs_of

DTYPES = [torch.float32, torch.bfloat16]


def close(got: Tensor, want: Tensor) -> None:
    exact = got.dtype == torch.float32
    torch.testing.assert_close(got.float(), want.float(), atol=1e-5 if exact else 2e-2, rtol=1e-5 if exact else 1e-2)


def test_exp_is_that_of_numpy() -> None:
    x = np.linspace(-80, 80, 10_001, dtype=np.float32)
    np.testing.assert_allclose([float(exp(each)) for each in x], np.exp(x.astype(np.float64)), rtol=3e-7)
    assert math.isnan(exp(np.float32("nan"))) and exp(np.float32(-1e30)) < 1e-37 and exp(np.float32(1e30)) > 1e38


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(1, 8), (3, 7), (33, 256), (1100, 256)]),
    dtype=st.sampled_from(DTYPES),
    adds=st.booleans(),
    threads=st.integers(1, 3),
)
def test_norms_are_torchs(shape: tuple[int, int], dtype: torch.dtype, adds: bool, threads: int) -> None:
    x, added, weight = torch.randn(shape), torch.randn(shape).to(dtype), torch.rand(shape[1])
    whole = x + added.float() if adds else x.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = norm(x, weight, 1e-6, torch.empty(shape, dtype=dtype), added if adds else None)
    finally:
        torch.set_num_threads(before)
    close(got, F.rms_norm(whole, shape[1:], weight, 1e-6))
    torch.testing.assert_close(x, whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_are_torchs_and_a_nan_stays_one(dtype: torch.dtype) -> None:
    gate_up = (4 * torch.randn(50, 2 * 96)).to(dtype)
    gate_up[7, 3] = float("nan")
    got, (gate, up) = gated(gate_up), gate_up.float().chunk(2, dim=-1)
    assert got[7, 3].isnan() and got.isnan().sum() == 1
    close(got.nan_to_num(), (F.silu(gate) * up).to(dtype).nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_are_torchs_and_a_nan_stays_one(dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(40, 1000)).to(dtype)
    logits[1, [900, 17, 400]] = 40.0
    logits[2, 5] = float("nan")
    ids, logprobs = best(logits)
    assert logprobs[2].isnan()
    numbers = torch.arange(40) != 2
    highest, wanted = logits[numbers].float().max(dim=-1)
    assert torch.equal(ids[numbers], wanted) and ids[1] == 17
    torch.testing.assert_close(logprobs[numbers], highest - logits[numbers].float().logsumexp(-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_writes_where_a_row_stands(dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, length = 4, 2, 16, 3
    qkv = torch.randn(5, length, (heads + 2 * kv_heads) * head_dim).to(dtype)
    weight, tables = torch.rand(heads + kv_heads, head_dim), (torch.randn(40, head_dim), torch.randn(40, head_dim))
    starts = torch.tensor([0, 9, 30, 2, 37])
    queries = torch.empty(5, heads, length, head_dim, dtype=dtype)
    keys, values = (torch.zeros(6, kv_heads, 40, head_dim, dtype=dtype) for _ in range(2))
    rotate(qkv, weight, 1e-6, tables, starts, queries, keys, values)

    at = starts[:, None] + torch.arange(length)
    split = qkv.float().unflatten(-1, (-1, head_dim))
    qk = F.rms_norm(split[:, :, : heads + kv_heads], (head_dim,), eps=1e-6) * weight
    qk = qk * tables[0][at][:, :, None] + qk.roll(head_dim // 2, dims=-1) * tables[1][at][:, :, None]
    close(queries, qk[:, :, :heads].transpose(1, 2).to(dtype))
    rows = torch.arange(5)[:, None]
    close(keys[rows, :, at], qk[:, :, heads:].to(dtype))
    assert torch.equal(values[rows, :, at], split[:, :, heads + kv_heads :].to(dtype))
    assert (values[5] == 0).all() and (values[0, :, length:] == 0).all()


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(EngineConfig(name="offline", model=str(tiny_checkpoint), device="cpu", dtype="float32"))


def test_layers_are_those_of_torch(loaded: LoadedModel) -> None:
    found = []
    last, prompts = torch.tensor([4, 11, 7]), torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(0))
    for kind in (TextLayers, CpuTextLayers):
        layers = kind(loaded.model.thinker, {})
        caches = [[torch.zeros(4, 1, 64, layers.head_dim) for _ in layers.layers] for _ in range(2)]

        def write(number: int, keys: Tensor, values: Tensor, caches: list[list[Tensor]] = caches) -> None:
            for cache, made in zip(caches, (keys, values), strict=True):
                cache[number][:3, :, :12] = made

        with torch.inference_mode():
            first = layers.prefill(prompts, layers.tables(64), last, write)
            then = layers.step(prompts[:, 0], layers.tables(64), last + 1, *caches, length=64)
        found.append((first, then))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_convolutions_are_the_towers(loaded: LoadedModel) -> None:
    tower, x = loaded.model.thinker.audio_tower, torch.randn(5, 1, 128, 100)
    with torch.inference_mode():
        y = x
        for got, want in zip(fused_convs(tower), convs_of(tower), strict=True):
            x, y = got(x), want(y)
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
