"""JSON lines: every column of every row."""

from __future__ import annotations

import numpy as np

from pipeline.export.folder import Folder, Lines, Row


class JsonlWriter:
    """transcripts-00000.jsonl and so on; numbers that are not finite become null."""

    def __init__(self, folder: Folder) -> None:
        self._lines = Lines(folder, "transcripts-{:05d}.jsonl")

    def add(self, row: Row, pcm: np.ndarray | None) -> None:
        self._lines.add(row)

    def end_split(self) -> None: ...

    def close(self) -> None:
        self._lines.close()
