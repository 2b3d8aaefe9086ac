"""From int16 audio of many segments to embeddings of their audio, in one batch on the model's device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from qwen_asr.core.transformers_backend.modeling_qwen3_asr import Qwen3ASRAudioEncoder
from torch import Tensor

from pipeline.engine.cpu_convs import fused_convs
from pipeline.engine.graphs import WindowGraphs
from pipeline.engine.mel import HOP, NUM_FFT, LogMel
from pipeline.engine.windowed import encode, transformer

_REACH = NUM_FFT // 2  # samples that a frame looks to either side
_CACHED_FRAMES = 3000


class ClipMel:
    """Log-mel of clips, each as it would be alone: its end is mirrored as if nothing followed."""

    def __init__(self, num_mels: int, device: torch.device) -> None:
        self._mel = LogMel(num_mels).to(device)
        self._device = device

    def log_mel(self, audio: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """int16 clips of 200 samples and more -> float32 [B, mels, T], zero after a clip's end, and int64 [B] frames,
        on the CPU."""
        num_frames = torch.tensor([len(clip) // HOP for clip in audio])
        # on a CPU a few clips at a time, which its cache holds
        at_once = len(audio) if self._device.type == "cuda" else max(1, int(_CACHED_FRAMES // num_frames.max()))
        parts = [
            self._mel.padded(self._mirrored(audio[i : i + at_once]), num_frames[i : i + at_once].to(self._device))
            for i in range(0, len(audio), at_once)
        ]
        longest = int(num_frames.max())
        return torch.cat([F.pad(part, (0, longest - part.shape[-1])) for part in parts]), num_frames

    def _mirrored(self, audio: Sequence[np.ndarray]) -> Tensor:
        """float32 [B, 400 + num_samples] in [-1, 1], each clip with its mirror image before and behind it."""
        padded = np.zeros((len(audio), max(map(len, audio)) + 2 * _REACH), np.int16)
        for row, clip in zip(padded, audio, strict=True):
            row[: len(clip) + 2 * _REACH] = np.pad(clip, _REACH, mode="reflect")
        return torch.from_numpy(padded).to(self._device, non_blocking=True).to(torch.float32) / 32768


class AudioEncoder(ClipMel):
    """Log-mel and audio tower."""

    def __init__(self, tower: Qwen3ASRAudioEncoder, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(tower.config.num_mel_bins, device)
        self._tower, self._dtype = tower, dtype
        self._transformer = WindowGraphs() if device.type == "cuda" else transformer
        self._convs = fused_convs(tower)

    @torch.inference_mode()
    def __call__(self, audio: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """int16 clips of 200 samples and more -> embeddings [B, L, output_dim] and, on the CPU, their numbers int64
        [B]; rows beyond a clip's number are undefined."""
        mel, num_frames = self.log_mel(audio)
        return encode(self._tower, mel.to(self._dtype), num_frames, self._transformer, self._convs)
