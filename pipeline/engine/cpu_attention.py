"""Attention of a decode step on a CPU: one query position a row, over as much of the cache as the row has filled.

torch's kernel reads every row up to the longest and, in bfloat16, at a third of what memory gives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.cpu_kernels import as_numpy, by_rows, compiled, exp, narrow, prefetch, wide


def attend(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, slots: Tensor | None = None) -> Tensor:
    """Queries [B, kv_heads, group, head_dim] over keys and values [S >= B, kv_heads, width, head_dim], each row up to
    and with its position of int64 [B] -> like queries, in the dtype of `values`. Row i looks at slot i, or at
    `slots[i]` of int64 [B]. On the CPU, in float32 or bfloat16; sums are float32."""
    if torch._C._len_torch_dispatch_stack():  # someone watches what torch does, and should see this, too
        seen: Tensor = torch.ops.shardscribe.attend(queries, keys, values, positions, slots)
        return seen
    return _attend_rows(queries, keys, values, positions, slots)


def _attend_rows(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, slots: Tensor | None) -> Tensor:
    num_rows, num_heads, group, head_dim = queries.shape
    mixed = values.new_empty(queries.shape)
    slots = torch.arange(num_rows) if slots is None else slots
    queries_, keys_, values_, positions_, mixed_ = map(as_numpy, (queries, keys, values, positions, mixed))
    slots_ = as_numpy(slots)
    by_rows(
        num_rows,
        int(positions.max()) * num_heads * group * head_dim,
        lambda rows: _attend(queries_[rows], keys_, values_, slots_[rows], positions_[rows], mixed_[rows]),
    )
    return mixed


_LIBRARY = torch.library.Library("shardscribe", "DEF")
_LIBRARY.define("attend(Tensor queries, Tensor keys, Tensor values, Tensor positions, Tensor? slots) -> Tensor")
_LIBRARY.impl("attend", _attend_rows, "CPU")


@compiled
def _attend(queries: Any, keys: Any, values: Any, slots: Any, positions: Any, mixed: Any) -> None:
    """Two queries of a key head at a time, so that what is read and widened once serves both; of an odd number of
    queries the last one is done twice. While a head's keys are read its values are fetched, and while these are, the
    next head's keys: what is read once, in lengths of a few pages, is nothing that a CPU foresees."""
    num_rows, num_heads, group, head_dim = queries.shape
    scale = np.float32(1 / np.sqrt(head_dim))
    shares = np.empty((2, positions.max() + 4), np.float32)
    query, sums = np.empty((2, head_dim), np.float32), np.empty((2, head_dim), np.float32)
    for row in range(num_rows):
        end, slot = positions[row] + 1, slots[row]
        for head in range(num_heads):
            next_row, next_head = (row, head + 1) if head + 1 < num_heads else (min(row + 1, num_rows - 1), 0)
            next_end, next_slot = positions[next_row] + 1, slots[next_row]
            for first in range(0, group, 2):
                pair = (first, min(first + 1, group - 1))
                for which in range(2):
                    for i in range(head_dim):
                        query[which, i] = wide(queries[row, head, pair[which], i]) * scale
                _scores(query, keys[slot, head, :end], values[slot, head, :end], shares)
                for which in range(2):
                    _softmax(shares[which, :end])
                    shares[which, end : end + 3] = 0
                _mix(shares, values[slot, head, :end], keys[next_slot, next_head, :next_end], sums)
                for which in range(2):
                    for i in range(head_dim):
                        mixed[row, head, pair[which], i] = narrow(sums[which, i], mixed[row, head, pair[which], i])


@compiled
def _scores(query: Any, keys: Any, values: Any, scores: Any) -> None:
    end, head_dim = keys.shape
    line = 64 // keys.itemsize
    for at in range(0, end, 2):
        after = min(at + 1, end - 1)
        for i in range(0, head_dim, line):
            prefetch(values[at], i)
            prefetch(values[after], i)
        a, b = keys[at], keys[after]
        a0, a1, b0, b1 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for i in range(head_dim):
            a0 += query[0, i] * wide(a[i])
            a1 += query[1, i] * wide(a[i])
            b0 += query[0, i] * wide(b[i])
            b1 += query[1, i] * wide(b[i])
        scores[0, at], scores[1, at] = a0, a1
        scores[0, at + 1], scores[1, at + 1] = b0, b1


@compiled
def _softmax(scores: Any) -> None:
    highest, total = scores.max(), np.float32(0)
    for at in range(len(scores)):
        scores[at] = exp(scores[at] - highest)
        total += scores[at]
    for at in range(len(scores)):
        scores[at] /= total


@compiled
def _mix(shares: Any, values: Any, next_keys: Any, sums: Any) -> None:
    end, head_dim = values.shape
    line = 64 // values.itemsize
    sums[:] = 0
    for at in range(0, end, 4):
        for following in range(at, min(at + 4, len(next_keys))):
            for i in range(0, head_dim, line):
                prefetch(next_keys[following], i)
        a, b = values[at], values[min(at + 1, end - 1)]
        c, d = values[min(at + 2, end - 1)], values[min(at + 3, end - 1)]
        a0, b0, c0, d0 = shares[0, at], shares[0, at + 1], shares[0, at + 2], shares[0, at + 3]
        a1, b1, c1, d1 = shares[1, at], shares[1, at + 1], shares[1, at + 2], shares[1, at + 3]
        for i in range(head_dim):
            of_a, of_b, of_c, of_d = wide(a[i]), wide(b[i]), wide(c[i]), wide(d[i])
            sums[0, i] += a0 * of_a + b0 * of_b + c0 * of_c + d0 * of_d
            sums[1, i] += a1 * of_a + b1 * of_b + c1 * of_c + d1 * of_d
