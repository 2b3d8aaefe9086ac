"""`shardscribe pack`: an INT4 checkpoint of any form as packed safetensors, once."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from pipeline.config import ConfigError
from pipeline.engine.checkpoint import resolve
from pipeline.engine.quantized import read, write_packed


def run(model: str, out: Path, console: Console) -> None:
    """Raises CheckpointError for what is no INT4 checkpoint, ConfigError when `out` exists."""
    if out.exists():
        raise ConfigError(f"{out} exists; name a new folder")
    path = resolve(model, quantization="int4").path
    quantized = read(path)
    write_packed(quantized, path, out)
    weights = quantized.linears.values()
    packed = sum(weight.num_bytes for weight in weights)
    full = 2 * sum(weight.shape[0] * weight.shape[1] for weight in weights)
    console.print(
        f"{out}: {len(weights)} layers in {packed / 1e6:,.1f} MB, {100 * packed / full:.1f} % of 16 bit (it was "
        f"{quantized.form}). engine: {{model: {out}, quantization: int4}} runs it",
        highlight=False,
        soft_wrap=True,
    )
