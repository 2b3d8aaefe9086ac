"""What a text layer does between its matrix products, on a CPU, in one pass each.

torch needs several kernels for each of these, and in bfloat16 a copy to float32 and back around most of them.
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
_NUMBERS_WORTH_A_THREAD = 1 << 17


def norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, added: Tensor | None = None) -> Tensor:
    """RMS norm of the rows of x [N, d] times `weight` float32 [d] -> `out` like x. `added` [N, d] goes to x before."""
    x_, weight_, out_ = map(as_numpy, (x, weight, out))
    if added is None:
        by_rows(len(x), x.shape[1], lambda rows: _norm(x_[rows], weight_, eps, out_[rows]))
    else:
        added_ = as_numpy(added)
        by_rows(len(x), x.shape[1], lambda rows: _add_and_norm(x_[rows], added_[rows], weight_, eps, out_[rows]))
    return out


def gated(gate_up: Tensor) -> Tensor:
    """[N, 2 * d], gates before what they let through -> silu(gate) * up [N, d]."""
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    gate_up_, out_ = as_numpy(gate_up), as_numpy(out)
    by_rows(len(out), 4 * out.shape[1], lambda rows: _gated(gate_up_[rows], out_[rows]))
    return out


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, V] -> ids int64 [N] of the highest, of equal ones the first, and their log-probabilities float32 [N],
    NaN where a logit is."""
    ids, logprobs = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
    logits_, ids_, logprobs_ = map(as_numpy, (logits, ids, logprobs))
    by_rows(len(logits), logits.shape[1], lambda rows: _best(logits_[rows], ids_[rows], logprobs_[rows]))
    return ids, logprobs


def rotate(
    qkv: Tensor,
    weight: Tensor,
    eps: float,
    tables: tuple[Tensor, Tensor],
    starts: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Norms and rotates what `qkv` [R, T, (heads + 2 * kv_heads) * head_dim] holds of rows whose first position is
    int64 `starts` [R], into `queries` [R, heads, T, head_dim], and into `keys` and `values` [>= R, kv_heads, W,
    head_dim] at their positions. `weight` float32 [heads + kv_heads, head_dim]; `tables` cosines and sines float32
    [W, head_dim], the sines of the first half negative."""
    qkv_, weight_, starts_, queries_, keys_, values_ = map(as_numpy, (qkv, weight, starts, queries, keys, values))
    cos, sin = map(as_numpy, tables)

    def work(rows: slice) -> None:
        _rotate(qkv_[rows], weight_, eps, cos, sin, starts_[rows], queries_[rows], keys_[rows], values_[rows])

    by_rows(len(qkv), qkv.shape[1] * qkv.shape[2], work)


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The same memory; bfloat16, which numpy does not know, as uint16."""
    found: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found


def by_rows(num_rows: int, numbers_a_row: int, work: Callable[[slice], None]) -> None:
    """`work` on all rows, in parts on torch's number of threads where it is enough."""
    num_parts = max(1, min(torch.get_num_threads(), num_rows, num_rows * numbers_a_row // _NUMBERS_WORTH_A_THREAD))
    bounds = [num_rows * part // num_parts for part in range(num_parts + 1)]
    others: list[Future[None]] = [
        _pool().submit(work, slice(start, end)) for start, end in zip(bounds[1:], bounds[2:], strict=False)
    ]
    work(slice(bounds[0], bounds[1]))
    for each in others:
        each.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="cpu-kernels")


def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    # NaN stays NaN; a division that may raise would keep its loop from being vectorized
    fastmath = {"reassoc", "contract", "nsz", "arcp"}
    options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
    made: Callable[..., Any]
    try:
        made = numba.njit(cache=True, **options)(kernel)
    except RuntimeError:  # no folder that it could keep the machine code in: seconds more at every start
        made = numba.njit(**options)(kernel)
    return made


def _widening(typing_context: Any, number: Any) -> Any:
    """A float32 itself, or that of a bfloat16's bits, which are its upper half."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if number == types.float32:
            return arguments[0]
        bits = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(number), code


def _narrowing(typing_context: Any, number: Any, like: Any) -> Any:
    """A float32 as what `like` is: itself, or the bits of the nearest bfloat16, of two the even one."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like == types.float32:
            return arguments[0]
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        is_odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), is_odd)
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    return like(types.float32, like), code


def _power_of_two(typing_context: Any, exponent: Any) -> Any:
    """2**n of a float32 that is a whole number in [-126, 127]."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        biased = builder.add(builder.fptosi(arguments[0], word), ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.float32), code


def _rounding_down(typing_context: Any, number: Any) -> Any:
    """Of a float32, in an instruction that loops are vectorized with."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        floor = builder.module.declare_intrinsic("llvm.floor", [ir.FloatType()])
        return builder.call(floor, arguments)

    return types.float32(types.float32), code


def _fetching(typing_context: Any, array: Any, index: Any) -> Any:
    """Has the cache fetch what stands at `index` of a vector, while other work goes on."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), ir.PointerType(ir.IntType(8)))
        word = ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [ir.PointerType(ir.IntType(8))],
            ir.FunctionType(ir.VoidType(), [ir.PointerType(ir.IntType(8)), word, word, word]),
        )
        builder.call(prefetch, [place, *(ir.Constant(word, number) for number in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(array, index), code


prefetch: Any = intrinsic(_fetching)
wide: Any = intrinsic(_widening)
narrow: Any = intrinsic(_narrowing)
_exp2: Any = intrinsic(_power_of_two)
_floor: Any = intrinsic(_rounding_down)


@compiled
def exp(x: Any) -> Any:
    """e**x in float32 to 2e-7, with x cut to [-87, 88]: in this form a loop of it is vectorized (coefficients of the
    Cephes library's expf)."""
    if x < np.float32(-87):
        x = np.float32(-87)
    if x > np.float32(88):
        x = np.float32(88)
    n = _floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1)) * _exp2(n)


@compiled
def _norm(x: Any, weight: Any, eps: float, out: Any) -> None:
    num_rows, width = x.shape
    for row in range(num_rows):
        total = np.float32(0)
        for i in range(width):
            total += wide(x[row, i]) * wide(x[row, i])
        scale = np.float32(1 / np.sqrt(total / width + eps))
        for i in range(width):
            out[row, i] = narrow(wide(x[row, i]) * scale * weight[i], out[row, i])


@compiled
def _add_and_norm(x: Any, added: Any, weight: Any, eps: float, out: Any) -> None:
    num_rows, width = x.shape
    for row in range(num_rows):
        total = np.float32(0)
        for i in range(width):
            both = wide(x[row, i]) + wide(added[row, i])
            x[row, i] = narrow(both, x[row, i])
            total += both * both
        scale = np.float32(1 / np.sqrt(total / width + eps))
        for i in range(width):
            out[row, i] = narrow(wide(x[row, i]) * scale * weight[i], out[row, i])


@compiled
def _gated(gate_up: Any, out: Any) -> None:
    num_rows, width = out.shape
    for row in range(num_rows):
        gates, ups, outs = gate_up[row, :width], gate_up[row, width:], out[row]
        for i in range(width):
            gate = wide(gates[i])
            outs[i] = narrow(gate / (np.float32(1) + exp(-gate)) * wide(ups[i]), outs[i])


@compiled
def _best(logits: Any, ids: Any, logprobs: Any) -> None:
    num_rows, width = logits.shape
    numbers = np.empty(width, np.float32)
    for row in range(num_rows):
        highest, total = np.float32(-np.inf), np.float32(0)
        for i in range(width):
            numbers[i] = wide(logits[row, i])
            highest = max(highest, numbers[i])
        for i in range(width):
            total += exp(numbers[i] - highest)
        ids[row] = 0
        for i in range(width):
            if numbers[i] == highest:
                ids[row] = i
                break
        logprobs[row] = -np.log(total)


@compiled
def _turn(head: Any, cos: Any, sin: Any, out: Any) -> None:
    half = len(head) // 2
    for i in range(half):
        out[i] = narrow(head[i] * cos[i] + head[half:][i] * sin[i], out[i])
    for i in range(half):
        out[half:][i] = narrow(head[half:][i] * cos[half:][i] + head[i] * sin[half:][i], out[i])


@compiled
def _rotate(
    qkv: Any, weight: Any, eps: float, cos: Any, sin: Any, starts: Any, queries: Any, keys: Any, values: Any
) -> None:
    num_rows, num_heads, length, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    head = np.empty(head_dim, np.float32)
    for row in range(num_rows):
        for t in range(length):
            at = starts[row] + t
            for h in range(num_heads + num_kv_heads):
                given, factors = qkv[row, t, h * head_dim : (h + 1) * head_dim], weight[h]
                total = np.float32(0)
                for i in range(head_dim):
                    total += wide(given[i]) * wide(given[i])
                scale = np.float32(1 / np.sqrt(total / head_dim + eps))
                for i in range(head_dim):
                    head[i] = wide(given[i]) * scale * factors[i]
                if h < num_heads:
                    _turn(head, cos[at], sin[at], queries[row, h, t])
                else:
                    _turn(head, cos[at], sin[at], keys[row, h - num_heads, at])
            for h in range(num_kv_heads):
                begin = (num_heads + num_kv_heads + h) * head_dim
                values[row, h, at] = qkv[row, t, begin : begin + head_dim]
