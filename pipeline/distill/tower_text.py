"""What a causal tower may learn from beside embeddings: texts, through the model's own decoder, which stands still."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from pipeline.distill.collate import answer_ids, prompt
from pipeline.distill.examples import ExampleRef
from pipeline.distill.forward import kernels


class TextLoss:
    """Cross-entropy of a decoder with the texts of examples, behind embeddings of their audio."""

    def __init__(self, wrapper: Any, dtype: torch.dtype) -> None:
        thinker: Any = wrapper.model.thinker
        self._model = thinker.model.to(dtype).requires_grad_(False)
        self._head = thinker.lm_head.to(dtype).requires_grad_(False)
        self._tokenizer, self._dtype = wrapper.processor.tokenizer, dtype
        self._before, self._after, _ = prompt(wrapper.processor)

    def __call__(self, heard: Tensor, num_steps: Sequence[int], refs: Sequence[ExampleRef]) -> Tensor:
        """heard [B, S, hidden], of which `num_steps` are an example's own -> the mean over all tokens of the texts."""
        device = heard.device
        rows, answers, starts = [], [], []
        for audio, size, ref in zip(heard.to(self._dtype), num_steps, refs, strict=True):
            answer = answer_ids(self._tokenizer, ref.language, ref.text)
            embed = self._model.embed_tokens
            before, after = (
                embed(torch.tensor(ids, device=device)) for ids in (self._before, [*self._after, *answer[:-1]])
            )
            rows.append(torch.cat([before, audio[:size], after]))
            answers.append(torch.tensor(answer, device=device))
            starts.append(len(rows[-1]) - len(answer))
        x = pad_sequence(rows, batch_first=True)
        # as in Listener: padding stands behind a row, and a CPU's plain kernel has the faster backward
        with sdpa_kernel(kernels(heard.is_cuda)):
            hidden = self._model(inputs_embeds=x, use_cache=False).last_hidden_state
        places = [row[start : start + len(ids)] for row, start, ids in zip(hidden, starts, answers, strict=True)]
        logits = self._head(torch.cat(places)).float()
        return F.cross_entropy(logits, torch.cat(answers))
