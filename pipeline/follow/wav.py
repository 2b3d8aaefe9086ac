"""The head of a WAV file that is still being written, whose sizes say nothing yet."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from pipeline.audio import AudioError

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_BEHIND_AUDIO = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"cue ", b"PEAK", b"smpl", b"iXML", b"axml", b"afsp", b"JUNK")
_UNKNOWN_BYTES = 0x7FFF_0000  # a data size from here on, or none, is a placeholder
_MOST_HEAD = 1 << 16


@dataclass(frozen=True, slots=True)
class Layout:
    """How samples lie in a stream of bytes: interleaved, the first `head` bytes before them; `declared` bytes of them,
    by a header, None where it does not say yet."""

    rate_hz: int
    channels: int
    sample_bytes: int
    is_float: bool
    head: int = 0
    declared: int | None = None

    @property
    def frame_bytes(self) -> int:
        return self.sample_bytes * self.channels

    def decode(self, data: bytes) -> np.ndarray:
        """Whole frames as float32 [n, channels], full scale 1."""
        if self.is_float:
            values = np.frombuffer(data, f"<f{self.sample_bytes}").astype(np.float32)
        elif self.sample_bytes == 1:
            values = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
        elif self.sample_bytes == 3:
            bytes3 = np.frombuffer(data, np.uint8).reshape(-1, 3)
            wide = np.zeros((len(bytes3), 4), np.uint8)
            wide[:, 1:] = bytes3
            values = (wide.view("<i4")[:, 0] / 2**31).astype(np.float32)
        else:
            values = (np.frombuffer(data, f"<i{self.sample_bytes}") / 2 ** (8 * self.sample_bytes - 1)).astype(
                np.float32
            )
        return values.reshape(-1, self.channels)


def raw(rate_hz: int, channels: int) -> Layout:
    """16-bit little-endian samples without a header."""
    return Layout(rate_hz, channels, 2, False)


def read_head(data: bytes) -> Layout | None:
    """From the first bytes of a WAV; None while too few are there. Raises AudioError for what is no WAV, or none of
    8 to 32 bits."""
    if not b"RIFF".startswith(data[:4]) and not b"RF64".startswith(data[:4]) and data[:4] not in (b"RIFF", b"RF64"):
        raise AudioError("not_audio", "no WAV: it does not begin with RIFF")
    at, form = 12, None
    while len(data) >= at + 8:
        name, size = data[at : at + 4], struct.unpack("<I", data[at + 4 : at + 8])[0]
        if name == b"data":
            if form is None:
                raise AudioError("not_audio", "a WAV whose samples come before what they are")
            return Layout(*form, head=at + 8, declared=size if 0 < size < _UNKNOWN_BYTES else None)
        if name == b"fmt " and len(data) >= at + 8 + size:
            form = _form(data[at + 8 : at + 8 + size])
        at += 8 + size + size % 2
        if at > _MOST_HEAD:
            raise AudioError("not_audio", f"a WAV without samples in its first {_MOST_HEAD} bytes")
    return None


def is_behind_audio(data: bytes) -> bool:
    """Whether what follows the declared samples is a chunk of its own, and not more of them."""
    return data[:4] in _BEHIND_AUDIO


def _form(data: bytes) -> tuple[int, int, int, bool]:
    if len(data) < 16:
        raise AudioError("not_audio", "a WAV whose format is cut short")
    kind, channels, rate_hz, _, _, bits = struct.unpack("<HHIIHH", data[:16])
    if kind == _EXTENSIBLE and len(data) >= 26:
        kind = struct.unpack("<H", data[24:26])[0]
    if (kind, bits) not in {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)} or not channels:
        raise AudioError("bad_format", f"a WAV of kind {kind} with {channels} channels of {bits} bits")
    return rate_hz, channels, bits // 8, kind == _FLOAT
