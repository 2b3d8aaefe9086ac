"""Qwen3's text layers over a fixed number of slots: a row a segment, each at its own position in a preallocated cache.

The published layers (qwen_asr/core/transformers_backend/modeling_qwen3_asr.py, `Qwen3ASRThinkerTextModel`), called
directly. The three position ids of its rotary embedding are always equal (`get_rope_index`), so that it is a plain one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from qwen_asr.core.transformers_backend.modeling_qwen3_asr import Qwen3ASRThinkerForConditionalGeneration
from torch import Tensor, nn

from pipeline.engine.cpu_attention import DTYPES, attend
from pipeline.engine.graphs import Graph
from pipeline.engine.int4 import Int4Linear, Int4Weight, check, find_switch
from pipeline.engine.int4 import joined as join_int4

_SMALL = 1 << 17  # numbers
_ROW_STEP = 8  # slots of a step are a multiple of it
_GRAPH_LENGTH_STEP = 256
_WIDTH_STEP = 64  # positions: attention reads the cache up to a multiple of it, which keeps its shapes few


class Choice(NamedTuple):
    """What greedy decoding chose for some rows: token ids int64 [B], their log-probabilities float32 [B] (NaN where
    logits are), and the top-k log-probabilities float32 [B, k] with their ids int64 [B, k], k 0 when not asked for."""

    tokens: Tensor
    logprobs: Tensor
    top_logprobs: Tensor
    top_ids: Tensor


class Fetch:
    """A choice on its way to the host: on CUDA the copy is queued behind the step that made it, and nobody waits for it
    before `read`."""

    def __init__(self, choice: Choice) -> None:
        self._event: torch.cuda.Event | None = None
        self._choice = choice
        if choice.tokens.is_cuda:
            self._choice = Choice(*(_on_its_way(each) for each in choice))
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Choice:
        """On the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._choice


def _on_its_way(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class _Layer:
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


class SlotDecoder:
    """Greedy decoding for `num_slots` rows of at most `width` positions each.

    `prefill` starts rows in free slots, `step` moves the first slots one token on; a slot whose row has ended goes on
    with nonsense until it is filled anew. Nothing here waits for the device.
    """

    def __init__(
        self,
        thinker: Qwen3ASRThinkerForConditionalGeneration,
        num_slots: int,
        width: int,
        int4: Mapping[str, Int4Weight] | None = None,
        num_top: int = 0,
    ) -> None:
        """`int4` holds the weights of quantized layers by name, from `thinker.` on."""
        text: Any = thinker.model
        config = text.config
        self.num_top = num_top
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = text.layers[0].self_attn.head_dim
        self._embed, self._norm, self._lm_head = text.embed_tokens, text.norm.weight, thinker.lm_head
        self._eps = text.norm.variance_epsilon
        self._rotary = text.rotary_emb
        weight = self._embed.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._attends_on_cpu = self._device.type == "cpu" and self._dtype in DTYPES
        layers = Int4Layers(int4 or {}, self._dtype, self._device)
        self._layers = [_Layer(each, f"thinker.model.layers.{i}.", layers) for i, each in enumerate(text.layers)]
        self.int4_switch = layers.switch
        self.num_slots = self.width = 0
        self._tokens = self._positions = torch.empty(0, dtype=torch.int64)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self.resize(num_slots, width)

    @staticmethod
    def bytes_per_position(thinker: Qwen3ASRThinkerForConditionalGeneration) -> int:
        """Cache bytes of one position of one slot."""
        config, weight = thinker.model.config, thinker.model.embed_tokens.weight
        head_dim = thinker.model.layers[0].self_attn.head_dim
        return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * weight.element_size())

    def resize(self, num_slots: int, width: int, keep: Sequence[int] = ()) -> None:
        """Another number of slots or width; the rows of slots `keep` are in the first slots afterwards, in order."""
        width = -(-width // _WIDTH_STEP) * _WIDTH_STEP
        shape = (num_slots, self._kv_heads, width, self._head_dim)
        kept = torch.tensor(list(keep), dtype=torch.int64, device=self._device)
        common = min(width, self.width)
        for caches in (self._keys, self._values):
            for index in range(len(self._layers)):  # one after the other, so that two of a layer are there at most
                cache = torch.zeros(shape, dtype=self._dtype, device=self._device)
                if len(keep):
                    cache[: len(keep), :, :common] = caches[index][kept, :, :common]
                if self.width:
                    caches[index] = cache
                else:
                    caches.append(cache)
        tokens, positions = (torch.zeros(num_slots, dtype=torch.int64, device=self._device) for _ in range(2))
        if len(keep):
            tokens[: len(keep)], positions[: len(keep)] = self._tokens[kept], self._positions[kept]
        self._tokens, self._positions = tokens, positions
        self._rows = torch.arange(num_slots, device=self._device)
        self._columns = torch.arange(width, device=self._device)
        self._cos, self._sin = self._rotary_tables(width)
        self.num_slots, self.width = num_slots, width
        self._graphs: dict[tuple[int, int], Graph[Choice]] = {}  # of these tensors

    @torch.inference_mode()
    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Rows in slots `sources` go to slots `targets`, none of which is among the sources."""
        old, new = (torch.tensor(list(slots), device=self._device) for slots in (sources, targets))
        for tensor in (*self._keys, *self._values, self._tokens, self._positions):
            tensor[new] = tensor[old]

    @torch.inference_mode()
    def prefill(self, slots: Sequence[int], embeddings: Tensor, num_positions: Sequence[int]) -> Choice:
        """Starts a row in each of `slots` from a prompt's embeddings [R, T, hidden], of which the first `num_positions`
        are its own; chooses the first token of each."""
        num_rows, length, _ = embeddings.shape
        index = torch.tensor(list(slots), device=self._device)
        last = torch.tensor(list(num_positions), device=self._device) - 1
        cos, sin = self._cos[:length, None], self._sin[:length, None]
        x = embeddings
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            q, k, v = self._qkv(layer, x, cos, sin)  # [R, T, heads, head_dim]
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            keys[index, :, :length] = k
            values[index, :, :length] = v
            # a row's padding stands behind it, where nothing of it looks
            mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=True)
            if layer is self._layers[-1]:  # from here on only the last position of each prompt matters
                rows = torch.arange(num_rows, device=self._device)
                x, mixed = x[rows, last], mixed[rows, :, last].flatten(1)
            else:
                mixed = mixed.transpose(1, 2).flatten(2)
            x = x + layer.out(mixed)
            x = x + self._mlp(layer, x)
        choice = self._choose(x)
        self._tokens[index] = choice.tokens
        self._positions[index] = last + 1
        return choice

    def num_rows_for(self, num_rows: int) -> int:
        """The next number of slots that a step takes: few different ones, as each is a graph on CUDA."""
        if self._device.type == "cuda":
            return min(1 << max(num_rows - 1, 7).bit_length(), self.num_slots)
        return min(-(-num_rows // _ROW_STEP) * _ROW_STEP, self.num_slots)

    @torch.inference_mode()
    def step(self, num_rows: int, length: int) -> Choice:
        """Feeds the newest token of each of the first `num_rows` slots and chooses the next; no row that matters may be
        longer than `length` with it."""
        to = _GRAPH_LENGTH_STEP if self._device.type == "cuda" else _WIDTH_STEP
        length = min(-(-length // to) * to, self.width)
        if self._device.type != "cuda":
            return self._step(num_rows, length)
        key = num_rows, length
        if key not in self._graphs:
            state = self._tokens.clone(), self._positions.clone()  # what the warm-up moves on; the cache it writes anew
            self._graphs[key] = Graph(partial(self._step, num_rows, length))
            self._tokens.copy_(state[0])
            self._positions.copy_(state[1])
        return Choice(*(each.clone() for each in self._graphs[key]()))

    def _step(self, num_rows: int, length: int) -> Choice:
        rows, tokens, next_positions = self._rows[:num_rows], self._tokens[:num_rows], self._positions[:num_rows]
        positions = next_positions.clamp(max=self.width - 1)  # of slots whose row has ended
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        seen = (self._columns[:length] <= positions[:, None])[:, None, None]  # [B, 1, 1, length]
        x = self._embed(tokens)
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            q, k, v = self._qkv(layer, x, cos, sin)  # [B, heads, head_dim]
            keys[rows, :, positions] = k
            values[rows, :, positions] = v
            # query heads of a key head stand where other queries would: no key is repeated
            q = q.unflatten(1, (self._kv_heads, -1))
            if self._attends_on_cpu:
                mixed = attend(q, keys, values, positions)
            else:
                mixed = F.scaled_dot_product_attention(
                    q, keys[:num_rows, :, :length], values[:num_rows, :, :length], attn_mask=seen
                )
            x = x + layer.out(mixed.flatten(1))
            x = x + self._mlp(layer, x)
        choice = self._choose(x)
        tokens.copy_(choice.tokens)
        next_positions.add_(1).clamp_(max=self.width)
        return choice

    def _qkv(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., hidden] -> queries [..., heads, head_dim], keys and values [..., kv_heads, head_dim]; cos and sin
        [..., 1, head_dim]."""
        qkv = layer.qkv(self._norm_of(x, layer.input_norm)).unflatten(-1, (-1, self._head_dim))
        qk, v = qkv.split((self._heads + self._kv_heads, self._kv_heads), dim=-2)
        qk = self._norm_of(qk, layer.qk_norm)
        # the rotation: each half of a head times cos, and the other half times sin (of which the first is negative);
        # in float32 until it is done
        qk = (qk * cos).addcmul_(qk.roll(self._head_dim // 2, dims=-1), sin).to(x.dtype)
        q, k = qk.split((self._heads, self._kv_heads), dim=-2)
        return q, k, v

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(self._norm_of(x, layer.post_norm)).chunk(2, dim=-1)
        down: Tensor = layer.down(F.silu(gate) * up)
        return down

    def _norm_of(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.is_cuda or x.numel() < _SMALL:
            normal: Tensor = F.rms_norm(x, x.shape[-1:], eps=self._eps)
            return normal * weight
        # on a CPU torch has no kernel for it: fewer passes over the data
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale: Tensor = (length.square() / x.shape[-1] + self._eps).rsqrt()
        return (x * scale).to(x.dtype) * weight

    def _choose(self, x: Tensor) -> Choice:
        logits = self._lm_head(self._norm_of(x, self._norm)).float()
        best, tokens = logits.max(dim=-1)
        total = logits.logsumexp(dim=-1)
        top, top_ids = (
            logits.topk(self.num_top, dim=-1) if self.num_top else (best[:, None][:, :0], tokens[:, None][:, :0])
        )
        return Choice(tokens, best - total, top - total[:, None], top_ids)

    def _rotary_tables(self, width: int) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, device=self._device)
        cos, sin = self._rotary(like, torch.arange(width, device=self._device)[None])
        half = self._head_dim // 2
        return cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)


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
