"""Log-mel frames of a stream as its audio arrives: those of the whole recording, but for one thing. The dynamic range
is cut 8 below the loudest frame, which for a stream is the loudest so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.mel import HOP, NUM_FFT, LogMel

_REACH = NUM_FFT // 2  # samples that a frame looks to either side
_RANGE = 8.0  # log10 of power
_SAMPLE_BYTES = 2


class StreamAudio:
    """The samples of a stream that are still needed. Frames are counted from the stream's start."""

    def __init__(self, first_sample: int = 0) -> None:
        """`first_sample`: a stream that goes on is given its audio from there."""
        self._samples = bytearray()
        self._begin = first_sample  # of what is held
        self.is_ended = False

    @property
    def num_samples(self) -> int:
        """Of the whole stream, as far as it has been heard."""
        return self._begin + len(self._samples) // _SAMPLE_BYTES

    @property
    def num_frames(self) -> int:
        """Frames that can be computed: all that no later sample changes, and after the end all."""
        heard = self.num_samples
        if heard <= _REACH:
            return 0
        return heard // HOP if self.is_ended else (heard - _REACH) // HOP + 1

    @property
    def num_bytes(self) -> int:
        return len(self._samples)

    def append(self, pcm: np.ndarray) -> None:
        """int16 [n]."""
        self._samples += pcm.tobytes()

    def forget(self, frame: int) -> None:
        """Frames before `frame` will not be asked for again."""
        keep_from = max(self._begin, first_sample_of(frame))
        del self._samples[: (keep_from - self._begin) * _SAMPLE_BYTES]
        self._begin = keep_from

    def window(self, frame: int, num_frames: int) -> np.ndarray:
        """The samples under `num_frames` frames from `frame` on: int16 [400 + 160 (num_frames - 1)]. Before the start
        and behind the end stands the mirror image of the audio, as the feature extractor pads."""
        start, end = frame * HOP - _REACH, (frame + num_frames - 1) * HOP + _REACH
        heard = self.num_samples
        found = self._read(max(start, 0), min(end, heard))
        if start < 0:
            found = np.concatenate([self._read(1, 1 - start)[::-1], found])
        if end > heard:
            found = np.concatenate([found, self._read(heard - 1 - (end - heard), heard - 1)[::-1]])
        return found

    def samples(self, frame: int, num_frames: int) -> np.ndarray:
        """What `num_frames` frames from `frame` on stand for: int16 [160 num_frames], or fewer at the end."""
        return self._read(frame * HOP, min((frame + num_frames) * HOP, self.num_samples))

    def _read(self, start: int, end: int) -> np.ndarray:
        with memoryview(self._samples) as view:
            low, high = ((at - self._begin) * _SAMPLE_BYTES for at in (start, end))
            return np.frombuffer(view[low:high], np.int16).copy()


def first_sample_of(frame: int) -> int:
    """The first sample that frames from `frame` on look at."""
    return max(0, frame * HOP - _REACH)


class StreamMel:
    """Frames of many streams in one batch."""

    def __init__(self, num_mels: int, device: torch.device) -> None:
        self._mel = LogMel(num_mels).to(device)
        self._device = device

    @torch.inference_mode()
    def __call__(self, windows: Sequence[np.ndarray], peaks: Sequence[float]) -> tuple[Tensor, list[float]]:
        """Windows of StreamAudio, and of each stream the loudest log10 power so far (-inf at its start) -> mel [B, T,
        mels], zero beyond a stream's own frames, and the loudest so far after them."""
        num_frames = torch.tensor([(len(window) - NUM_FFT) // HOP + 1 for window in windows])
        padded = np.zeros((len(windows), max(map(len, windows))), np.int16)
        for row, window in zip(padded, windows, strict=True):
            row[: len(window)] = window
        log = self._mel.log(torch.from_numpy(padded).to(self._device).float() / 32768).transpose(1, 2)  # [B, T, mels]
        own = torch.arange(log.shape[1], device=self._device) < num_frames.to(self._device)[:, None]
        before = torch.tensor(peaks, dtype=torch.float32, device=self._device)[:, None]
        loudest = log.amax(dim=2).where(own, -torch.inf)
        so_far = torch.maximum(loudest, before).cummax(dim=1).values
        mel = (torch.maximum(log, so_far[..., None] - _RANGE) + 4.0) / 4.0
        return mel.where(own[..., None], 0.0), so_far[:, -1].tolist()
