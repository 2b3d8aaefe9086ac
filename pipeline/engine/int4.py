"""Linear layers whose weights are four bits wide in memory and in the kernel.

Weights are signed integers q in [-8, 7] with a scale for every group of inputs: w = q * scale. PyTorch's kernels take
them packed and multiply as they unpack (`_weight_int4pack_mm_for_cpu`, `_weight_int4pack_mm` on CUDA), which is worth
it while a batch is small; a larger one is faster on the weights in 16 bit, made anew each time.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CPU_OUT_MULTIPLE = 16  # of the CPU kernel
_CPU_BLOCK = 64  # outputs that it packs together
_CUDA_OUT_MULTIPLE, _CUDA_IN_MULTIPLE = 8, 128
_CUDA_TILES = 8
_MAX_ERROR = 0.02  # of the norm of a product; bfloat16 makes 0.4 % of it
_GROUPS = (32, 64, 128, 256)
_PROBED_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A weight as it is stored: `quants` uint8 [out, in / 2], the even input in the low four bits, q + 8 each; `scales`
    [out, in / group], of what dtype it was fitted in; `pre_scale` [in] multiplies the input, None where none is."""

    quants: Tensor
    scales: Tensor
    pre_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)"""
        return self.quants.shape[0], 2 * self.quants.shape[1]

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    @property
    def num_bytes(self) -> int:
        tensors = (self.quants, self.scales, self.pre_scale)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def integers(self) -> Tensor:
        """int8 [out, in] in [-8, 7]."""
        return torch.stack([self.quants & 15, self.quants >> 4], dim=-1).flatten(1).to(torch.int8) - 8

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[out, in], without `pre_scale`."""
        grouped = self.integers().unflatten(1, (-1, self.group_size)).to(self.scales.dtype)
        return cast(Tensor, (grouped * self.scales[:, :, None]).flatten(1).to(dtype))

    @staticmethod
    def of(integers: Tensor, scales: Tensor, pre_scale: Tensor | None = None) -> Int4Weight:
        """From integers [out, in] in [-8, 7]. Raises ValueError when one lies outside."""
        if integers.min() < -8 or integers.max() > 7:
            raise ValueError(f"weights from {int(integers.min())} to {int(integers.max())} are no 4-bit integers")
        shifted = (integers + 8).to(torch.uint8)
        return Int4Weight(shifted[:, ::2] | shifted[:, 1::2] << 4, scales, pre_scale)


def joined(weights: Sequence[Int4Weight]) -> Int4Weight | None:
    """One weight that gives the outputs of several behind each other; None when their inputs are scaled differently."""
    first = weights[0].pre_scale
    for each in weights[1:]:
        if (first is None) != (each.pre_scale is None) or each.group_size != weights[0].group_size:
            return None
        if first is not None and each.pre_scale is not None and not torch.equal(first, each.pre_scale):
            return None
    quants = torch.cat([each.quants for each in weights])
    return Int4Weight(quants, torch.cat([each.scales for each in weights]), first)


class Int4Linear(nn.Module):
    """`switch` is the number of rows from which on dequantizing is faster; `kernel` names what runs below it.

    Without a kernel for the shape or the device every call dequantizes, with a warning when the layer is made: the
    results are the same, the memory too, the speed is not.
    """

    packed: Tensor
    scales_and_zeros: Tensor
    pre_scale: Tensor | None
    quants: Tensor
    scales: Tensor

    def __init__(self, weight: Int4Weight, dtype: torch.dtype, device: torch.device, switch: int = 64) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.group_size, self.switch = weight.group_size, switch
        self._dtype = dtype
        pre_scale = None if weight.pre_scale is None else weight.pre_scale.to(device, dtype)
        self.register_buffer("pre_scale", pre_scale, persistent=False)
        reason = _no_kernel(weight, dtype, device)
        self.kernel = "dequantize" if reason else f"int4pack_{device.type}"
        if reason:
            warnings.warn(f"int4 weights are dequantized at every use: {reason}", RuntimeWarning, stacklevel=2)
            self.register_buffer("quants", weight.quants.to(device), persistent=False)
            self.register_buffer("scales", weight.scales.to(device), persistent=False)
            return
        scales = weight.scales.to(torch.bfloat16).T.contiguous()
        zeros = torch.zeros_like(scales)
        self.register_buffer("packed", _packed(weight, device), persistent=False)
        self._order = _cpu_order() if device.type == "cpu" and self.out_features % _CPU_BLOCK == 0 else None
        self.register_buffer("scales_and_zeros", torch.stack([scales, zeros], dim=-1).to(device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        if self.pre_scale is not None:
            x = x * self.pre_scale
        rows = x.reshape(-1, self.in_features)
        if self.kernel == "dequantize" or len(rows) >= self.switch:
            y = self._multiply_dequantized(rows)
        else:
            y = self._multiply(rows.to(torch.bfloat16)).to(x.dtype)
        return cast(Tensor, y.unflatten(0, x.shape[:-1]))

    def weight(self) -> Tensor:
        """[out, in] in bfloat16 (in the engine's dtype where there is no kernel), without `pre_scale`."""
        if self.kernel == "dequantize":
            return Int4Weight(self.quants, self.scales).dequantized(self._dtype)
        if self._order is None:  # the kernel itself unpacks, whatever its layout: a product with the unit matrix
            return self._multiply(torch.eye(self.in_features, dtype=torch.bfloat16, device=self.packed.device)).T
        integers = unpacked(self.packed, self._order)  # [out / 64, in, 64]
        grouped = integers.unflatten(1, (-1, self.group_size)).to(torch.bfloat16)
        scales = self.scales_and_zeros[..., 0].unflatten(1, (-1, _CPU_BLOCK)).transpose(0, 1)  # [out / 64, groups, 64]
        return cast(Tensor, (grouped * scales[:, :, None]).flatten(1, 2).transpose(1, 2).flatten(0, 1))

    @property
    def device(self) -> torch.device:
        return self.scales.device if self.kernel == "dequantize" else self.packed.device

    def _multiply_dequantized(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight().to(rows.dtype))

    def _multiply(self, rows: Tensor) -> Tensor:
        if self.packed.device.type == "cpu":
            return cast(
                Tensor,
                torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group_size, self.scales_and_zeros),
            )
        return cast(
            Tensor, torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group_size, self.scales_and_zeros)
        )


def _no_kernel(weight: Int4Weight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why PyTorch has no int4 kernel for this; None when it has one."""
    num_out, num_in = weight.shape
    if weight.group_size not in _GROUPS:
        return f"groups of {weight.group_size} (the kernels have {', '.join(map(str, _GROUPS))})"
    if dtype != torch.bfloat16:
        return f"{dtype} (the kernels take bfloat16)"
    if device.type == "cpu":
        return f"{num_out} outputs, no multiple of {_CPU_OUT_MULTIPLE}" if num_out % _CPU_OUT_MULTIPLE else None
    if device.type != "cuda":
        return f"device {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} (the kernel needs compute capability 8.0)"
    if num_out % _CUDA_OUT_MULTIPLE or num_in % _CUDA_IN_MULTIPLE:
        return f"shape {num_out} x {num_in}"
    return None


def _packed(weight: Int4Weight, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return cast(
            Tensor, torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.integers().to(torch.int32) + 8, 1)
        )
    pairs = (weight.quants << 4 | weight.quants >> 4).to(device)  # the even input in the high four bits
    return cast(Tensor, torch.ops.aten._convert_weight_to_int4pack(pairs, _CUDA_TILES))


@cache
def _cpu_order() -> Tensor | None:
    """At which of the 64 nibbles of a packed input each output of a block stands, int64 [64]; None when this CPU's
    kernel packs otherwise. The layout depends on the CPU and is nowhere promised, so it is asked for."""
    outputs = torch.arange(_CPU_BLOCK, dtype=torch.int32)
    low, high = (_nibbles(_pack_column(part)) for part in (outputs % 16, outputs // 16))
    order = (low + 16 * high).to(torch.int64)
    if sorted(order.tolist()) != list(range(_CPU_BLOCK)):
        return None
    inverse = order.argsort()
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-8, 8, (3 * _CPU_BLOCK, 64), generator=generator, dtype=torch.int8)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.to(torch.int32) + 8, 1)
    return inverse if torch.equal(unpacked(packed, inverse).transpose(1, 2).flatten(0, 1), integers) else None


def _pack_column(values: Tensor) -> Tensor:
    """The bytes of the first input of a block whose outputs have `values` (int32 [64]) there."""
    column = values[:, None].expand(-1, 32).contiguous()
    return cast(Tensor, torch.ops.aten._convert_weight_to_int4pack_for_cpu(column, 1).flatten()[: _CPU_BLOCK // 2])


def _nibbles(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def unpacked(packed: Tensor, order: Tensor) -> Tensor:
    """int8 [out / 64, in, 64] in [-8, 7] of what the CPU's kernel has packed (uint8 [out, in / 2])."""
    blocks = packed.view(packed.shape[0] // _CPU_BLOCK, 2 * packed.shape[1], _CPU_BLOCK // 2)
    return _nibbles(blocks)[..., order].to(torch.int8) - 8


def check(layer: Int4Linear, weight: Int4Weight) -> None:
    """Raises RuntimeError unless `layer` computes, by its kernel and dequantized, what fake quantization would."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, layer.in_features, generator=generator)
    expected = x @ weight.dequantized(torch.float32).T
    x = x.to(layer.device, layer._dtype)
    for way in ("_multiply_dequantized", "_multiply") if layer.kernel != "dequantize" else ("_multiply_dequantized",):
        found = getattr(layer, way)(x).float().cpu()
        error = float((found - expected).norm() / expected.norm().clamp(min=1e-9))
        if not error < _MAX_ERROR:
            raise RuntimeError(
                f"{layer.kernel}: int4 products are {100 * error:.1f} % off ({way.strip('_')}); this build of torch "
                "cannot be trusted with them. Set engine.quantization: none, and report it"
            )


def find_switch(layer: Int4Linear) -> int:
    """From how many rows on dequantizing is faster than the kernel for `layer`, measured here and now."""
    if layer.kernel == "dequantize":
        return 0
    most = torch.randn(_PROBED_ROWS[-1], layer.in_features, dtype=torch.bfloat16, device=layer.packed.device)
    for rows in _PROBED_ROWS:
        kernel = _seconds(partial(layer._multiply, most[:rows]))
        if kernel > _seconds(partial(layer._multiply_dequantized, most[:rows])):
            return rows
    return 2 * _PROBED_ROWS[-1]


def _seconds(work: Callable[[], Tensor]) -> float:
    """The shortest of a few times."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        if work().is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
