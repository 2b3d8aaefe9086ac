"""Decode any audio file to 16 kHz int16, block by block, in constant memory.

What the file holds decides, never its name: libsndfile reads WAV, FLAC, Ogg and MP3; FFmpeg (PyAV) reads the rest and
what libsndfile refuses. 16 kHz 16-bit mono passes bit-exactly.

What the formats cannot tell: an MP3, Opus or AAC stream that just stops looks like a shorter recording.
"""

from __future__ import annotations

import errno
import io
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO, Literal

import av
import numpy as np
import soundfile
import soxr

from pipeline.schema import SAMPLE_RATE_HZ

Channels = Literal["mix", "split"]
_Blocks = Iterator[tuple[int, np.ndarray]]  # (sample rate, float32 [num_frames, num_channels])

_BLOCK_SAMPLES = 1 << 15  # frames x channels read at once; what a damaged block costs
_SEEKABLE = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC"}  # seek is exact to the sample
_SOUNDFILE = _SEEKABLE | {"OGG", "MP3"}  # of the rest libsndfile has guesses that take other files for audio
_UNKNOWN_FRAMES = 1 << 48
_STREAMED_BYTES = 0x7FFF_0000  # WAV writers that cannot seek back leave a data size from here on
_RATES_HZ = range(1_000, 1_000_001)
_AV_ERRORS = (av.FFmpegError, OSError, ValueError)
_DATA_CHUNK = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)


class AudioError(Exception):
    """Audio that cannot be decoded, or not to its end. `code` is one of

    - `empty_file`: no bytes
    - `not_audio`: neither libsndfile nor FFmpeg finds audio in it
    - `truncated`: the file ends, or breaks, before its audio does
    - `corrupt`: more than 1 % of the packets do not decode
    - `no_samples`: no audio in it, or none in the stretch asked for
    - `bad_format`: a sample rate or a change of channels that nothing sensible can be made of
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


def decode(
    source: bytes | str | Path | BinaryIO,
    channels: Channels = "mix",
    start_s: float = 0.0,
    duration_s: float | None = None,
) -> Iterator[np.ndarray]:
    """Yields int16 `[num_samples, num_channels]` at 16 kHz; "mix" gives one channel, the mean of all.

    `source` is the file's bytes, its local path, or a seekable binary file. `start_s` and `duration_s` choose a
    stretch, exact to a sample of the file's own rate. Raises AudioError; the blocks before the damage have been yielded
    by then.
    """
    with _opened(source) as file:
        if file.seek(0, io.SEEK_END) == 0:
            raise AudioError("empty_file", "the file has no bytes")
        file.seek(0)
        num_samples = 0
        for block in _to_16_khz(_stretch(file, start_s, duration_s), channels):
            num_samples += len(block)
            yield block
    if num_samples == 0:
        where = f" at {start_s:g} s" if start_s else ""
        raise AudioError("no_samples", f"the file has no audio{where}")


def _opened(source: bytes | str | Path | BinaryIO) -> AbstractContextManager[BinaryIO]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str | Path):
        return Path(source).open("rb")
    return nullcontext(source)  # the caller's, who closes it


def _stretch(file: BinaryIO, start_s: float, duration_s: float | None) -> _Blocks:
    """The blocks of the stretch asked for: sought where the format allows it, else decoded and dropped."""
    sound = _open_soundfile(file)
    if sound is None:
        file.seek(0)
        blocks = _pyav_blocks(file)
    else:
        if start_s and sound.format in _SEEKABLE and sound.frames < _UNKNOWN_FRAMES:
            sound.seek(min(round(start_s * sound.samplerate), sound.frames))
            start_s = 0.0
        blocks = _soundfile_blocks(sound)
    drop: int | None = None
    keep = _UNKNOWN_FRAMES
    for rate, block in blocks:
        if drop is None:
            drop = round(start_s * rate)
            keep = keep if duration_s is None else round(duration_s * rate)
        dropped = min(drop, len(block))
        drop -= dropped
        kept = block[dropped : dropped + keep]
        keep -= len(kept)
        if len(kept):
            yield rate, kept
        if keep == 0:
            return


def _open_soundfile(file: BinaryIO) -> soundfile.SoundFile | None:
    try:
        sound = soundfile.SoundFile(file)
    except soundfile.LibsndfileError:
        return None
    # no frames: a WAV whose writer never filled in the size of its data; FFmpeg reads those to the end
    if sound.format in _SOUNDFILE and sound.frames > 0:
        return sound
    sound.close()
    return None


def _soundfile_blocks(sound: soundfile.SoundFile) -> _Blocks:
    rate, num_frames = sound.samplerate, max(_BLOCK_SAMPLES // sound.channels, 1)
    with sound:
        while True:
            try:
                block = sound.read(num_frames, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                seconds = sound.tell() / rate
                raise AudioError("truncated", f"{sound.format} breaks near {seconds:.2f} s: {error}") from error
            if len(block) == 0:
                break
            yield rate, block
        declared = _DATA_CHUNK.search(sound.extra_info)
        if declared and int(declared[2]) < int(declared[1]) < _STREAMED_BYTES:
            raise AudioError(
                "truncated", f"{sound.format} declares {declared[1]} bytes of audio, {declared[2]} are there"
            )


def _pyav_blocks(file: BinaryIO) -> _Blocks:
    try:
        # a playlist posing as audio must not make this machine open other files or addresses
        container = av.open(file, mode="r", metadata_errors="ignore", options={"protocol_whitelist": "none"})
    except _AV_ERRORS as error:
        raise AudioError("not_audio", f"neither libsndfile nor FFmpeg can read it ({_said(error)})") from error
    with container:
        if not container.streams.audio:
            raise AudioError("not_audio", f"a {container.format.name} file without an audio stream")
        pending: list[np.ndarray] = []
        rate = num_pending = 0
        for frame in _packed(_frames(container)):
            block = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
            changed = pending and (frame.sample_rate != rate or block.shape[1] != pending[0].shape[1])
            if changed or num_pending >= _BLOCK_SAMPLES:
                yield rate, np.concatenate(pending)
                pending, num_pending = [], 0
            pending.append(block)
            rate, num_pending = frame.sample_rate, num_pending + block.size
        if pending:
            yield rate, np.concatenate(pending)


def _said(error: Exception) -> str:
    """What FFmpeg said. Raises `error` where it is the disk's: FFmpeg seeks where a damaged header sends it, and what
    the file then raises passes through."""
    if isinstance(error, OSError) and not isinstance(error, av.FFmpegError) and error.errno != errno.EINVAL:
        raise error
    return getattr(error, "strerror", None) or str(error)


def _frames(container: av.container.InputContainer) -> Iterator[av.AudioFrame]:
    stream = container.streams.audio[0]
    num_packets = num_bad = 0
    end_s = 0.0
    try:
        for packet in container.demux(stream):
            num_packets += 1
            try:
                for frame in packet.decode():
                    end_s = max(end_s, (frame.time or 0.0) + frame.samples / max(frame.sample_rate, 1))
                    yield frame
            except av.error.InvalidDataError:
                num_bad += 1
    except _AV_ERRORS as error:
        raise AudioError("truncated", f"{container.format.name} breaks after {end_s:.2f} s: {_said(error)}") from error
    if num_bad > 1 + num_packets // 100:  # players skip a bad packet (a tag at the end, say), and so do we
        raise AudioError("corrupt", f"{num_bad} of {num_packets} packets of {container.format.name} do not decode")
    declared_s = _declared_s(container, stream)
    if declared_s is not None and end_s < declared_s - 1.0:
        raise AudioError("truncated", f"{container.format.name} declares {declared_s:.2f} s, {end_s:.2f} s are there")


def _declared_s(container: av.container.InputContainer, stream: av.AudioStream) -> float | None:
    """Where the audio ends by an MP4's or a Matroska's header; other formats only guess."""
    if not container.format.name.startswith(("mov,", "matroska,")):
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float((stream.start_time or 0) + stream.duration) * float(stream.time_base)
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / 1e6
    return None


def _packed(frames: Iterator[av.AudioFrame]) -> Iterator[av.AudioFrame]:
    """The frames as interleaved float32, of the same rate and channels.

    FFmpeg converts: PyAV 18.1 reads past the end of the planes of a planar frame with 8 or more channels, and dies.
    """
    converter: av.AudioResampler | None = None
    previous: tuple[str, str, int] | None = None
    for frame in frames:
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if converter is None or kind != previous:
            _check_rate(frame.sample_rate)
            converter = av.AudioResampler(format="flt", layout=frame.layout, rate=frame.sample_rate)
            previous = kind
        yield from converter.resample(frame)


def _to_16_khz(blocks: _Blocks, channels: Channels) -> Iterator[np.ndarray]:
    resampler = Resampler(0, 0)
    try:
        for rate, block in blocks:
            block = np.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0)
            if channels == "mix" and block.shape[1] > 1:
                block = block.mean(axis=1, keepdims=True, dtype=np.float32)
            if (rate, block.shape[1]) != (resampler.rate, resampler.num_channels):
                yield from resampler.flush()
                resampler = Resampler.following(resampler, rate, block.shape[1])
            yield from resampler.feed(block)
    except AudioError:
        yield from resampler.flush()  # what came before the damage is still good
        raise
    yield from resampler.flush()


def _check_rate(rate: int) -> None:
    if rate not in _RATES_HZ:
        raise AudioError("bad_format", f"a sample rate of {rate} Hz; {_RATES_HZ[0]} to {_RATES_HZ[-1]} Hz are read")


class Resampler:
    """soxr at its high quality, from one rate to 16 kHz int16."""

    def __init__(self, rate: int, num_channels: int) -> None:
        self.rate, self.num_channels = rate, num_channels
        self._stream: soxr.ResampleStream | None = None
        if rate not in (0, SAMPLE_RATE_HZ):
            self._stream = soxr.ResampleStream(rate, SAMPLE_RATE_HZ, num_channels, dtype="float32")

    @classmethod
    def following(cls, previous: Resampler, rate: int, num_channels: int) -> Resampler:
        _check_rate(rate)
        if previous.num_channels not in (0, num_channels):
            raise AudioError("bad_format", f"{previous.num_channels} channels become {num_channels} in mid-file")
        return cls(rate, num_channels)

    def feed(self, block: np.ndarray, last: bool = False) -> Iterator[np.ndarray]:
        if self._stream is not None:
            block = self._stream.resample_chunk(block, last=last)
        if len(block):
            scaled = np.rint(np.clip(block, -1.0, 1.0) * 32768.0)
            yield np.minimum(scaled, 32767.0).astype(np.int16)

    def flush(self) -> Iterator[np.ndarray]:
        if self._stream is not None:
            yield from self.feed(np.empty((0, self.num_channels), np.float32), last=True)
