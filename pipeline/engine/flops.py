"""Floating-point operations of forwards as they run, two for a multiplication with its addition.

torch.utils.flop_counter sees matrix products, convolutions and attention, of which it counts masked places, too. It is
told here of what else engines run: attention on a CPU (torch's, and the compiled one of a decode step), oneDNN's fused
convolutions, and products with packed INT4 and INT8. Nobody counts element-wise work, norms and Fourier transforms.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

import pipeline.engine.cpu_attention  # noqa: F401  which defines an operation

Shape = Sequence[int]


class FlopMeter:
    """Counts within `with meter:`, as often as that is; in this thread alone. `total` includes `lm_head`, what the
    module of that name has done."""

    def __init__(self, lm_head: nn.Module) -> None:
        self._lm_head = lm_head
        self.total = self.lm_head = 0
        self._counter: FlopCounterMode | None = None
        self._hooks: list[RemovableHandle] = []
        self._before = 0

    def __enter__(self) -> FlopMeter:
        assert self._counter is None, "a meter counts once at a time"
        self._counter = FlopCounterMode(display=False, custom_mapping=_formulas())
        self._hooks = [
            self._lm_head.register_forward_pre_hook(self._begin_head),
            self._lm_head.register_forward_hook(self._end_head),
        ]
        self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._counter is not None
        self._counter.__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self.total += self._counter.get_total_flops()
        self._counter = None

    def _begin_head(self, *_: Any) -> None:
        assert self._counter is not None
        self._before = self._counter.get_total_flops()

    def _end_head(self, *_: Any) -> None:
        assert self._counter is not None
        self.lm_head += self._counter.get_total_flops() - self._before


def _formulas() -> dict[Any, Any]:
    """By operation; functions of the shapes of its arguments, but for those with `_get_raw`."""
    aten = torch.ops.aten
    found: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._weight_int4pack_mm: _packed_product,
        aten._weight_int4pack_mm_for_cpu: _packed_product,
        aten._weight_int8pack_mm: _packed_product,
        torch.ops.shardscribe.attend: _step_attention,
    }
    if torch.backends.mkldnn.is_available():
        found[torch.ops.mkldnn._convolution_pointwise] = _convolution
    return found


def _attention(queries: Shape, keys: Shape, values: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(queries, keys, values))


def _packed_product(x: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * prod(out_shape) * x[-1]


def _convolution(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return int(conv_flop_count(list(x), list(weight), list(out_shape)))


def _step_attention(
    queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, slots: Tensor | None, **_: Any
) -> int:
    """Scores and sums over as many places as each row has filled."""
    return 4 * int((positions + 1).sum()) * prod(queries.shape[1:])


_step_attention._get_raw = True  # type: ignore[attr-defined]
