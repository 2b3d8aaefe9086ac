"""A training from the outside: connected to Ray, told as it goes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.cluster import connected
from pipeline.distill.config import TrainingConfig
from pipeline.distill.log import entries
from pipeline.distill.worker import Worker

Say = Callable[[str], None]
_LOOK_EVERY_S = 0.5
_NO_LOSS = ("step", "kind", "loss", "lr", "grad_norm", "tokens_s", "rtfx", "error_rate", "best_step")


def run_training(train: Callable[[Worker], None], config: TrainingConfig, folder: Path, say: Say) -> None:
    """Raises what `train` raises, and TrainingError when workers die too often."""
    with connected(config.ray.address):
        from pipeline.distill.fit import fit  # not above: Ray reads its environment when it is imported

        with _Told(folder / "training.jsonl", config.steps, say):
            fit(train, config.ray, folder / "ray", config.device)


class _Told:
    """Tells what is logged while it is, from another thread."""

    def __init__(self, file: Path, steps: int, say: Say) -> None:
        self._file, self._steps, self._say = file, steps, say
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._told = {(entry["step"], entry["kind"]) for entry in entries(self._file)}
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            self._tell()
        self._tell()

    def _tell(self) -> None:
        for entry in entries(self._file):
            key = entry["step"], entry["kind"]
            if key not in self._told:
                self._told.add(key)
                self._say(_line(entry, self._steps))


def _line(entry: dict[str, Any], steps: int) -> str:
    step = f"step {entry['step']:,}/{steps:,}"
    losses = "  ".join(
        f"{name.upper() if len(name) < 4 else name} {value:.4f}"
        for name, value in entry.items()
        if name not in _NO_LOSS and not name.startswith("error_rate/")
    )
    if entry["kind"] == "heldout":
        rates = ", ".join(
            f"{name.removeprefix('error_rate/')} {100 * rate:.2f} %"
            for name, rate in entry.items()
            if name.startswith("error_rate/")
        )
        best = "  best so far" if entry["best_step"] == entry["step"] else ""
        return f"{step}  held-out: {losses}  {rates}{best}"
    return (
        f"{step}  loss {entry['loss']:.4f}  {losses}  lr {entry['lr']:.2e}  {entry['tokens_s']:,.0f} tokens/s  "
        f"{entry['rtfx']:.0f}x"
    )


def told_end(facts: dict[str, Any], model: Path) -> str:
    first, best = facts["heldout"][0], next(e for e in facts["heldout"] if e["step"] == facts["best_step"])
    return (
        f"{model}: step {facts['best_step']:,}, errors {100 * first['error_rate']:.2f} -> "
        f"{100 * best['error_rate']:.2f} % on held-out speech. Card: {model / 'README.md'}"
    )
