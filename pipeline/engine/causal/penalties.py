"""What greedy decoding may not say again: qwen3_asr_causal's controls (model.py: `_GreedyControlSession`), in order:
tokens that are never chosen, the penalty on those of the history, the ban on what would complete an n-gram of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """`repetition` divides the positive logits of tokens in the history and multiplies the negative ones; no `ngram`
    tokens in a row come twice (0: they may); `suppressed` ids never come."""

    repetition: float = 1.15
    ngram: int = 3
    suppressed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.repetition <= 0 or self.ngram < 0:
            raise ValueError(f"repetition must be above 0 and ngram not below, not {self.repetition} and {self.ngram}")


def penalize(logits: Tensor, history: Tensor, sizes: Tensor, penalties: Penalties) -> Tensor:
    """A copy of logits float32 [M, vocabulary] under `penalties`; row m has said the first `sizes[m]` of its tokens in
    `history` int64 [M, L]."""
    logits = logits.clone()
    if penalties.suppressed:
        logits[:, list(penalties.suppressed)] = -torch.inf
    said = torch.arange(history.shape[1], device=history.device) < sizes[:, None]
    if penalties.repetition != 1.0 and history.shape[1]:
        tokens = history.where(said, history[:, :1])  # the first again, where a row has said less
        found = logits.gather(1, tokens)
        lower = found.where(found < 0, found / penalties.repetition)
        lower = lower.where(found >= 0, found * penalties.repetition)
        logits.scatter_(1, tokens, lower.where(sizes[:, None] > 0, found))
    if penalties.ngram:
        rows, tokens = _completing(history, sizes, said, penalties.ngram)
        logits[rows, tokens] = torch.finfo(logits.dtype).min
    return logits


def _completing(history: Tensor, sizes: Tensor, said: Tensor, ngram: int) -> tuple[Tensor, Tensor]:
    """Rows and tokens that would complete an n-gram of the row's history a second time."""
    context = ngram - 1
    num_places = history.shape[1] - context
    if num_places <= 0:
        empty = sizes[:0]
        return empty, empty
    matches = said[:, context:].clone()  # [M, places]: the token behind the context is the row's own
    for back in range(1, context + 1):
        newest = history.gather(1, (sizes - back).clamp(min=0)[:, None])
        matches &= history[:, context - back : context - back + num_places] == newest
    rows, places = (matches & (sizes >= ngram)[:, None]).nonzero(as_tuple=True)
    return rows, history[rows, places + context]
