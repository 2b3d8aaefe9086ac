"""Qwen3's text layers as the slot decoder runs them: a prompt at a time, or a token of many rows.

The published layers (qwen_asr/core/transformers_backend/modeling_qwen3_asr.py, `Qwen3ASRThinkerTextModel`), called
directly. The three position ids of its rotary embedding are always equal (`get_rope_index`), so that it is a plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from qwen_asr.core.transformers_backend.modeling_qwen3_asr import Qwen3ASRThinkerForConditionalGeneration
from torch import Tensor, nn

from pipeline.engine.int4 import Int4Linear, Int4Weight, check, find_switch
from pipeline.engine.int4 import joined as join_int4

_SMALL = 1 << 17  # numbers

Write = Callable[[int, Tensor, Tensor], None]
"""Takes the keys and values [R, kv_heads, T, head_dim] that a layer (by its number) makes of prompts."""
Tables = tuple[Tensor, Tensor]
"""Cosines and sines float32 [positions, head_dim] of the rotation; the sines of the first half are negative."""


class Layer:
    """One decoder layer, with projections that share their input in one matrix. `int4` holds those of its weights that
    are quantized, by name below `prefix`."""

    def __init__(self, layer: Any, prefix: str, int4: Int4Layers) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        norms = (attention.q_norm.weight, attention.q_proj), (attention.k_norm.weight, attention.k_proj)
        self.qk_norm = torch.cat(  # [heads + kv_heads, head_dim]
            [norm.detach().expand(linear.out_features // len(norm), -1) for norm, linear in norms]
        )
        self.qkv, self.input_norm = int4.after_norm(
            layer.input_layernorm.weight, prefix + "self_attn.", attention, ("q_proj", "k_proj", "v_proj")
        )
        self.gate_up, self.post_norm = int4.after_norm(
            layer.post_attention_layernorm.weight, prefix + "mlp.", mlp, ("gate_proj", "up_proj")
        )
        self.out = int4.projection(prefix + "self_attn.o_proj", attention.o_proj)
        self.down = int4.projection(prefix + "mlp.down_proj", mlp.down_proj)


class Int4Layers:
    """Makes the projections of the text layers of what is quantized (by the names of linear layers) and what is not."""

    def __init__(self, weights: Mapping[str, Int4Weight], dtype: torch.dtype, device: torch.device) -> None:
        self._weights, self._dtype, self._device = weights, dtype, device
        self.switch: int | None = None

    def projection(self, name: str, linear: nn.Linear) -> nn.Module:
        return self._int4(self._weights[name]) if name in self._weights else linear

    def after_norm(self, norm: Tensor, prefix: str, module: Any, names: Sequence[str]) -> tuple[nn.Module, Tensor]:
        """The projections `names` of `module`, joined, and the weight of the norm before them, into which a scale of
        their input is folded where they share it."""
        linears, weights = (
            [getattr(module, name) for name in names],
            [self._weights.get(prefix + name) for name in names],
        )
        quantized = [weight for weight in weights if weight is not None]
        if not quantized:
            return joined(*linears), norm
        whole = join_int4(quantized) if len(quantized) == len(names) else None
        if whole is None:
            return _SideBySide(self.projection(prefix + name, getattr(module, name)) for name in names), norm
        if whole.pre_scale is not None:
            norm = (norm.float() * whole.pre_scale.to(self._device).float()).to(norm.dtype)
            whole = replace(whole, pre_scale=None)
        return self._int4(whole), norm

    def _int4(self, weight: Int4Weight) -> Int4Linear:
        linear = Int4Linear(weight, self._dtype, self._device)
        if self.switch is None:  # of the first, which is checked too; the others are alike
            check(linear, weight)
            self.switch = find_switch(linear)
        linear.switch = self.switch
        return linear


class _SideBySide(nn.Module):
    """Several projections of one input, their outputs behind each other."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


class TextLayers:
    """In torch, on any device and in any dtype."""

    def __init__(self, thinker: Qwen3ASRThinkerForConditionalGeneration, int4: Mapping[str, Int4Weight]) -> None:
        """`int4` holds the weights of quantized layers by name, from `thinker.` on."""
        text: Any = thinker.model
        config = text.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = text.layers[0].self_attn.head_dim
        self.eps = text.norm.variance_epsilon
        self.device, self.dtype = text.embed_tokens.weight.device, text.embed_tokens.weight.dtype
        self.last_norm, self._rotary = text.norm.weight, text.rotary_emb
        layers = Int4Layers(int4, self.dtype, self.device)
        self.layers = [Layer(each, f"thinker.model.layers.{i}.", layers) for i, each in enumerate(text.layers)]
        self.int4_switch = layers.switch

    def tables(self, length: int) -> Tables:
        like = torch.empty(0, device=self.device)
        cos, sin = self._rotary(like, torch.arange(length, device=self.device)[None])
        half = self.head_dim // 2
        return cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)

    def prefill(self, x: Tensor, tables: Tables, last: Tensor, write: Write) -> Tensor:
        """Embeddings [R, T, hidden] of prompts, each up to and with its position of int64 `last` [R] -> what the output
        layer takes of that position [R, hidden]."""
        num_rows, length, _ = x.shape
        cos, sin = tables[0][:length, None], tables[1][:length, None]
        for number, layer in enumerate(self.layers):
            q, k, v = self.qkv(layer, x, cos, sin)  # [R, T, heads, head_dim]
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            write(number, k, v)
            # a row's padding stands behind it, where nothing of it looks
            mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=True)
            if layer is self.layers[-1]:  # from here on only the last position of each prompt matters
                rows = torch.arange(num_rows, device=self.device)
                x, mixed = x[rows, last], mixed[rows, :, last].flatten(1)
            else:
                mixed = mixed.transpose(1, 2).flatten(2)
            x = x + layer.out(mixed)
            x = x + self.mlp(layer, x)
        return self.norm_of(x, self.last_norm)

    def step(
        self,
        x: Tensor,
        tables: Tables,
        positions: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        length: int,
    ) -> Tensor:
        """Embeddings [B, hidden] of tokens at `positions` int64 [B], none of which is `length` or more, of the rows in
        the first slots of `keys` and `values` ([slots, kv_heads, width, head_dim] a layer) -> what the output layer
        takes [B, hidden]."""
        num_rows = len(x)
        rows = torch.arange(num_rows, device=self.device)
        cos, sin = tables[0][positions][:, None], tables[1][positions][:, None]
        columns = torch.arange(length, device=self.device)
        seen = (columns <= positions[:, None])[:, None, None]  # [B, 1, 1, length]
        for layer, layer_keys, layer_values in zip(self.layers, keys, values, strict=True):
            q, k, v = self.qkv(layer, x, cos, sin)  # [B, heads, head_dim]
            layer_keys[rows, :, positions] = k
            layer_values[rows, :, positions] = v
            # query heads of a key head stand where other queries would: no key is repeated
            mixed = F.scaled_dot_product_attention(
                q.unflatten(1, (self.kv_heads, -1)),
                layer_keys[:num_rows, :, :length],
                layer_values[:num_rows, :, :length],
                attn_mask=seen,
            )
            x = x + layer.out(mixed.flatten(1))
            x = x + self.mlp(layer, x)
        return self.norm_of(x, self.last_norm)

    def qkv(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., hidden] -> queries [..., heads, head_dim], keys and values [..., kv_heads, head_dim]; cos and sin
        [..., 1, head_dim]."""
        qkv = layer.qkv(self.norm_of(x, layer.input_norm)).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=-2)
        qk = self.norm_of(qk, layer.qk_norm)
        # the rotation: each half of a head times cos, and the other half times sin (of which the first is negative);
        # in float32 until it is done
        qk = (qk * cos).addcmul_(qk.roll(self.head_dim // 2, dims=-1), sin).to(x.dtype)
        q, k = qk.split((self.heads, self.kv_heads), dim=-2)
        return q, k, v

    def mlp(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(self.norm_of(x, layer.post_norm)).chunk(2, dim=-1)
        down: Tensor = layer.down(F.silu(gate) * up)
        return down

    def norm_of(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.is_cuda or x.numel() < _SMALL:
            normal: Tensor = F.rms_norm(x, x.shape[-1:], eps=self.eps)
            return normal * weight
        # on a CPU torch has no kernel for it: fewer passes over the data
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale: Tensor = (length.square() / x.shape[-1] + self.eps).rsqrt()
        return (x * scale).to(x.dtype) * weight


def joined(*linears: nn.Linear) -> nn.Linear:
    """One projection that gives the outputs of several behind each other. Their weights become views of its own."""
    first, sizes = linears[0], [each.out_features for each in linears]
    whole = nn.Linear(first.in_features, sum(sizes), bias=False, device="meta")
    for name in ("weight", "bias"):
        parts = [getattr(each, name) for each in linears]
        if parts[0] is None:
            continue
        both = torch.cat([part.detach() for part in parts])
        setattr(whole, name, nn.Parameter(both, requires_grad=False))
        for part, view in zip(parts, both.split(sizes), strict=True):
            part.data = view
    return whole
