"""The audio tower over a whole batch: attention windows as the published model means them, as a batch of windows.

Positions restart every 100 mel frames and attention windows of 104 tokens never see each other
(qwen_asr/core/transformers_backend/modeling_qwen3_asr.py, `Qwen3ASRAudioEncoder.forward`), so the windows of all clips
are one static batch `[N, <=104, d_model]` with a key mask on the tail. Differentiable: training and distillation use it
too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from qwen_asr.core.transformers_backend.modeling_qwen3_asr import Qwen3ASRAudioEncoder
from torch import Tensor, nn

Conv = Callable[[Tensor], Tensor]
"""A convolution of the tower and its activation."""

_CACHE_BYTES = 5 << 20
_MIN_CHUNKS = 8  # of the published width fewer cost half as much again
TOKENS_PER_CHUNK = 13  # of 100 mel frames, after three convolutions of stride 2


def num_audio_tokens(num_frames: Tensor) -> Tensor:
    """Audio tokens of clips of `num_frames` mel frames (int64, any shape)."""
    tail = num_frames % 100
    for _ in range(3):
        tail = (tail + 1) // 2
    return tail + num_frames // 100 * TOKENS_PER_CHUNK


def transformer(tower: Qwen3ASRAudioEncoder, x: Tensor, mask: Tensor | None) -> Tensor:
    """The tower's transformer over windows: x [N, window, d_model], mask bool [N, 1, 1, window] of the tokens that may
    be seen (None: all) -> [N, window, output_dim]."""
    for layer in tower.layers:
        attention = layer.self_attn
        h = layer.self_attn_layer_norm(x)
        q, k, v = (
            proj(h).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + attention.out_proj(h.transpose(1, 2).flatten(2))
        h = layer.activation_fn(layer.fc1(layer.final_layer_norm(x)))
        x = x + layer.fc2(h)
    embeddings: Tensor = tower.proj2(tower.act(tower.proj1(tower.ln_post(x))))
    return embeddings


def _chunks_at_once(tower: Qwen3ASRAudioEncoder, chunks: Tensor) -> int:
    """How many chunks to convolve together: all of them, but on a CPU as many as its cache holds between two layers."""
    if chunks.is_cuda:
        return max(1, len(chunks))
    num_bytes: int = tower.conv2d1.out_channels * chunks[0].numel() // 4 * chunks.element_size()
    return max(_MIN_CHUNKS, _CACHE_BYTES // num_bytes)


def convs_of(tower: Qwen3ASRAudioEncoder) -> list[Conv]:
    return [partial(_conv, conv) for conv in (tower.conv2d1, tower.conv2d2, tower.conv2d3)]


def _conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.gelu(conv(x))


def _convolved(tower: Qwen3ASRAudioEncoder, convs: Sequence[Conv], x: Tensor, width_left: Tensor | None) -> Tensor:
    """Chunks [M, 1, mels, 100] -> [M, 13, d]; `width_left` int64 [M] are the frames that each holds, where not all."""
    for conv in convs:
        x = conv(x)
        if width_left is not None:
            width_left = (width_left + 1) // 2
            x = x * (torch.arange(x.shape[-1], device=x.device) < width_left[:, None, None, None])
    embedded: Tensor = tower.conv_out(x.permute(0, 3, 1, 2).flatten(2))
    return embedded


def encode(
    tower: Qwen3ASRAudioEncoder,
    mel: Tensor,
    num_frames: Tensor,
    transformer: Callable[[Qwen3ASRAudioEncoder, Tensor, Tensor | None], Tensor] = transformer,
    convs: Sequence[Conv] | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode a batch of clips.

    mel [B, 128, T] zero-padded log-mel; num_frames int64 [B]; `transformer` is for a compiled one, `convs` for
    others than the tower's own. Returns embeddings [B, L, output_dim] and, on the CPU, their numbers int64 [B]; rows
    beyond a clip's number are undefined.
    """
    batch, num_mels, width = mel.shape
    chunk_frames = 2 * tower.n_window
    chunks_per_window = tower.n_window_infer // chunk_frames
    num_windows = -(-width // (chunk_frames * chunks_per_window))
    num_chunks = num_windows * chunks_per_window
    mel = F.pad(mel, (0, num_chunks * chunk_frames - width))
    chunks = mel.view(batch, num_mels, num_chunks, chunk_frames).transpose(1, 2)
    num_frames = num_frames.cpu()  # which is for free when it is there; what follows from it never waits for a device
    used = (torch.arange(num_chunks) * chunk_frames < num_frames[:, None]).flatten().nonzero()[:, 0]

    used_there = used.to(mel.device, non_blocking=True)
    x = chunks.flatten(0, 1)[used_there].unsqueeze(1)  # [M, 1, mels, 100]: only chunks that hold frames are convolved
    # upstream pads the last chunk of a clip to 100 frames, but not the only one: there the convolutions meet zeros
    widths = num_frames.clamp(max=chunk_frames)[:, None].expand(-1, num_chunks).flatten()[used]
    short = bool((num_frames < chunk_frames).any())
    size = _chunks_at_once(tower, x)
    convs = convs or convs_of(tower)
    parts = zip(x.split(size), widths.to(mel.device).split(size), strict=True)
    x = torch.cat([_convolved(tower, convs, part, width if short else None) for part, width in parts])  # [M, 13, d]
    x = x + tower.positional_embedding.positional_embedding[: x.shape[1]].to(x.dtype)
    grid = x.new_zeros(batch * num_chunks, *x.shape[1:])
    grid[used_there] = x
    num_tokens = num_audio_tokens(num_frames)
    window = chunks_per_window * TOKENS_PER_CHUNK
    tokens = grid.view(batch * num_windows, window, -1)
    valid = (torch.arange(num_windows * window) < num_tokens[:, None]).view(batch * num_windows, window)
    full = valid.any(dim=1).nonzero()[:, 0]  # windows that hold a token at all
    mask = None if bool(valid[full].all()) else valid[full][:, None, None, :].to(mel.device, non_blocking=True)
    full_there = full.to(mel.device, non_blocking=True)
    hidden = transformer(tower, tokens[full_there], mask)
    out = hidden.new_zeros(batch * num_windows, window, hidden.shape[-1])
    out[full_there] = hidden
    return out.view(batch, num_windows * window, -1), num_tokens
