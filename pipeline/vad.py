"""Where people speak: Silero VAD 6.2.3, with the model that the `silero_vad` package carries.

The package runs its TorchScript model frame by frame, 33 core-seconds for an hour of audio. Only the LSTM needs the
frames in order, so here the same weights run over blocks of 512 frames: 2.3 to 2.9 core-seconds an hour, probabilities
within 5e-6 and equal spans (measured on 53 minutes of FSDD). The package's own block model needs onnxruntime, and its
safetensors file holds other weights than the TorchScript model (probabilities differ by up to 0.76).

Upstream: github.com/snakers4/silero-vad (MIT).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import nn

FRAME_SAMPLES = 512
_CONTEXT_SAMPLES = 64  # the model sees the end of the frame before
_REFLECT_SAMPLES = 64
_STFT_HOP = 128
_STFT_BINS = 129
_ENCODER_STRIDES = (1, 2, 2, 1)
_BLOCK_FRAMES = 512  # 16 s; 128 costs a third more, 2048 falls out of the cache
_STATE_PREFIX = "_model."  # the 16 kHz half; the package's file holds an 8 kHz model too

# The library drops speech under 250 ms. On FSDD's 2,700 spoken digits with pauses between them that loses 10 % of the
# words (9 % and 25 % under white noise of -46 and -34 dBFS); 64 ms loses 0.2 % (1 %, 15 %), and neither finds speech in
# a pause.
_MIN_SPEECH_MS = 64


class _SileroBlocks:
    """Silero's 16 kHz network over many frames a call, from the weights of the package's `silero_vad.jit`."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.stft_basis = weights["stft.forward_basis_buffer"]  # [2 * 129, 1, 256]
        self.encoder = [
            (weights[f"encoder.{i}.reparam_conv.weight"], weights[f"encoder.{i}.reparam_conv.bias"])
            for i in range(len(_ENCODER_STRIDES))
        ]
        self.lstm = nn.LSTM(128, 128)
        self.lstm.load_state_dict(
            {f"{name}_l0": weights[f"decoder.rnn.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        )
        self.head_weight = weights["decoder.decoder.2.weight"].squeeze(-1)  # [1, 128]
        self.head_bias = weights["decoder.decoder.2.bias"]

    def __call__(
        self, frames: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Probabilities `[n]` of consecutive frames `[n, 64 + 512]` (float, -1 to 1), and the state after them."""
        padded = nn.functional.pad(frames, (0, _REFLECT_SAMPLES), "reflect").unsqueeze(1)
        spectrum = nn.functional.conv1d(padded, self.stft_basis, stride=_STFT_HOP)  # [n, 258, 4]
        x = (spectrum[:, :_STFT_BINS] ** 2 + spectrum[:, _STFT_BINS:] ** 2).sqrt()
        for (weight, bias), stride in zip(self.encoder, _ENCODER_STRIDES, strict=True):
            x = nn.functional.conv1d(x, weight, bias, stride=stride, padding=1).relu()
        hidden, state = self.lstm(x.transpose(1, 2), state)  # [n, 1, 128]: time first, one stream
        return torch.sigmoid(nn.functional.linear(hidden[:, 0].relu(), self.head_weight, self.head_bias))[:, 0], state


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _silero() -> ModuleType:
    with _threads(torch.get_num_threads()):  # its import sets the process to one torch thread
        return import_module("silero_vad")


@cache
def _model() -> _SileroBlocks:
    state = _silero().load_silero_vad().state_dict()
    return _SileroBlocks({k.removeprefix(_STATE_PREFIX): v for k, v in state.items() if k.startswith(_STATE_PREFIX)})


def speech_probabilities(pcm: np.ndarray) -> np.ndarray:
    """Speech probability of each 32 ms frame of int16 `[num_samples]` at 16 kHz: float32 `[ceil(num_samples / 512)]`.

    The last frame is filled with zeros. Beyond the result, memory is constant (about 10 MB) at any length. Runs on one
    torch thread (a second one made it slower, 9 core-seconds an hour) and leaves the process's setting as it was.
    Raises ValueError for another dtype or shape.
    """
    if pcm.dtype != np.int16 or pcm.ndim != 1:
        raise ValueError(f"VAD takes int16 PCM of shape [num_samples], not {pcm.dtype} of shape {list(pcm.shape)}")
    model = _model()
    num_frames = -(-len(pcm) // FRAME_SAMPLES)
    probabilities = np.empty(num_frames, np.float32)
    state: tuple[torch.Tensor, torch.Tensor] | None = None
    with _threads(1), torch.inference_mode():
        for first in range(0, num_frames, _BLOCK_FRAMES):
            frames = _frames(pcm, first, min(_BLOCK_FRAMES, num_frames - first))
            block, state = model(frames, state)
            probabilities[first : first + len(frames)] = block.numpy()
    return probabilities


def _frames(pcm: np.ndarray, first: int, num_frames: int) -> torch.Tensor:
    """Frames `[num_frames, 64 + 512]` from frame `first` on, as floats, zeros where the recording has no samples."""
    begin = first * FRAME_SAMPLES - _CONTEXT_SAMPLES
    samples = pcm[max(begin, 0) : (first + num_frames) * FRAME_SAMPLES]
    block = np.zeros(_CONTEXT_SAMPLES + num_frames * FRAME_SAMPLES, np.float32)
    filled = block[max(-begin, 0) :][: len(samples)]
    np.multiply(samples, 1 / 32768, out=filled)
    return torch.from_numpy(block).unfold(0, _CONTEXT_SAMPLES + FRAME_SAMPLES, FRAME_SAMPLES)


def speech_spans(pcm: np.ndarray, threshold: float, min_silence_ms: int) -> list[tuple[int, int]]:
    """Samples `[start, end)` of int16 `[num_samples]` where someone speaks, in order, without overlap.

    The spans are the library's (`get_speech_timestamps_from_probs`): speech begins at `threshold` and ends
    `min_silence_ms` below `threshold - 0.15`, at least two frames. Each is widened by 30 ms on both sides, which closes
    no pause, as two frames are 64 ms. Raises ValueError for PCM of another dtype or shape.
    """
    spans = _silero().get_speech_timestamps_from_probs(
        speech_probabilities(pcm).tolist(),
        threshold=threshold,
        min_speech_duration_ms=_MIN_SPEECH_MS,
        min_silence_duration_ms=min_silence_ms,
        audio_length_samples=len(pcm),
    )
    return [(span["start"], span["end"]) for span in spans]
