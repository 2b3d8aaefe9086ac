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
        return _compressed(self._log(spectrum))

    def padded(self, audio: Tensor, num_frames: Tensor) -> Tensor:
        """The same for clips of their own lengths (int64 [B], in frames), each with 200 samples of its own mirror image
        before its start and behind its end: [B, 400 + num_samples] to [B, 128, num_samples // 160], zero after a clip's
        end."""
        width = (audio.shape[-1] - NUM_FFT) // HOP
        spectrum = torch.stft(audio, NUM_FFT, HOP, window=self.window, center=False, return_complex=True)[..., :width]
        inside = torch.arange(width, device=audio.device) < num_frames[:, None, None]
        # below what any frame has, so that it sets no maximum
        return _compressed(self._log(spectrum).where(inside, -torch.inf)).where(inside, 0.0)

    def log(self, audio: Tensor) -> Tensor:
        """Frames whose samples are all there, before the range is compressed: [B, 400 + 160 (T - 1)] -> log10 of mel
        power [B, 128, T]."""
        return self._log(torch.stft(audio, NUM_FFT, HOP, window=self.window, center=False, return_complex=True))

    def _log(self, spectrum: Tensor) -> Tensor:
        parts = torch.view_as_real(spectrum)
        mel = self.filters @ torch.addcmul(parts[..., 0].square(), parts[..., 1], parts[..., 1])
        return mel.clamp(min=1e-10).log10()


def _compressed(log: Tensor) -> Tensor:
    log = torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - 8.0)
    return (log + 4.0) / 4.0
