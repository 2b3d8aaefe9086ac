"""Attention of a decode step on a CPU: one query position a row, over as much of the cache as the row has filled.

torch's kernel reads every row up to the longest and, in bfloat16, at a third of what memory gives.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
_ROWS_WORTH_A_THREAD = 8


def attend(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, slots: Tensor | None = None) -> Tensor:
    """Queries [B, kv_heads, group, head_dim] over keys and values [S >= B, kv_heads, width, head_dim], each row up to
    and with its position of int64 [B] -> like queries. Row i looks at slot i, or at `slots[i]` of int64 [B]. On the
    CPU, in float32 or bfloat16; sums are float32."""
    num_rows, num_heads, group, head_dim = queries.shape
    slots = torch.arange(num_rows) if slots is None else slots
    length = int(positions.max()) + 1
    scaled = queries.float() * head_dim**-0.5
    scores = torch.empty(num_rows, num_heads, group, length)
    mixed = torch.empty(num_rows, num_heads, group, head_dim)
    scaled_, keys_, values_, positions_, slots_ = map(_numpy, (scaled, keys, values, positions, slots))
    _by_rows(num_rows, lambda rows: _scores(scaled_[rows], keys_, slots_[rows], positions_[rows], _numpy(scores[rows])))
    shares = torch.softmax(scores, dim=-1)
    _by_rows(
        num_rows, lambda rows: _mix(_numpy(shares[rows]), values_, slots_[rows], positions_[rows], _numpy(mixed[rows]))
    )
    return mixed.to(queries.dtype)


def _numpy(tensor: Tensor) -> np.ndarray:
    """The same memory; bfloat16, which numpy does not know, as uint16."""
    found: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found


def _by_rows(num_rows: int, work: Callable[[slice], None]) -> None:
    """`work` on all rows, in parts on torch's number of threads."""
    num_parts = max(1, min(torch.get_num_threads(), num_rows // _ROWS_WORTH_A_THREAD))
    bounds = [num_rows * part // num_parts for part in range(num_parts + 1)]
    others: list[Future[None]] = [
        _pool().submit(work, slice(start, end)) for start, end in zip(bounds[1:], bounds[2:], strict=False)
    ]
    work(slice(bounds[0], bounds[1]))
    for each in others:
        each.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="cpu-attention")


def _widening(typing_context: Any, number: Any) -> Any:
    """A float32 itself, or that of a bfloat16's bits, which are its upper half."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if number == types.float32:
            return arguments[0]
        bits = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(number), code


_wide: Any = intrinsic(_widening)


def _compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz", "arcp"}}  # but NaN stays NaN
    made: Callable[..., None]
    try:
        made = numba.njit(cache=True, **options)(kernel)
    except RuntimeError:  # no folder that it could keep the machine code in: a second more at every start
        made = numba.njit(**options)(kernel)
    return made


@_compiled
def _scores(queries: Any, keys: Any, slots: Any, positions: Any, scores: Any) -> None:
    num_rows, num_heads, group, head_dim = queries.shape
    for row in range(num_rows):
        end, slot = positions[row] + 1, slots[row]
        for head in range(num_heads):
            for at in range(end):
                for query in range(group):
                    total = np.float32(0)
                    for i in range(head_dim):
                        total += queries[row, head, query, i] * _wide(keys[slot, head, at, i])
                    scores[row, head, query, at] = total
            scores[row, head, :, end:] = -np.inf


@_compiled
def _mix(shares: Any, values: Any, slots: Any, positions: Any, mixed: Any) -> None:
    num_rows, num_heads, group, head_dim = mixed.shape
    for row in range(num_rows):
        slot = slots[row]
        for head in range(num_heads):
            mixed[row, head] = 0
            for at in range(positions[row] + 1):
                for query in range(group):
                    share = shares[row, head, query, at]
                    for i in range(head_dim):
                        mixed[row, head, query, i] += share * _wide(values[slot, head, at, i])
