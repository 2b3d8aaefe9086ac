"""The checkpoints that come with the package."""

from __future__ import annotations

from rich.console import Console

from pipeline.engine.checkpoint import EMBEDDED_FOLDER, embedded_models


def run(console: Console) -> None:
    """List the embedded models with their sizes, then the card of the family."""
    for name, path in embedded_models().items():
        num_bytes = sum(file.stat().st_size for file in path.iterdir())
        console.print(f"{name:<18} {num_bytes / 1e6:5.1f} MB  {path}", highlight=False, soft_wrap=True)
    card = EMBEDDED_FOLDER / "README.md"
    console.print()
    console.print(card.read_text(encoding="utf-8"), highlight=False, markup=False, soft_wrap=True)
