"""The audio tower over streams: block after block, each mel frame once.

All steps of a block see each other; of what went before they see the `left_steps` newest, whose keys and values every
layer keeps. Convolutions run over 8 frames at a time, and positions count on from a stream's (or segment's) start.
The weights' meaning is that of qwen3_asr_causal 0.1.0 (causal.py: `QwenAudioCausalKVEncoder`). Its left context of 15 s
is 195 steps where it runs, as it counts them the way the offline tower pads its chunks (13 steps for 100 frames).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from qwen_asr.core.transformers_backend.modeling_qwen3_asr import Qwen3ASRAudioEncoder
from torch import Tensor

from pipeline.engine.causal.convolutions import FRAMES_PER_STEP, ChunkConvolutions
from pipeline.engine.windowed import transformer

STEP_S = 0.08


@dataclass(frozen=True, slots=True)
class Geometry:
    """`block_frames` mel frames are encoded at once; a step sees itself and `left_steps - 1` steps before it."""

    block_frames: int = 192
    left_steps: int = 195

    def __post_init__(self) -> None:
        if self.block_frames < FRAMES_PER_STEP or self.block_frames % FRAMES_PER_STEP:
            raise ValueError(f"block_frames ({self.block_frames}) must be a multiple of {FRAMES_PER_STEP}")
        if self.left_steps < self.block_steps:
            raise ValueError(f"left_steps ({self.left_steps}) must hold a block, which is {self.block_steps} steps")

    @property
    def block_steps(self) -> int:
        return self.block_frames // FRAMES_PER_STEP


def position_embedding(positions: Tensor, dim: int) -> Tensor:
    """The tower's sinusoids at any position, also beyond its table of 1500: int64 [...] -> float32 [..., dim]."""
    half = dim // 2
    rates = torch.exp(-math.log(10_000.0) / (half - 1) * torch.arange(half, device=positions.device).float())
    angles = positions[..., None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def embed(convolve: ChunkConvolutions, mel: Tensor, positions: Tensor) -> Tensor:
    """Convolutions and positions: mel [B, T, mels], positions int64 [B, T // 8] -> [B, T // 8, d_model]."""
    batch, num_frames, num_mels = mel.shape
    num_steps = num_frames // FRAMES_PER_STEP
    x = convolve(mel[:, : num_steps * FRAMES_PER_STEP].reshape(-1, FRAMES_PER_STEP, num_mels))
    x = x.view(batch, num_steps, -1)
    return x + position_embedding(positions, x.shape[-1]).to(x.dtype)


def encode_whole(
    tower: Qwen3ASRAudioEncoder,
    mel: Tensor,
    geometry: Geometry,
    offsets: Tensor | None = None,
    num_steps: Tensor | None = None,
) -> Tensor:
    """All blocks of recordings in one pass, as streams would give them; differentiable.

    mel [B, T, mels] -> [B, T // 8, output_dim]; `offsets` int64 [B] are the positions that they begin at (0),
    `num_steps` int64 [B] how many steps of each are its own (all): what lies beyond is undefined.
    """
    length = mel.shape[1] // FRAMES_PER_STEP
    steps = torch.arange(length, device=mel.device)
    offsets = torch.zeros(len(mel), dtype=torch.int64, device=mel.device) if offsets is None else offsets
    x = embed(ChunkConvolutions(tower), mel, offsets[:, None] + steps)
    block = steps // geometry.block_steps
    seen = (block <= block[:, None]) & (steps > steps[:, None] - geometry.left_steps)  # [queries, keys]
    mask = seen[None, None]
    if num_steps is not None:  # a step beyond the end sees itself, as one that sees nothing would give NaN
        own = (steps < num_steps[:, None])[:, None, None]
        mask = (mask & own) | torch.eye(length, dtype=torch.bool, device=mel.device)
    return transformer(tower, x, mask)


class StreamTower:
    """The tower with the keys and values of `num_slots` streams, each in a ring of `left_steps` at its own age."""

    def __init__(self, tower: Qwen3ASRAudioEncoder, geometry: Geometry, num_slots: int) -> None:
        self._tower, self.geometry = tower, geometry
        with torch.inference_mode():
            self._convolve = ChunkConvolutions(tower)
        weight = tower.conv_out.weight
        self._device, self._dtype = weight.device, weight.dtype
        heads = tower.config.encoder_attention_heads
        shape = (num_slots, heads, geometry.left_steps, tower.config.d_model // heads)
        self._keys, self._values = (
            [torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in tower.layers] for _ in range(2)
        )
        self.num_steps = np.zeros(num_slots, np.int64)
        """Of each slot's stream, how many steps it has encoded: its age."""

    @property
    def bytes_per_slot(self) -> int:
        return sum(cache[0].numel() * cache.element_size() for cache in (*self._keys, *self._values))

    def reset(self, slots: Sequence[int]) -> None:
        """New streams (or segments) begin in `slots`."""
        self.num_steps[list(slots)] = 0

    @torch.inference_mode()
    def clear(self, slots: Sequence[int]) -> None:
        """Forgets what is not finite there: NaN is NaN to who comes after, also where it does not look."""
        for cache in (*self._keys, *self._values):
            cache[list(slots)] = 0

    @torch.inference_mode()
    def encode(self, slots: Sequence[int], mel: Tensor, num_steps: Sequence[int] | None = None) -> Tensor:
        """The next block of the streams in `slots`: mel [B, block_frames, mels] -> [B, block_steps, output_dim].

        `num_steps` says how many steps of each are its own; a stream whose block is not full has ended with it. What
        lies beyond its own steps is undefined.
        """
        length = self.geometry.block_steps
        sizes = np.full(len(slots), length) if num_steps is None else np.array(num_steps)
        ages = self.num_steps[list(slots)]
        began = torch.from_numpy(ages).to(self._device)
        steps = torch.arange(length, device=self._device)
        rows = torch.tensor(list(slots), device=self._device)
        used = min(self.geometry.left_steps, int(ages.max(initial=0)))  # of the rings, whose rest nobody has filled
        own = torch.from_numpy(sizes).to(self._device)
        mask = torch.cat([self._ring_mask(began, steps, used), self._block_mask(own, steps)], dim=-1)[:, None]
        places = (began[:, None] + steps) % self.geometry.left_steps
        written = (steps < own[:, None]).nonzero(as_tuple=True) if (sizes < length).any() else None
        x = embed(self._convolve, mel.to(self._device, self._dtype), began[:, None] + steps)
        for layer, keys, values in zip(self._tower.layers, self._keys, self._values, strict=True):
            x = self._layer(layer, x, keys, values, rows, used, mask, places, written)
        self.num_steps[list(slots)] += sizes
        tower = self._tower
        hidden: Tensor = tower.proj2(tower.act(tower.proj1(tower.ln_post(x))))
        return hidden

    def _ring_mask(self, began: Tensor, steps: Tensor, used: int) -> Tensor:
        """bool [B, steps, used]: which places of the ring hold a step that a step of the block may see."""
        size = self.geometry.left_steps
        place = torch.arange(used, device=self._device)
        held = began[:, None] - 1 - (began[:, None] - 1 - place) % size  # the newest step that fell on each place
        oldest = (began[:, None] + steps - size + 1).clamp(min=0)
        return held[:, None] >= oldest[..., None]

    def _block_mask(self, own: Tensor, steps: Tensor) -> Tensor:
        return (steps < own[:, None])[:, None].expand(-1, len(steps), -1)

    def _layer(
        self,
        layer: Any,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Tensor,
        used: int,
        mask: Tensor,
        places: Tensor,
        written: tuple[Tensor, ...] | None,
    ) -> Tensor:
        attention = layer.self_attn
        h = layer.self_attn_layer_norm(x)
        q, k, v = (
            proj(h).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        all_keys, all_values = (torch.cat([ring[rows, :, :used], new], dim=2) for ring, new in ((keys, k), (values, v)))
        h = F.scaled_dot_product_attention(q, all_keys, all_values, attn_mask=mask)
        for ring, new in ((keys, k.transpose(1, 2)), (values, v.transpose(1, 2))):  # [B, steps, heads, head_dim]
            if written is None:
                ring[rows[:, None], :, places] = new
            else:
                ring[rows[written[0]], :, places[written]] = new[written]
        x = x + attention.out_proj(h.transpose(1, 2).flatten(2))
        h = layer.activation_fn(layer.fc1(layer.final_layer_norm(x)))
        mixed: Tensor = x + layer.fc2(h)
        return mixed
