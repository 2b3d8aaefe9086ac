"""What a training says while it runs: OUT/training.jsonl, a line an entry, and OUT/tensorboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class TrainingLog:
    """Goes on behind `step`: what an interrupted run had logged after it is cut off."""

    def __init__(self, output: Path, step: int) -> None:
        self._file = output / "training.jsonl"
        kept = [entry for entry in entries(self._file) if entry["step"] <= step]
        partial = self._file.with_suffix(".part")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        partial.rename(self._file)
        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def add(self, entry: dict[str, Any]) -> None:
        """An entry has `step` and `kind` ("step" or "heldout")."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        for name, value in entry.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(f"{entry['kind']}/{name}", value, entry["step"])
        self._board.flush()

    def close(self) -> None:
        self._board.close()


def entries(file: Path) -> list[dict[str, Any]]:
    """The whole entries of a log; what a kill cut off is left out."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
