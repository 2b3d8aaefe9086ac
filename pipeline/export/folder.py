"""What exports write into: one folder, local or at any fsspec URL, whose files appear whole."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import tarfile
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import numpy as np
import soundfile

from pipeline import listing, storage
from pipeline.config import ConfigError
from pipeline.schema import SAMPLE_RATE_HZ

SHARD_BYTES = 256 << 20  # of a file; a remote one goes up from memory
Row = dict[str, Any]


class Writer(Protocol):
    """One format. Rows come split by split; `pcm` is int16 `[num_samples]`, 16 kHz, None where audio is not copied."""

    def add(self, row: Row, pcm: np.ndarray | None) -> None: ...

    def end_split(self) -> None:
        """No further row of the recordings so far follows."""

    def close(self) -> None:
        """Put what is left in place."""


class Folder:
    """A new folder at `url`. Files are written in a temporary one and put in place when they are finished.

    Raises ConfigError when files are there already: what an earlier export left would mix with this one.
    """

    def __init__(self, url: str, options: storage.Options, shard_bytes: int = SHARD_BYTES) -> None:
        self.url, self._options, self.shard_bytes = storage.resolve(url), options, shard_bytes
        if listing.file_names(self.url, options):
            raise ConfigError(f"{self.url} holds files already: export into a new folder, or empty that one")
        self._temporary = tempfile.TemporaryDirectory(prefix="shardscribe-export-")
        self._num_files = 0

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._temporary.cleanup()

    def path(self) -> Path:
        """Where to write the next file."""
        self._num_files += 1
        return Path(self._temporary.name) / str(self._num_files)

    def put(self, name: str, content: Path | bytes) -> None:
        """Put a finished file in place; a path is the one that `path` gave, and goes."""
        if not storage.commit(storage.join(self.url, name), content, self._options):
            raise ConfigError(f"{self.url}/{name} is there already: another export is writing to that folder")
        if isinstance(content, Path):
            content.unlink()


class Lines:
    """JSON lines in files of bounded size; `pattern` names them: "part-{:05d}.jsonl"."""

    def __init__(self, folder: Folder, pattern: str) -> None:
        self._folder, self._pattern = folder, pattern
        self._file: tuple[Path, TextIO] | None = None
        self.num_files = 0

    def add(self, row: Row) -> None:
        if self._file is None:
            path = self._folder.path()
            self._file = path, path.open("w", encoding="utf-8")
        self._file[1].write(to_json(row) + "\n")
        if self._file[1].tell() >= self._folder.shard_bytes:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            path, file = self._file
            file.close()
            self._folder.put(self._pattern.format(self.num_files), path)
            self._file, self.num_files = None, self.num_files + 1


class Tar:
    """A tar being written; the same members give the same bytes."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._path = folder, folder.path()
        self._tar = tarfile.open(self._path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 (closed by put)
        self.num_bytes = 0

    def add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        self.num_bytes += 512 + len(data)

    def put(self, name: str) -> None:
        self._tar.close()
        self._folder.put(name, self._path)


def key_of(row: Row) -> str:
    """A name for a segment without dots and slashes: what its recording is called, and a hash of `segment_id`."""
    return f"{stem_of(row)}-{_digest(row['segment_id'], 8)}"


def recording_key_of(row: Row) -> str:
    return f"{stem_of(row)}-{_digest(row['recording_id'], 4)}"


def stem_of(row: Row) -> str:
    name = str(row["recording_id"]).rsplit("/", 1)[-1]
    return re.sub(r"[^\w-]+", "_", re.sub(r"\.\w{1,5}(?=$|#)", "", name))[:60].strip("_") or "recording"


def flac(pcm: np.ndarray) -> bytes:
    """int16 `[num_samples]` at 16 kHz as FLAC."""
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def to_json(row: Row) -> str:
    """One line; JSON has no number for what is not finite, so that it becomes null."""
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return value


def _digest(text: str, num_bytes: int) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=num_bytes).hexdigest()
