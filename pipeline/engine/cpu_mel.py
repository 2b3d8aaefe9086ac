"""Log-mel on a CPU, clip by clip in blocks of frames that its cache holds: half of a 30-s clip's time in torch, whose
filter bank is a whole matrix (of 402 numbers that are not zero)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.cpu_kernels import by_rows, compiled
from pipeline.engine.mel import HOP, NUM_FFT, LogMel

_FRAMES = 512  # of a block
_AT_ONCE = 16  # frames that a filter is applied to


class CpuMel:
    """See features.ClipMel."""

    def __init__(self, mel: LogMel) -> None:
        self._filters = mel.filters.numpy()  # [mels, 201]
        is_used = self._filters > 0
        self._begins = is_used.argmax(axis=1)
        self._ends = self._filters.shape[1] - is_used[:, ::-1].argmax(axis=1)
        self._window = mel.window.numpy() / np.float32(32768)

    def __call__(self, padded: np.ndarray, num_frames: np.ndarray) -> Tensor:
        """int16 [B, 400 + num_samples] and int64 [B] as LogMel.padded takes them -> float32 [B, mels, T]."""
        mel = np.zeros((len(padded), len(self._filters), int(num_frames.max())), np.float32)

        def work(clips: slice) -> None:
            for clip, size, out in zip(padded[clips], num_frames[clips], mel[clips], strict=True):
                self._clip(clip, out[:, :size])

        by_rows(len(padded), padded.shape[1], work)
        return torch.from_numpy(mel)

    def _clip(self, clip: np.ndarray, out: np.ndarray) -> None:
        for begin in range(0, out.shape[1], _FRAMES):
            frames = np.empty((min(_FRAMES, out.shape[1] - begin), NUM_FFT), np.float32)
            _windowed(clip[begin * HOP :], self._window, HOP, frames)
            spectrum = torch.fft.rfft(torch.from_numpy(frames)).numpy()
            _filtered(spectrum, self._filters, self._begins, self._ends, out[:, begin : begin + len(frames)])
        torch.from_numpy(out).log10_()
        _compressed(out, out.max() - 8.0)


@compiled
def _windowed(clip: Any, window: Any, hop: int, frames: Any) -> None:
    for number in range(len(frames)):
        samples, frame = clip[number * hop : number * hop + len(window)], frames[number]
        for i in range(len(window)):
            frame[i] = window[i] * np.float32(samples[i])


@compiled
def _filtered(spectrum: Any, filters: Any, begins: Any, ends: Any, mel: Any) -> None:
    num_frames, num_bins = spectrum.shape
    powers, sums = np.zeros((num_bins, _AT_ONCE), np.float32), np.empty(_AT_ONCE, np.float32)
    for first in range(0, num_frames, _AT_ONCE):
        size = min(_AT_ONCE, num_frames - first)
        for frame in range(size):
            bins = spectrum[first + frame]
            for i in range(num_bins):
                powers[i, frame] = bins[i].real * bins[i].real + bins[i].imag * bins[i].imag
        for number in range(len(filters)):
            sums[:] = 0
            for i in range(begins[number], ends[number]):
                for frame in range(_AT_ONCE):
                    sums[frame] += filters[number, i] * powers[i, frame]
            for frame in range(size):
                mel[number, first + frame] = max(sums[frame], np.float32(1e-10))


@compiled
def _compressed(log: Any, lowest: float) -> None:
    for row in log:
        for i in range(len(row)):
            row[i] = (max(row[i], np.float32(lowest)) + np.float32(4)) * np.float32(0.25)
