"""The output layer in eight bits, an option: a third of a small model's bytes are its, and every step reads them."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_KERNEL_ROWS = 4


class Int8Head(nn.Module):
    """A linear layer of signed 8-bit weights with a scale for each output; bfloat16 in and out.

    PyTorch has a kernel for it on CPUs (`_weight_int8pack_mm`), which is faster than 16 bit for a row or two; for more,
    and elsewhere, the product is with the integers as bfloat16, which hold them exactly, and only memory is saved.
    """

    quants: Tensor
    scales: Tensor

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        weight = head.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        quants = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("quants", quants, persistent=False)  # [out, in]
        self.register_buffer("scales", scales.to(torch.bfloat16), persistent=False)  # [out]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        if rows.device.type == "cpu" and len(rows) <= _KERNEL_ROWS:
            y = torch.ops.aten._weight_int8pack_mm(rows, self.quants, self.scales)
        else:
            y = F.linear(rows, self.quants.to(torch.bfloat16)) * self.scales
        return cast(Tensor, y.unflatten(0, x.shape[:-1]))
