"""The bucket of a killed job: what is put in, and what is found there, with no code of the product between."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import soundfile

from pipeline.engine.checkpoint import EMBEDDED_FOLDER
from pipeline.output import RECORD_KEY
from tests.chaos_findings import Row
from tests.radosgw import Server

NUM_TARS = 6
LONG_S = 60.0  # of one recording, which is cut


class Bucket:
    def __init__(self, server: Server, name: str) -> None:
        self._fs = fsspec.filesystem("s3", **server.options["s3"], use_listings_cache=False, skip_instance_cache=True)
        self._name = name
        self._fs.mkdir(name)

    def put(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(f"{self._name}/{name}", data)

    def names(self, prefix: str) -> set[str]:
        """Of all objects below the prefix, relative to it."""
        top = f"{self._name}/{prefix}/"
        return {name.removeprefix(top) for name in self._fs.find(top)}

    def units(self, prefix: str) -> Iterator[tuple[list[Row], Row]]:
        """Rows and run record of every committed unit."""
        for name in sorted(self.names(prefix)):
            if name.endswith(".parquet"):
                file = pq.ParquetFile(io.BytesIO(self._fs.cat_file(f"{self._name}/{prefix}/{name}")))
                yield file.read().to_pylist(), json.loads(file.metadata.metadata[RECORD_KEY])

    def uploads(self) -> list[str]:
        """Multipart uploads that were begun and not ended."""
        answer = self._fs.call_s3("list_multipart_uploads", Bucket=self._name)
        return [upload["Key"] for upload in answer.get("Uploads", [])]


def shards() -> Iterator[tuple[str, bytes]]:
    """The package's samples in small tars, and a minute of its long recording in another."""
    samples: list[list[tuple[str, bytes]]] = []
    for path in sorted((EMBEDDED_FOLDER / "samples").glob("mixed-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if not samples or Path(samples[-1][0][0]).stem != Path(member.name).stem:
                    samples.append([])
                samples[-1].append((member.name, file.read()))
    for number in range(NUM_TARS):
        yield f"short-{number}.tar", _tar([file for sample in samples[number::NUM_TARS] for file in sample])
    with tarfile.open(EMBEDDED_FOLDER / "samples" / "long-00000.tar") as tar:
        file = tar.extractfile(next(member for member in tar if member.name.endswith(".opus")))
        assert file is not None
        audio, rate = soundfile.read(io.BytesIO(file.read()), dtype="int16")
    buffer = io.BytesIO()
    soundfile.write(buffer, audio[: int(LONG_S * rate)], rate, format="FLAC")
    yield "long.tar", _tar([("long.flac", buffer.getvalue())])


def _tar(files: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
