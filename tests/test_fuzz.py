"""Damaged inputs of every kind, drawn by Hypothesis: each ends as rows with known reason codes or as one of the clear
errors, in bounded time and memory.

They are read in a process of its own, as a bug in a C library would end it. The suite draws the same few hundred each
time; `make fuzz MINUTES=10` draws new ones for so long.
"""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import re
import resource
import struct
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

MINUTES = float(os.environ.get("FUZZ_MINUTES", "0"))
EXAMPLES = {"a.tar": 150, "a.tar.gz": 60, "m.jsonl": 100, "a.parquet": 150, "audio": 250}
LIMIT_S = 60.0  # of one input; they take milliseconds, and a busy machine takes its time
LIMIT_RSS_BYTES = 400 << 20  # above what the reader takes for a whole input
_ADDRESS_SPACE_BYTES = 8 << 30
_AUDIO_SUFFIXES = ("wav", "flac", "ogg", "mp3", "w64", "m4a", "webm", "opus", "aiff")

CODES = {
    "ok", "empty_file", "not_audio", "truncated", "corrupt", "no_samples", "bad_format", "no_audio", "damaged_tar",
    "damaged_parquet", "too_large", "bad_manifest_line", "missing_file",
}  # fmt: skip
"""What a recording may end as in here."""


# --- seeds: small valid files of every kind


def _sound(seconds: float = 0.2, container: str = "WAV", rate: int = 16_000, channels: int = 1) -> bytes:
    samples = np.random.default_rng(0).normal(0, 0.1, (int(seconds * rate), channels))
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container)
    return buffer.getvalue()


def _pyav_sound(container: str, codec: str) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=48_000, layout="mono")
        tone = np.sin(np.arange(9_600) / 20, dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48_000, 0
        resampler = av.AudioResampler(stream.format, "mono", 48_000)
        for packet in [*(p for f in resampler.resample(frame) for p in stream.encode(f)), *stream.encode(None)]:
            out.mux(packet)
    return buffer.getvalue()


def _tar(format: int, long_name: bool = False) -> bytes:
    buffer = io.BytesIO()
    name = "folder/" * 30 + "b" if long_name else "b"
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        members = [("a.wav", _sound()), ("a.json", b'{"text": "one", "lang": "en"}'), (f"{name}.flac", _sound(0.1))]
        for member, data in [*members, (f"{name}.txt", b"two")]:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _parquet(kind: str) -> bytes:
    audio = [_sound(0.1), None, b"", _sound(0.2, "FLAC")]
    columns: dict[str, object] = {"audio": audio, "text": ["a", None, "c", "d"]}
    if kind == "struct":
        columns["audio"] = [{"bytes": each, "path": f"{i}.wav"} for i, each in enumerate(audio)]
    elif kind == "paths":
        columns["audio"] = ["good.wav", "none.wav", None, "good.wav"]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=2, compression="snappy" if kind == "plain" else "zstd")
    return buffer.getvalue()


def _manifest() -> bytes:
    lines: list[dict[str, object]] = [
        {"audio_filepath": "good.wav", "offset": 0.1, "duration": 0.05, "text": "one", "lang": "en"},
        {"audio_filepath": "good.wav"},
        {"audio_filepath": "none.wav", "duration": 3},
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@cache
def seeds(kind: str) -> list[bytes]:
    if kind == "a.tar":
        return [_tar(tarfile.USTAR_FORMAT), _tar(tarfile.GNU_FORMAT, True), _tar(tarfile.PAX_FORMAT, True)]
    if kind == "a.tar.gz":
        return [gzip.compress(data, 6, mtime=0) for data in seeds("a.tar")]
    if kind == "m.jsonl":
        return [_manifest(), gzip.compress(_manifest(), mtime=0), b"\xef\xbb\xbf" + _manifest()]
    if kind == "a.parquet":
        return [_parquet("plain"), _parquet("struct"), _parquet("paths")]
    sounds = [_sound(0.2, container) for container in ("WAV", "FLAC", "OGG", "MP3", "W64", "AIFF", "CAF")]
    pyav = [("mp4", "aac"), ("webm", "libopus"), ("adts", "aac"), ("ogg", "libopus"), ("matroska", "flac")]
    return [*sounds, _sound(0.1, "WAV", 44_100, 9), *(_pyav_sound(*each) for each in pyav)]


# --- mutations: each is a function of the bytes and of numbers, so that Hypothesis can shrink them

Mutation = Callable[[bytearray, float, int, bytes], None]
_NUMBERS = [struct.pack(form, value) for form in ("<I", ">I", "<Q", ">Q", "<H") for value in (0, 1, 0x7FFF, 0xFFFF)] + [
    struct.pack(form, value) for form in ("<I", ">I", "<Q", ">Q") for value in (0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
]
_TAR_FIELDS = {"name": (0, 100), "mode": (100, 108), "size": (124, 136), "type": (156, 157), "link": (157, 257),
               "magic": (257, 265), "sparse": (386, 410), "real": (483, 495)}  # fmt: skip
_TAR_VALUES = [
    *(b"00000000000\0", b"77777777777\0", b"99999999999\0"),
    *(b"\x80" + bytes(10) + b"\x01", b"\x80" + b"\xff" * 11, b"\xff" * 12),
    *(b"S", b"L", b"K", b"x", b"g", b"5", b"2", b"../../../x.wav\0", b"\xff\xfe\0", b""),
]


def _flip(data: bytearray, where: float, number: int, _: bytes) -> None:
    data[int(where * len(data))] ^= 1 << number % 8


def _cut(data: bytearray, where: float, *_: object) -> None:
    del data[int(where * len(data)) :]


def _drop(data: bytearray, where: float, number: int, _: bytes) -> None:
    start = int(where * len(data))
    del data[start : start + number]


def _repeat(data: bytearray, where: float, number: int, _: bytes) -> None:
    start = int(where * len(data))
    data[start:start] = data[start : start + number] * (1 + number % 5)


def _splice(data: bytearray, where: float, number: int, other: bytes) -> None:
    start, source = int(where * len(data)), int(where * len(other))
    data[start : start + number] = other[source : source + number]


def _number(data: bytearray, where: float, number: int, _: bytes) -> None:
    start, value = int(where * len(data)), _NUMBERS[number % len(_NUMBERS)]
    data[start : start + len(value)] = value


def _head(data: bytearray, where: float, number: int, _: bytes) -> None:
    _number(data, where * min(1.0, 200 / max(len(data), 1)), number, _)


def _foot(data: bytearray, where: float, number: int, _: bytes) -> None:
    _number(data, 1 - where * min(1.0, 800 / max(len(data), 1)) - 1e-9, number, _)


def _tar_field(data: bytearray, where: float, number: int, _: bytes) -> None:
    """A field of a header block, its checksum made right again."""
    heads = [i for i in range(0, len(data) - 511, 512) if data[i + 257 : i + 262] == b"ustar"]
    if heads:
        head = heads[int(where * len(heads))]
        start, end = list(_TAR_FIELDS.values())[number % len(_TAR_FIELDS)]
        value = _TAR_VALUES[number // 8 % len(_TAR_VALUES)]
        data[head + start : head + end] = value.ljust(end - start, b"\0")[: end - start]
        data[head + 148 : head + 156] = b"        "
        data[head + 148 : head + 156] = b"%06o\0 " % sum(data[head : head + 512])


def _json_value(data: bytearray, where: float, number: int, _: bytes) -> None:
    values = [
        b"-1",
        b"NaN",
        b"1e400",
        b"1e308",
        b"1" * 400,
        b"null",
        b"[]",
        b'""',
        b"true",
        b'"\\u0000"',
        b'"\\ud800x"',
        b"1" * 5000,
        b"[" * 5000,
        b'"\xff"',
    ]
    places = [match.span() for match in re.finditer(rb": ?([^,}]+)", bytes(data))]
    if places:
        start, end = places[int(where * len(places))]
        data[start + 1 : end] = values[number % len(values)]


ANYWHERE: list[Mutation] = [_flip, _cut, _drop, _repeat, _splice, _number, _head]
OWN: dict[str, list[Mutation]] = {
    "a.tar": [_tar_field] * 5,
    "m.jsonl": [_json_value] * 4,
    "a.parquet": [_foot] * 4,
    "audio": [_head] * 3,
    "a.tar.gz": [],
}


@st.composite
def damaged(draw: st.DrawFn, kind: str) -> bytes:
    choices = seeds(kind)
    data, other = bytearray(draw(st.sampled_from(choices))), draw(st.sampled_from(choices))
    zipped = kind == "a.tar.gz" and draw(st.booleans())  # the damage is below the compression
    if zipped:
        data = bytearray(gzip.decompress(data))
    mutations = ANYWHERE + OWN[kind] + (OWN["a.tar"] if zipped else [])
    for mutate in draw(st.lists(st.sampled_from(mutations), min_size=1, max_size=5)):
        where, number = draw(st.integers(0, 9_999)) / 10_000, draw(st.integers(0, 4096))
        if data:
            mutate(data, where, number, other)
    return gzip.compress(bytes(data), 1, mtime=0) if zipped else bytes(data)


# --- the process that reads


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE_BYTES, _ADDRESS_SPACE_BYTES))


def _read(name: str, data: bytes) -> tuple[list[str], int]:
    """The reason codes of an input's recordings (the name of a clear error instead), and this process' peak RSS."""
    from pipeline.config import ConfigError, TranscribeConfig
    from pipeline.read import read_units
    from pipeline.sources.plan import plan
    from pipeline.storage import StorageError
    from pipeline.units import Done, from_table, to_table

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        Path(folder, "good.wav").write_bytes(_sound())
        path.write_bytes(data)
        config = TranscribeConfig.model_validate({"inputs": [str(path)], "output": "o", "units": {"target_s": 600}})
        try:
            splits = list(plan(config.inputs, {}, 600.0))
            units = (unit for split in splits for unit in read_units(split, Done(), config))
            travelled = [from_table(to_table(unit)) for unit in units]
            errors = [recording.error for unit in travelled for recording in unit.recordings]
            codes = ["ok" if error is None else error.partition(":")[0] for error in errors]
        except (ConfigError, StorageError) as error:
            assert "\n" not in str(error)
            codes = [type(error).__name__]
    return codes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module")
def reader() -> Iterator[Callable[[str, bytes], list[str]]]:
    """Reads an input in the other process, within the limits."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _limit) as pool:
        healthy = [
            pool.submit(_read, name, seeds(name)[0]).result(120)[1] for name in ("a.tar", "a.parquet", "m.jsonl")
        ]

        def read(name: str, data: bytes) -> list[str]:
            codes, rss = pool.submit(_read, name, data).result(LIMIT_S)
            assert rss < healthy[-1] + LIMIT_RSS_BYTES, f"{rss / 1e6:.0f} MB"
            return codes

        yield read


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.timeout(max(300, 60 * MINUTES + 300))
def test_damage_is_a_row_or_a_clear_error(kind: str, reader: Callable[[str, bytes], list[str]]) -> None:
    seen: set[str] = set()
    num_inputs = 0

    def check(data: bytes, suffix: str) -> None:
        nonlocal num_inputs
        num_inputs += 1
        codes = reader(f"a.{suffix}" if kind == "audio" else kind, data)
        assert set(codes) <= CODES | {"ConfigError", "StorageError"}, codes
        seen.update(codes)

    drawn = given(damaged(kind), st.sampled_from(_AUDIO_SUFFIXES))
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    if not MINUTES:
        settings(max_examples=EXAMPLES[kind], derandomize=True, **options)(drawn(check))()
    until, number = time.monotonic() + 60 * MINUTES / len(EXAMPLES), time.time_ns()
    while time.monotonic() < until:
        number += 1
        seed(number)(settings(max_examples=500, **options)(drawn(check)))()
    assert "ok" in seen and len(seen) > 2, "the damage is neither fatal nor harmless every time"
    print(f"{kind}: {num_inputs:,} inputs, {', '.join(sorted(seen))}")
