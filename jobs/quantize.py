"""`shardscribe quantize`: a checkpoint in four bits, calibrated and measured, with its card."""

from __future__ import annotations

from rich.console import Console

from pipeline.distill.config import QuantizeConfig
from pipeline.distill.quantize import quantize
from pipeline.distill.quantized_output import check_output, write


def run(config: QuantizeConfig, console: Console) -> None:
    """Raises ConfigError and CheckpointError for what cannot be done as configured, StorageError for audio that is not
    there any more; nothing is left behind then."""
    out = check_output(config.output)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    facts = write(quantize(config, say), config)
    measured = facts["heldout"] or facts["calibration"]
    share = facts["bytes"].get("packed", facts["bytes"]["fake-quant"]) / facts["bytes"]["original"]
    say(
        f"{out}: {len(facts['layers'])} layers in {config.format}, {100 * share:.1f} % of the bytes; KL "
        f"{measured['kl']:.5f} nats a token on {'held-out' if facts['heldout'] else 'calibration'} speech. Card: "
        f"{out / 'README.md'}"
    )
