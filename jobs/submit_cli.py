"""`shardscribe submit`: a command for every job that a cluster can run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jobs.mistakes import mistakes_in_one_line
from jobs.options import EXAMPLES, Address, Debug, Detach, Set
from pipeline.config import PseudolabelConfig, TranscribeConfig, load_config

submit = typer.Typer(no_args_is_help=True, help="Send a job to a Ray cluster elsewhere and follow it.")


@submit.command(
    "transcribe",
    epilog=EXAMPLES + "shardscribe submit transcribe conf/archive-s3.yaml --address http://head:8265\n\n"
    "shardscribe submit transcribe conf/archive-s3.yaml --address https://ray.example.org --detach",
)
def submit_transcribe(
    conf: Annotated[Path, typer.Argument(help="YAML configuration, as `shardscribe transcribe` takes it.")],
    address: Address,
    overrides: Set = None,
    detach: Detach = False,
    debug: Debug = False,
) -> None:
    """Run `shardscribe transcribe CONF` on a cluster: send it, follow its log, end with its exit code.

    This package and the configuration are sent; torch, qwen-asr and the rest have to be in the cluster's image
    (infra/Dockerfile). A token goes in RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH. Ctrl-C leaves
    the job running.
    """
    _submit(TranscribeConfig, conf, address, overrides, detach, debug)


@submit.command(
    "pseudolabel",
    epilog=EXAMPLES + "shardscribe submit pseudolabel conf/pseudolabel.yaml --address http://head:8265",
)
def submit_pseudolabel(
    conf: Annotated[Path, typer.Argument(help="YAML configuration, as `shardscribe pseudolabel` takes it.")],
    address: Address,
    overrides: Set = None,
    detach: Detach = False,
    debug: Debug = False,
) -> None:
    """Run `shardscribe pseudolabel CONF` on a cluster, as `submit transcribe` does."""
    _submit(PseudolabelConfig, conf, address, overrides, detach, debug)


@submit.command(
    "quantize",
    epilog=EXAMPLES + "shardscribe submit quantize conf/quantize.yaml --address http://head:8265 --set ray.num_gpus=1",
)
def submit_quantize(
    conf: Annotated[Path, typer.Argument(help="YAML configuration, as `shardscribe quantize` takes it.")],
    address: Address,
    overrides: Set = None,
    detach: Detach = False,
    debug: Debug = False,
) -> None:
    """Run `shardscribe quantize CONF` on a cluster, as `submit transcribe` does; its nodes share the output folder."""
    from pipeline.distill.config import QuantizeConfig

    _submit(QuantizeConfig, conf, address, overrides, detach, debug)


@submit.command(
    "distill",
    epilog=EXAMPLES + "shardscribe submit distill conf/distill.yaml --address http://head:8265 --set ray.workers=8",
)
def submit_distill(
    conf: Annotated[Path, typer.Argument(help="YAML configuration, as `shardscribe distill` takes it.")],
    address: Address,
    overrides: Set = None,
    detach: Detach = False,
    debug: Debug = False,
) -> None:
    """Run `shardscribe distill CONF` on a cluster, as `submit transcribe` does; its nodes share the output folder."""
    from pipeline.distill.config import DistillConfig

    _submit(DistillConfig, conf, address, overrides, detach, debug)


@submit.command(
    "distill-tower",
    epilog=EXAMPLES + "shardscribe submit distill-tower conf/distill-tower.yaml --address http://head:8265",
)
def submit_distill_tower(
    conf: Annotated[Path, typer.Argument(help="YAML configuration, as `shardscribe distill-tower` takes it.")],
    address: Address,
    overrides: Set = None,
    detach: Detach = False,
    debug: Debug = False,
) -> None:
    """Run `shardscribe distill-tower CONF` on a cluster, as `submit distill` does."""
    from pipeline.distill.config import TowerConfig

    _submit(TowerConfig, conf, address, overrides, detach, debug)


def _submit(model: type[Any], conf: Path, address: str, overrides: list[str] | None, detach: bool, debug: bool) -> None:
    console = Console(stderr=True)
    with mistakes_in_one_line(console, debug):
        config = load_config(model, conf, overrides or [])
        from jobs import submit as job

        code = job.run(config, conf, address, detach, console)
    raise typer.Exit(code)
