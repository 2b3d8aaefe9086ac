"""The text layers on a CPU: between the matrix products kernels of our own, the sums of residuals in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from qwen_asr.core.transformers_backend.modeling_qwen3_asr import Qwen3ASRThinkerForConditionalGeneration
from torch import Tensor

from pipeline.engine.cpu_attention import attend
from pipeline.engine.cpu_kernels import gated, norm, rotate
from pipeline.engine.int4 import Int4Weight
from pipeline.engine.layers import Layer, Tables, TextLayers, Write


class CpuTextLayers(TextLayers):
    """In float32 or bfloat16."""

    def __init__(self, thinker: Qwen3ASRThinkerForConditionalGeneration, int4: Mapping[str, Int4Weight]) -> None:
        super().__init__(thinker, int4)
        self._qk_norms = [layer.qk_norm.float() for layer in self.layers]
        self._post_norms = [layer.post_norm.detach().float() for layer in self.layers]
        # before the first layer, then behind each
        self._norms = [layer.input_norm.detach().float() for layer in self.layers] + [self.last_norm.detach().float()]

    def prefill(self, x: Tensor, tables: Tables, last: Tensor, write: Write) -> Tensor:
        num_rows, length, hidden = x.shape
        starts = torch.zeros(num_rows, dtype=torch.int64)
        x, normed = self._begin(x.reshape(-1, hidden))
        for number, layer in enumerate(self.layers):
            queries = normed.new_empty(num_rows, self.heads, length, self.head_dim)
            keys, values = (normed.new_empty(num_rows, self.kv_heads, length, self.head_dim) for _ in range(2))
            qkv = layer.qkv(normed).unflatten(0, (num_rows, length))
            rotate(qkv, self._qk_norms[number], self.eps, tables, starts, queries, keys, values)
            write(number, keys, values)
            if number == len(self.layers) - 1:  # from here on only the last position of each prompt matters
                rows = torch.arange(num_rows)
                x = x.unflatten(0, (num_rows, length))[rows, last]
                mixed = attend(queries[rows, :, last].unflatten(1, (self.kv_heads, -1)), keys, values, last).flatten(1)
            else:
                mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
                mixed = mixed.transpose(1, 2).reshape(num_rows * length, -1)
            normed = self._end(number, layer, x, mixed)
        return normed

    def step(
        self,
        x: Tensor,
        tables: Tables,
        positions: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        length: int,
    ) -> Tensor:
        x, normed = self._begin(x)
        queries = torch.empty(len(x), self.heads, 1, self.head_dim)
        by_key_head = queries.view(len(x), self.kv_heads, -1, self.head_dim)
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(normed)[:, None]
            rotate(qkv, self._qk_norms[number], self.eps, tables, positions, queries, keys[number], values[number])
            mixed = attend(by_key_head, keys[number], values[number], positions)
            normed = self._end(number, layer, x, mixed.flatten(1))
        return normed

    def _begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of residuals, which is changed in place from here on, and the first layer's input."""
        total = x.to(torch.float32, copy=True)
        return total, norm(total, self._norms[0], self.eps, torch.empty_like(x))

    def _end(self, number: int, layer: Layer, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows a layer's attention -> the next one's input."""
        normed = norm(x, self._post_norms[number], self.eps, mixed.new_empty(x.shape), layer.out(mixed))
        down = layer.down(gated(layer.gate_up(normed)))
        return norm(x, self._norms[number + 1], self.eps, normed, down)
