"""Memory and speed of reading a 4 GB tar: `python -m tests.bench_read_tar FOLDER`.

Makes the tar in FOLDER (600 wavs of 160 s and one of 9.5 hours, over 1 GB), reads and segments it as a read task
does in a fresh process, prints a line, and deletes it.
"""

from __future__ import annotations

import argparse
import io
import resource
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline import units
from pipeline.config import InputConfig, TranscribeConfig
from pipeline.read import read_units
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.segment import segment_unit
from pipeline.sources.plan import plan
from pipeline.units import Done

_SHORT_S, _LONG_S = 160, 34_500


class _Wav(io.RawIOBase):
    """A wav of bursts of noise with pauses between, made as it is read."""

    def __init__(self, seconds: int) -> None:
        burst = np.random.default_rng(0).integers(-8_000, 8_000, 8 * SAMPLE_RATE_HZ).astype("<i2")
        burst[-SAMPLE_RATE_HZ:] = 0
        self._burst = burst.tobytes()
        self._data_bytes = seconds * SAMPLE_RATE_HZ * 2
        sizes = [36 + self._data_bytes, self._data_bytes]
        riff, data = (size.to_bytes(4, "little") for size in sizes)
        rate = SAMPLE_RATE_HZ.to_bytes(4, "little") + (2 * SAMPLE_RATE_HZ).to_bytes(4, "little")
        self._header = b"RIFF" + riff + b"WAVEfmt \x10\0\0\0\1\0\1\0" + rate + b"\2\0\x10\0data" + data
        self.num_bytes = len(self._header) + self._data_bytes
        self._chunks = self._parts()
        self._rest = b""

    def _parts(self) -> Iterator[bytes]:
        yield self._header
        for start in range(0, self._data_bytes, len(self._burst)):
            yield self._burst[: self._data_bytes - start]

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while len(self._rest) < size and (chunk := next(self._chunks, b"")):
            self._rest += chunk
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


def make_tar(path: Path, num_short: int) -> None:
    with tarfile.open(path, "w") as tar:
        for i in range(num_short + 1):
            wav = _Wav(_LONG_S if i == num_short // 2 else _SHORT_S)
            info = tarfile.TarInfo(f"{i:05d}.wav")
            info.size = wav.num_bytes
            tar.addfile(info, wav)


def measure(path: Path) -> None:
    config = TranscribeConfig(inputs=[InputConfig(path=str(path))], output="unused")
    (split,) = plan(config.inputs, {}, config.units.target_s)
    start = time.perf_counter()
    num_units, audio_s, longest_s = 0, 0.0, 0.0
    for unit in read_units(split, Done(), config):
        num_units += 1
        audio_s += unit.audio_s
        longest_s = max(longest_s, unit.audio_s)
        table = units.to_table(segment_unit(unit, config.segmentation))
        del unit, table
    seconds = time.perf_counter() - start
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{path.stat().st_size / 1e9:.2f} GB, {audio_s / 3600:.1f} h in {num_units} units (longest {longest_s:.0f} s): "
        f"{seconds:.1f} s, {audio_s / seconds:.0f}x real time, peak RSS {peak_mb:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--short", type=int, default=600, help="how many wavs of 160 s")
    parser.add_argument("--measure", action="store_true", help="only read the tar that is there")
    options = parser.parse_args()
    path = options.folder / "bench.tar"
    if not options.measure:
        options.folder.mkdir(parents=True, exist_ok=True)
        make_tar(path, options.short)
        subprocess.run([sys.executable, "-m", "tests.bench_read_tar", str(options.folder), "--measure"], check=True)
        path.unlink()
        return
    measure(path)


if __name__ == "__main__":
    main()
