"""WebDataset shards: KEY.flac, KEY.txt and KEY.json of each segment."""

from __future__ import annotations

import numpy as np

from pipeline.export.folder import Folder, Row, Tar, flac, key_of, to_json


class WebdatasetWriter:
    """shard-000000.tar and so on. KEY.json holds the row's light columns; its times are those in the input's file."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._tar: Tar | None = None
        self._num_shards = 0

    def add(self, row: Row, pcm: np.ndarray | None) -> None:
        assert pcm is not None
        if self._tar is None:
            self._tar = Tar(self._folder)
        key = key_of(row)
        self._tar.add(f"{key}.flac", flac(pcm))
        self._tar.add(f"{key}.txt", row["text"].encode())
        self._tar.add(f"{key}.json", to_json(row).encode())
        if self._tar.num_bytes >= self._folder.shard_bytes:
            self.close()

    def end_split(self) -> None: ...

    def close(self) -> None:
        if self._tar is not None:
            self._tar.put(f"shard-{self._num_shards:06d}.tar")
            self._tar, self._num_shards = None, self._num_shards + 1
