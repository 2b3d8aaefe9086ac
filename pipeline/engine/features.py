"""From int16 audio of many segments to embeddings of their audio, in one batch on the model's device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from qwen_asr.core.transformers_backend.modeling_qwen3_asr import Qwen3ASRAudioEncoder
from torch import Tensor

from pipeline.engine.cpu_convs import fused_convs
from pipeline.engine.cpu_mel import CpuMel
from pipeline.engine.graphs import WindowGraphs
from pipeline.engine.mel import HOP, NUM_FFT, LogMel
from pipeline.engine.windowed import encode, transformer

_REACH = NUM_FFT // 2  # samples that a frame looks to either side


class ClipMel:
    """Log-mel of clips, each as it would be alone: its end is mirrored as if nothing followed."""

    def __init__(self, num_mels: int, device: torch.device) -> None:
        self._mel = LogMel(num_mels).to(device)
        self._on_cpu = CpuMel(self._mel) if device.type == "cpu" else None
        self._device = device

    def log_mel(self, audio: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """int16 clips of 200 samples and more -> float32 [B, mels, T], zero after a clip's end, and int64 [B] frames,
        on the CPU."""
        num_frames = torch.tensor([len(clip) // HOP for clip in audio])
        padded = _mirrored(audio)
        if self._on_cpu is not None:
            return self._on_cpu(padded, num_frames.numpy()), num_frames
        there = torch.from_numpy(padded).to(self._device, non_blocking=True).to(torch.float32) / 32768
        return self._mel.padded(there, num_frames.to(self._device)), num_frames


def _mirrored(audio: Sequence[np.ndarray]) -> np.ndarray:
    """int16 [B, 400 + num_samples], each clip with its mirror image before and behind it."""
    padded = np.zeros((len(audio), max(map(len, audio)) + 2 * _REACH), np.int16)
    for row, clip in zip(padded, audio, strict=True):
        row[: len(clip) + 2 * _REACH] = np.pad(clip, _REACH, mode="reflect")
    return padded


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
