"""The tower's three convolutions over chunks of 8 mel frames, as products of matrices.

A chunk has so few frames that what a kernel reads along them is written out, zeros included: what is left is a
convolution along mels, whose patches are rows of a matrix. In bfloat16 on a CPU it takes 20 ms for 768 chunks of the
embedded student where conv2d takes 29, and conv2d gives wrong numbers there, NaN among them (torch 2.13 with AMX).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from qwen_asr.core.transformers_backend.modeling_qwen3_asr import Qwen3ASRAudioEncoder
from torch import Tensor, nn

FRAMES_PER_STEP = 8  # three convolutions of stride 2
_PATCH_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # at once: what the cache holds, and what memory spares


class ChunkConvolutions:
    """`conv2d1`, `conv2d2`, `conv2d3` and `conv_out` of a tower, whose gradients reach its weights."""

    def __init__(self, tower: Qwen3ASRAudioEncoder) -> None:
        sizes = (FRAMES_PER_STEP, FRAMES_PER_STEP // 2, FRAMES_PER_STEP // 4)
        convolutions = (tower.conv2d1, tower.conv2d2, tower.conv2d3)
        self._layers = [_matrix(conv, size) for conv, size in zip(convolutions, sizes, strict=True)]
        channels = tower.conv2d3.out_channels
        self._out = tower.conv_out.weight.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1)

    def __call__(self, chunks: Tensor) -> Tensor:
        """[M, 8, mels] -> [M, d_model]."""
        x = chunks.transpose(1, 2)  # [M, mels, frames * channels]
        patch_bytes = x.element_size() * max(
            weight.shape[1] * x.shape[1] >> halvings for halvings, (weight, _) in enumerate(self._layers, 1)
        )
        at_once = max(1, _PATCH_BYTES[x.device.type] // patch_bytes)
        parts = [self._convolve(part) for part in x.split(at_once)]
        return torch.cat(parts) if parts else x.new_zeros(0, len(self._out))

    def _convolve(self, x: Tensor) -> Tensor:
        for weight, bias in self._layers:
            patches = F.pad(x, (0, 0, 1, x.shape[1] % 2)).unfold(1, 3, 2).transpose(2, 3).flatten(2)
            rows = patches.reshape(-1, weight.shape[1])  # a copy: in rows that overlap, the product is a slow one
            x = F.gelu(F.linear(rows, weight, bias)).unflatten(0, patches.shape[:2])
        return F.linear(x.flatten(1), self._out)


def _matrix(conv: nn.Conv2d, num_frames: int) -> tuple[Tensor, Tensor]:
    """Weight [frames / 2 * out, 3 * frames * in] and bias of the matrix that maps three neighbouring mels of all frames
    to one mel of half as many."""
    frames = torch.arange(num_frames, device=conv.weight.device)
    halves, taps = frames[: num_frames // 2], torch.arange(3, device=conv.weight.device)
    reads = frames[:, None, None] == 2 * halves[:, None] + taps - 1  # [frames, frames / 2, taps]
    weight = torch.einsum("oimk,fhk->homfi", conv.weight, reads.to(conv.weight.dtype))
    assert conv.bias is not None
    return weight.flatten(2).flatten(0, 1), conv.bias.repeat(len(halves))
