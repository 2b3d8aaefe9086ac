"""Decoding: real files of every codec that libsndfile and FFmpeg write here."""

from __future__ import annotations

import io
import shutil
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile

from pipeline.audio import AudioError, decode

RATE = 16_000


def tone(seconds: float, rate: int = RATE, hz: float = 440.0, gain: float = 0.5) -> np.ndarray:
    return (gain * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, file_format: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=file_format, subtype=subtype)
    return buffer.getvalue()


def muxed(samples: np.ndarray, rate: int, container: str, codec: str, **options: str) -> bytes:
    """`samples` float32 `[num_frames]` or `[num_frames, 2]` through FFmpeg's own encoder and container."""
    path = Path(tempfile.mkdtemp()) / "audio"  # a name, because faststart reads its file again
    layout = "mono" if samples.ndim == 1 else "stereo"
    with av.open(str(path), "w", format=container, options=options) as output:
        stream: Any = output.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        planar = np.ascontiguousarray(samples.reshape(len(samples), -1).T)
        frame = av.AudioFrame.from_ndarray(planar, format="fltp", layout=layout)
        frame.sample_rate = rate
        fifo = av.AudioFifo()
        for resampled in resampler.resample(frame):
            fifo.write(resampled)
        while (chunk := fifo.read(stream.codec_context.frame_size or 1024, partial=True)) is not None:
            output.mux(stream.encode(chunk))
        output.mux(stream.encode(None))
    try:
        return path.read_bytes()
    finally:
        shutil.rmtree(path.parent)


def whole(*args: object, **kwargs: object) -> np.ndarray:
    return np.concatenate(list(decode(*args, **kwargs)))  # type: ignore[arg-type]


def error_code(data: bytes) -> tuple[str, int]:
    """The code that decoding fails with, and the samples that came before."""
    num_samples = 0
    with pytest.raises(AudioError) as failure:
        for block in decode(data):
            num_samples += len(block)
    return failure.value.code, num_samples


def test_16_khz_int16_mono_is_bit_exact() -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, 100_001).astype(np.int16)
    samples[:4] = [-32768, 32767, -1, 0]
    for file_format in ("WAV", "FLAC"):
        decoded = whole(encoded(samples, RATE, file_format, "PCM_16"))
        assert decoded.dtype == np.int16
        assert np.array_equal(decoded[:, 0], samples)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_length_and_signal(rate: int) -> None:
    decoded = whole(encoded(tone(3, rate), rate, "WAV", "FLOAT"))[:, 0] / 32768
    assert abs(len(decoded) - 3 * RATE) <= 1
    inner = slice(1_000, -1_000)
    assert np.abs(decoded[inner] - tone(3)[: len(decoded)][inner]).max() < 1e-3


CODECS = {
    "wav": lambda x, r: encoded(x, r, "WAV", "PCM_24"),
    "wav-ulaw": lambda x, r: encoded(x, r, "WAV", "ULAW"),
    "flac": lambda x, r: encoded(x, r, "FLAC"),
    "ogg-vorbis": lambda x, r: encoded(x, r, "OGG", "VORBIS"),
    "ogg-opus": lambda x, r: encoded(x, r, "OGG", "OPUS"),
    "mp3": lambda x, r: encoded(x, r, "MP3"),
    "aiff": lambda x, r: encoded(x, r, "AIFF"),
    "m4a": lambda x, r: muxed(x, r, "ipod", "aac"),
    "mp4-alac": lambda x, r: muxed(x, r, "mp4", "alac"),
    "aac-adts": lambda x, r: muxed(x, r, "adts", "aac"),
    "webm-opus": lambda x, r: muxed(x, r, "webm", "libopus"),
    "mkv-pcm-u8": lambda x, r: muxed(x, r, "matroska", "pcm_u8"),
    "mkv-pcm-s32": lambda x, r: muxed(x, r, "matroska", "pcm_s32le"),
    "ac3": lambda x, r: muxed(x, r, "ac3", "ac3"),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("stereo", [False, True])
def test_every_codec(codec: str, stereo: bool) -> None:
    rate, seconds = 48_000, 2.0
    left = tone(seconds, rate)
    samples = np.stack([left, -0.5 * left], axis=1) if stereo else left
    data = CODECS[codec](samples, rate)
    mixed = whole(data)
    assert mixed.shape[1] == 1
    assert abs(len(mixed) / RATE - seconds) < 0.1
    level = np.sqrt(np.mean((mixed[RATE // 2 : RATE, 0] / 32768.0) ** 2))
    assert level == pytest.approx((0.25 if stereo else 1.0) * 0.5 / np.sqrt(2), rel=0.1)
    split = whole(data, "split")
    assert split.shape == (len(mixed), 2 if stereo else 1)
    if stereo:
        ratio = np.std(split[RATE // 2 : RATE, 1]) / np.std(split[RATE // 2 : RATE, 0])
        assert ratio == pytest.approx(0.5, rel=0.15)


def test_mix_is_the_mean_of_the_channels() -> None:
    channels = np.random.default_rng(1).integers(-32768, 32768, (5_000, 3)).astype(np.int16)
    mixed = whole(encoded(channels, RATE, "WAV", "PCM_16"))[:, 0]
    assert np.abs(mixed - channels.mean(axis=1)).max() <= 0.51
    assert np.array_equal(whole(encoded(channels, RATE, "WAV", "PCM_16"), "split"), channels)


def test_eight_channels_of_planar_frames() -> None:
    """PyAV alone dies on these."""
    with av.open(buffer := io.BytesIO(), "w", format="matroska") as output:
        stream: Any = output.add_stream("aac", rate=48_000, layout="7.1")
        packed = np.linspace(0, 0.7, 8, dtype=np.float32) * tone(1, 48_000)[:, None]
        frame = av.AudioFrame.from_ndarray(packed.reshape(1, -1), format="flt", layout="7.1")
        frame.sample_rate = 48_000
        fifo = av.AudioFifo()
        for planar in av.AudioResampler(format="fltp", layout="7.1", rate=48_000).resample(frame):
            fifo.write(planar)
        while (chunk := fifo.read(1024, partial=True)) is not None:
            output.mux(stream.encode(chunk))
        output.mux(stream.encode(None))
    split = whole(buffer.getvalue(), "split")
    assert split.shape[1] == 8
    assert abs(len(split) - RATE) < 0.1 * RATE
    levels = np.std(split[4_000:12_000] / 32768, axis=0)
    assert levels[7] == pytest.approx(0.7 * 0.5 / np.sqrt(2), rel=0.15)


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    for name, codec in (("a.wav", "m4a"), ("b.mp3", "flac"), ("c", "webm-opus"), ("d.m4a", "wav")):
        path = tmp_path / name
        path.write_bytes(CODECS[codec](tone(1, 48_000), 48_000))
        assert abs(len(whole(path)) - RATE) < 0.1 * RATE
        with path.open("rb") as file:
            assert len(whole(file)) == len(whole(str(path)))


@pytest.mark.parametrize("codec", ["wav", "flac", "ogg-vorbis", "mp4-alac"])
def test_a_stretch_is_sample_accurate(codec: str) -> None:
    samples = np.cumsum(np.ones(RATE * 3, np.float32)) / (RATE * 4)
    data = CODECS[codec](samples, RATE)
    every = whole(data)[:, 0]
    part = whole(data, start_s=1.25, duration_s=0.5)[:, 0]
    assert len(part) == RATE // 2
    assert np.array_equal(part, every[RATE * 5 // 4 : RATE * 7 // 4])
    assert np.array_equal(whole(data, start_s=2.5)[:, 0], every[RATE * 5 // 2 :])
    with pytest.raises(AudioError, match=r"no_samples: .* at 99 s"):
        whole(data, start_s=99.0)


def test_samples_that_are_no_numbers_are_silence() -> None:
    samples = np.array([0.5, np.nan, np.inf, -np.inf, 1e30, -1e30, 0.25], np.float32)
    decoded = whole(encoded(samples, RATE, "WAV", "FLOAT"))[:, 0]
    assert decoded.tolist() == [16384, 0, 0, 0, 32767, -32768, 8192]


def test_files_that_are_no_audio() -> None:
    video = io.BytesIO()
    with av.open(video, "w", format="matroska") as output:
        stream = output.add_stream("mpeg4", rate=25, width=64, height=64)
        output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode(None))
    assert error_code(b"") == ("empty_file", 0)
    assert error_code(b"hello, this is text\n" * 50) == ("not_audio", 0)
    assert error_code(video.getvalue()) == ("not_audio", 0)
    assert error_code(encoded(np.empty(0, np.float32), RATE, "WAV", "PCM_16")) == ("no_samples", 0)
    rng = np.random.default_rng(2)
    for _ in range(20):
        code, num_samples = error_code(rng.integers(0, 256, 3_000, dtype=np.uint8).tobytes())
        assert code in ("not_audio", "no_samples", "truncated", "corrupt"), num_samples


def test_a_playlist_opens_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(CODECS["wav"](tone(1), RATE))
    assert error_code(f"ffconcat version 1.0\nfile '{secret}'\n".encode()) == ("not_audio", 0)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5.0,\n{secret}\n#EXT-X-ENDLIST\n"
    assert error_code(playlist.encode()) == ("not_audio", 0)


@pytest.mark.parametrize("codec", ["wav", "flac"])
def test_a_truncated_file_gives_what_is_there(codec: str) -> None:
    data = CODECS[codec](np.random.default_rng(3).uniform(-0.5, 0.5, RATE * 10), RATE)
    code, num_samples = error_code(data[: len(data) // 2])
    assert code == "truncated"
    assert 2.5 < num_samples / RATE <= 5


def test_a_truncated_m4a() -> None:
    noise = np.random.default_rng(4).uniform(-0.5, 0.5, RATE * 10).astype(np.float32)
    index_last = muxed(noise, RATE, "ipod", "aac")
    index_first = muxed(noise, RATE, "ipod", "aac", movflags="faststart")
    assert error_code(index_last[: len(index_last) // 2]) == ("not_audio", 0)
    code, num_samples = error_code(index_first[: len(index_first) // 2])
    assert code == "truncated"
    assert 3 < num_samples / RATE < 6
    webm = muxed(noise, RATE, "webm", "libopus")
    assert error_code(webm[: len(webm) // 2])[0] == "truncated"


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0])
def test_a_wav_whose_writer_could_not_seek_back(size: int) -> None:
    data = bytearray(encoded(tone(1), RATE, "WAV", "PCM_16"))
    data[40:44] = size.to_bytes(4, "little")
    assert len(whole(bytes(data))) == RATE


def test_an_absurd_rate_is_refused() -> None:
    data = bytearray(encoded(tone(1), RATE, "WAV", "PCM_16"))
    data[24:28] = (7).to_bytes(4, "little")
    assert error_code(bytes(data))[0] == "bad_format"


@pytest.mark.parametrize("codec", ["flac", "m4a"])
def test_memory_is_constant(codec: str) -> None:
    data = CODECS[codec](np.tile(tone(10, 44_100), 30), 44_100)  # 5 minutes: 53 MB as floats
    tracemalloc.start()
    num_samples = sum(len(block) for block in decode(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_samples == pytest.approx(300 * RATE, rel=1e-3)
    assert peak < 4 << 20
