"""A segment on its way through the offline engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.decoder import Prefilled
from pipeline.engine.inbox import Item
from pipeline.engine.model import LoadedModel

MIN_NEW_TOKENS = 32
_EXPECTED_TOKENS_PER_S = 10.0  # cache that a row gets to begin with; it grows when one writes more


@dataclass(slots=True, eq=False)
class Row(Item):
    """A segment on its way. `head` and `tail` are the prompt's token ids around its audio; `num_positions` the whole
    prompt's length; `embeddings` float [num_audio_tokens, hidden] once it is encoded."""

    language: str | None = None
    head: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    num_positions: int = 0
    max_new_tokens: int = 0
    embeddings: Tensor | None = None
    encoded: torch.cuda.Event | None = None  # when they are there, on CUDA
    ahead: Prefilled | None = None  # its prompt, when it was prefilled before it had a slot
    may_go_ahead: bool = True
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_ids: list[np.ndarray] = field(default_factory=list)  # int64 [k] a token, when asked for
    top_logprobs: list[np.ndarray] = field(default_factory=list)
    alone: bool = False  # something failed with it: it is tried again by itself
    done: bool = False

    @property
    def length(self) -> int:
        """Positions that are filled once its newest token is fed."""
        return self.num_positions + len(self.token_ids)

    @property
    def expected_length(self) -> int:
        """Cache positions that it gets to begin with."""
        expected = MIN_NEW_TOKENS + math.ceil(_EXPECTED_TOKENS_PER_S * self.segment.duration_s)
        return self.num_positions + min(self.max_new_tokens, expected)

    def reset(self) -> None:
        self.embeddings, self.encoded, self.ahead = None, None, None
        self.token_ids, self.logprobs, self.top_ids, self.top_logprobs = [], [], [], []


def fits(batch: Sequence[Row], row: Row, max_positions: int) -> bool:
    """Whether `batch`, padded to its longest, stays within so many positions with `row`; one always does."""
    if not batch:
        return True
    longest = max(row.num_positions, *(each.num_positions for each in batch))
    return not (row.alone or batch[0].alone) and longest * (len(batch) + 1) <= max_positions


class Prompts:
    """What the text layers take of rows that are encoded."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._thinker: Any = loaded.model.thinker
        self._device = loaded.device

    @torch.inference_mode()
    def embeddings(self, rows: Sequence[Row]) -> Tensor:
        """[R, T, hidden], T the longest prompt's positions."""
        longest = max(row.num_positions for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        is_audio = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row.head)] = torch.tensor(row.head)
            ids[i, row.num_positions - len(row.tail) : row.num_positions] = torch.tensor(row.tail)
            is_audio[i, len(row.head) : row.num_positions - len(row.tail)] = True
        for row in rows:
            if row.encoded is not None and row.embeddings is not None:
                torch.cuda.current_stream(self._device).wait_event(row.encoded)
                row.embeddings.record_stream(torch.cuda.current_stream(self._device))
        embeddings: Tensor = self._thinker.model.embed_tokens(ids.to(self._device))
        audio = torch.cat([row.embeddings for row in rows if row.embeddings is not None])
        embeddings[is_audio.to(self._device)] = audio.to(embeddings.dtype)
        return embeddings
