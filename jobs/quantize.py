"""`shardscribe quantize`: a checkpoint in four bits, calibrated and measured, with its card."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.console import Console

from pipeline.cluster import connected, on_cluster
from pipeline.distill.config import QuantizeConfig
from pipeline.distill.quantize import Say, quantize
from pipeline.distill.quantized_output import check_output, write


def run(config: QuantizeConfig, console: Console) -> None:
    """Raises ConfigError and CheckpointError for what cannot be done as configured, StorageError for audio that is not
    there any more; nothing is left behind then."""
    out = check_output(config.output)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    if config.ray.address is None:
        facts = _quantized(config, say)
    else:
        with connected(config.ray.address):
            facts = on_cluster(partial(_quantized, config, print), config.ray.num_cpus, config.ray.num_gpus)
    measured = facts["heldout"] or facts["calibration"]
    share = facts["bytes"].get("packed", facts["bytes"]["fake-quant"]) / facts["bytes"]["original"]
    say(
        f"{out}: {len(facts['layers'])} layers in {config.format}, {100 * share:.1f} % of the bytes; KL "
        f"{measured['kl']:.5f} nats a token on {'held-out' if facts['heldout'] else 'calibration'} speech. Card: "
        f"{out / 'README.md'}"
    )


def _quantized(config: QuantizeConfig, say: Say) -> dict[str, Any]:
    return write(quantize(config, say), config)
