"""Whisper's log-mel spectrogram of a batch, in torch on the model's device.

Follows `transformers.WhisperFeatureExtractor` (128 mels, 25 ms windows, 10 ms hop), whose filter bank it uses.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor

HOP = 160
NUM_FFT = 400


class LogMel(nn.Module):
    """Float audio [B, num_samples] in [-1, 1], zero-padded at the end, to log-mel [B, 128, num_samples // 160]."""

    filters: Tensor
    window: Tensor

    def __init__(self, num_mels: int = 128) -> None:
        super().__init__()
        filters = WhisperFeatureExtractor(feature_size=num_mels).mel_filters  # [201, num_mels]
        self.register_buffer("filters", torch.tensor(filters, dtype=torch.float32).T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(NUM_FFT), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        spectrum = torch.stft(audio, NUM_FFT, HOP, window=self.window, return_complex=True)[..., :-1]
        mel = self.filters @ torch.view_as_real(spectrum).square().sum(-1)
        log = mel.clamp(min=1e-10).log10()
        log = torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - 8.0)
        return (log + 4.0) / 4.0
