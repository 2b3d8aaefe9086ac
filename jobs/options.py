"""Options that many commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the configuration: engine.batch_size=16"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Address = Annotated[
    str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard: http://HOST:8265")
]
Detach = Annotated[bool, typer.Option("--detach", help="Print the job's id and leave it running.")]
EXAMPLES = "[bold]Examples[/bold]\n\n"

Force = Annotated[bool, typer.Option("--force", help="Also run languages that a causal tower was not trained on.")]


def with_force(overrides: list[str] | None, force: bool) -> list[str]:
    return [*(overrides or []), *(["engine.untrained_languages=true"] if force else [])]
