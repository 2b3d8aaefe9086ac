"""A Qwen3-ASR model as training runs it: the audio of a whole batch at once, logits only where an answer is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.distill.collate import NO_LOSS
from pipeline.engine.windowed import encode


class Listener(nn.Module):
    """Wraps the `thinker` of qwen-asr's model; its audio tower learns nothing here."""

    def __init__(self, thinker: Any) -> None:
        super().__init__()
        self.thinker = thinker
        self._audio_token: int = thinker.config.audio_token_id

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """A batch of `collate` on the model's device -> logits [N, vocabulary] at the places that its labels follow, in
        their order."""
        ids, wanted = batch["input_ids"], batch["labels"][:, 1:] != NO_LOSS
        num_frames = batch["feature_attention_mask"].sum(1)
        with torch.no_grad():
            audio, num_tokens = encode(self.thinker.audio_tower, batch["input_features"], num_frames)
            inside = torch.arange(audio.shape[1]) < num_tokens[:, None]
            hidden = self.thinker.model.embed_tokens(ids)
            places = (ids == self._audio_token)[:, :, None].expand_as(hidden)
            hidden = hidden.masked_scatter(places, audio[inside.to(audio.device)].to(hidden.dtype))
        # padding stands behind a row, where nothing of it looks; on a CPU the plain kernel's backward is the faster one
        with sdpa_kernel(kernels(ids.is_cuda)):
            hidden = self.thinker.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        logits: Tensor = self.thinker.lm_head(hidden[:, :-1][wanted])
        return logits


def kernels(is_cuda: bool) -> list[SDPBackend]:
    """Of attention, for training."""
    if not is_cuda:
        return [SDPBackend.MATH]
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
