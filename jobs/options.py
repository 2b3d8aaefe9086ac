"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the configuration: engine.batch_size=16"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
EXAMPLES = "[bold]Examples[/bold]\n\n"
