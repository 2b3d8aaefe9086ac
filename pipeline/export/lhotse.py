"""Lhotse Shar: `CutSet.from_shar(in_dir="FOLDER/shar")` reads it. Each file there is taken for a field of the cuts.

The layout follows lhotse's `SharWriter` (lhotse/shar/writers): cuts.000000.jsonl.gz, and recording.000000.tar with
`<cut id>.flac` and `<cut id>.json` for each line, in the same order.
"""

from __future__ import annotations

import gzip
from typing import Any

import numpy as np

from pipeline.export.folder import Folder, Row, Tar, flac, key_of, to_json
from pipeline.schema import SAMPLE_RATE_HZ

_CUSTOM = ("segment_id", "recording_id", "audio_filepath", "channel", "offset", "avg_logprob", "keep", "filter_reasons")


class LhotseWriter:
    """Each segment is a cut of its own recording, with one supervision."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._tar: Tar | None = None
        self._cuts: list[str] = []
        self._num_shards = 0

    def add(self, row: Row, pcm: np.ndarray | None) -> None:
        assert pcm is not None
        if self._tar is None:
            self._tar = Tar(self._folder)
        key, duration = key_of(row), len(pcm) / SAMPLE_RATE_HZ
        recording = {
            "id": key,
            "sources": [{"type": "shar", "channels": [0], "source": ""}],
            "sampling_rate": SAMPLE_RATE_HZ,
            "num_samples": len(pcm),
            "duration": duration,
            "channel_ids": [0],
        }
        self._tar.add(f"{key}.flac", flac(pcm))
        self._tar.add(f"{key}.json", to_json(recording).encode())
        self._cuts.append(to_json(_cut(row, recording)))
        if self._tar.num_bytes >= self._folder.shard_bytes:
            self.close()

    def end_split(self) -> None: ...

    def close(self) -> None:
        if self._tar is not None:
            self._tar.put(f"shar/recording.{self._num_shards:06d}.tar")
            cuts = "".join(f"{each}\n" for each in self._cuts).encode()
            self._folder.put(f"shar/cuts.{self._num_shards:06d}.jsonl.gz", gzip.compress(cuts, mtime=0))
            self._tar, self._cuts, self._num_shards = None, [], self._num_shards + 1


def _cut(row: Row, recording: dict[str, Any]) -> dict[str, Any]:
    whole = {"start": 0, "duration": recording["duration"], "channel": 0}
    supervision = {
        "id": recording["id"],
        "recording_id": recording["id"],
        **whole,
        "text": row["text"],
        "language": row["language"],
        "custom": {name: row[name] for name in _CUSTOM},
    }
    return {"id": recording["id"], **whole, "supervisions": [supervision], "recording": recording, "type": "MonoCut"}
