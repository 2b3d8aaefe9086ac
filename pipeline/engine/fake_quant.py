"""ModelOpt's fake quantization as the full-size weights that it computes with: 2 to 8 bits in groups, and FP8.

For formats that have no kernel here, so that every engine can run them beside those that have one. A scale of inputs is
multiplied into the weight, which is the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.checkpoint import CheckpointError
from pipeline.engine.quantized import (
    form_of,
    named,
    read_tensors,
    refuse_leftovers,
    rounded,
    take_fake_quant,
    weight_quantizers,
)

_FP8 = (4, 3)  # bits of exponent and mantissa
_FP8_MAX = 448.0
_BITS = range(2, 9)


@dataclass(frozen=True, slots=True)
class FakeQuantized:
    """`numbers` is what weights are rounded to ("int3", "fp8"; "fp8+int4" where layers differ), `tensors` the whole
    model, float32 where it is quantized."""

    numbers: str
    tensors: dict[str, Tensor]


def read_fake_quant(path: Path) -> FakeQuantized:
    """Raises CheckpointError for a folder that is not ModelOpt's fake quantization, or one whose parts do not match."""
    form = form_of(path)
    if form != "fake_quant":
        other = "int4" if form else "none"
        raise CheckpointError(
            f"{path} has no modelopt_state.pth, which engine.quantization: fake_quant takes; set it to {other}"
        )
    tensors = read_tensors(path)
    numbers, weights = set(), {}
    for linear, quantizer in weight_quantizers(path).items():
        with named(path, linear):
            weight, amax, pre_scale = take_fake_quant(tensors, linear)
            number, values = _values(weight, amax, quantizer)
            numbers.add(number)
            weights[f"{linear}.weight"] = values if pre_scale is None else values * pre_scale.float()
    if not weights:
        raise CheckpointError(f"{path} has modelopt_state.pth and no quantized layer")
    refuse_leftovers(path, tensors, "modelopt_state.pth")
    return FakeQuantized("+".join(sorted(numbers)), tensors | weights)


def _values(weight: Tensor, amax: Tensor, quantizer: Mapping[str, Any]) -> tuple[str, Tensor]:
    """What a weight [out, in] is rounded to, and the values, float32. Raises ValueError for what is not known here."""
    bits, blocks = quantizer.get("_num_bits"), quantizer.get("_block_sizes")
    odd = [name for name in ("_unsigned", "_narrow_range", "_rotate") if quantizer.get(name)]
    if not odd and isinstance(bits, int) and bits in _BITS and blocks and blocks.get("type") == "static":
        group = int(blocks.get(-1) or 0)
        if group:
            integers, scales = rounded(weight, amax, group, bits)
            return f"int{bits}", (integers.unflatten(1, (-1, group)) * scales[:, :, None]).flatten(1)
    if not odd and not isinstance(bits, int) and tuple(bits or ()) == _FP8 and not blocks:
        return "fp8", _fp8(weight, amax)
    raise ValueError(
        f"its quantizer has num_bits {bits}, block sizes {blocks}{''.join(f', {name[1:]}' for name in odd)}; known are "
        "2 to 8 bits in static groups of inputs, and FP8 (4, 3) for each output or the whole weight"
    )


def _fp8(weight: Tensor, amax: Tensor) -> Tensor:
    if amax.numel() not in (1, len(weight)):
        raise ValueError(f"{amax.numel()} scales for a weight of {weight.shape[0]} x {weight.shape[1]}")
    scale = amax.float().reshape(-1, 1) / _FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight.float() / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).float() * scale
