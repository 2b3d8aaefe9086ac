"""NeMo manifests: JSON lines with `audio_filepath, offset, duration, text, lang`.

https://docs.nvidia.com/nemo-framework/user-guide/latest/nemotoolkit/asr/datasets.html
"""

from __future__ import annotations

import re

import numpy as np

from pipeline.config import ConfigError
from pipeline.export.folder import Folder, Lines, Row, Tar, flac, key_of, to_json

_INSIDE = re.compile(r"\.(?:tar|tar\.gz|tgz)/|#\d+(?:/[^/]*)?$", re.IGNORECASE)


class NemoWriter:
    """manifest_0.json and so on, which name the audio of the inputs by path, offset and duration.

    Raises ConfigError for audio that NeMo cannot open so: inside a tar or Parquet, and one of several channels.
    """

    def __init__(self, folder: Folder) -> None:
        self._lines = Lines(folder, "manifest_{}.json")

    def add(self, row: Row, pcm: np.ndarray | None) -> None:
        what = None
        if _INSIDE.search(row["audio_filepath"]):
            what = "lies inside another file"
        elif row["channel"] is not None:
            what = f"is channel {row['channel']} of a file, which a manifest cannot say"
        if what:
            raise ConfigError(f"nemo: the audio of {row['recording_id']} {what}; export with --audio copy")
        self._lines.add(_line(row, row["audio_filepath"], row["offset"], row["duration"]))

    def end_split(self) -> None: ...

    def close(self) -> None:
        self._lines.close()


class NemoTarWriter:
    """Tarred: manifest_0.json beside audio_0.tar with one FLAC a line, and so on."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._tar: Tar | None = None
        self._lines: list[str] = []
        self._num_shards = 0

    def add(self, row: Row, pcm: np.ndarray | None) -> None:
        assert pcm is not None
        if self._tar is None:
            self._tar = Tar(self._folder)
        name = f"{key_of(row)}.flac"
        self._tar.add(name, flac(pcm))
        self._lines.append(to_json(_line(row, name, 0.0, row["duration"]) | {"shard_id": self._num_shards}))
        if self._tar.num_bytes >= self._folder.shard_bytes:
            self.close()

    def end_split(self) -> None: ...

    def close(self) -> None:
        if self._tar is not None:
            self._tar.put(f"audio_{self._num_shards}.tar")
            self._folder.put(f"manifest_{self._num_shards}.json", "".join(f"{each}\n" for each in self._lines).encode())
            self._tar, self._lines, self._num_shards = None, [], self._num_shards + 1


def _line(row: Row, audio_filepath: str, offset: float, duration: float) -> Row:
    return {
        "audio_filepath": audio_filepath,
        "offset": offset,
        "duration": duration,
        "text": row["text"],
        "lang": row["language"],
        "segment_id": row["segment_id"],
    }
