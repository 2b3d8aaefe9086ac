"""Attention of a decode step on a CPU against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.cpu_attention import attend


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (2, 2), (8, 2), (3, 5)]),
    head_dim=st.sampled_from([8, 64, 128]),
    positions=st.lists(st.integers(0, 99), min_size=1, max_size=40),
    is_bfloat16=st.booleans(),
    threads=st.integers(1, 3),
)
def test_each_row_attends_to_what_it_has_filled(
    heads: tuple[int, int], head_dim: int, positions: list[int], is_bfloat16: bool, threads: int
) -> None:
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    kv_heads, group = heads
    num_rows = len(positions)
    queries = torch.randn(num_rows, kv_heads, group, head_dim).to(dtype)
    keys, values = (torch.randn(num_rows + 2, kv_heads, 100, head_dim).to(dtype) for _ in range(2))
    at = torch.tensor(positions)
    seen = (torch.arange(100) <= at[:, None])[:, None, None]
    want = F.scaled_dot_product_attention(
        queries.float(), keys[:num_rows].float(), values[:num_rows].float(), attn_mask=seen
    )
    for cache in (keys, values):  # what a row that went before has left there
        for row, position in enumerate(positions):
            cache[row, :, position + 1 :] = float("nan")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = attend(queries, keys, values, at)
    finally:
        torch.set_num_threads(before)
    assert got.dtype == dtype
    order = torch.randperm(num_rows)
    torch.testing.assert_close(attend(queries[order], keys, values, at[order], order), got[order])
    torch.testing.assert_close(
        got.float(), want, atol=2e-2 if is_bfloat16 else 1e-5, rtol=1e-2 if is_bfloat16 else 1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_stays_one(dtype: torch.dtype) -> None:
    queries, cache = torch.ones(2, 1, 2, 64, dtype=dtype), torch.ones(2, 1, 16, 64, dtype=dtype)
    cache[1, 0, 3] = float("nan")
    got = attend(queries, cache, torch.ones_like(cache), torch.tensor([8, 8]))
    assert got[0].isfinite().all() and got[1].isnan().all()
