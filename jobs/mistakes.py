"""The edge of the program: a user's mistake becomes one line and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from pipeline import redact
from pipeline.config import ConfigError

EXIT_UNFINISHED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

# their messages alone tell a user what to do; what is not imported was not raised
_TELLING = (
    ("pipeline.config", "ConfigError"),
    ("pipeline.storage", "StorageError"),
    ("pipeline.engine.base", "EngineError"),
    ("pipeline.engine.checkpoint", "CheckpointError"),
    ("pipeline.distill.worker", "TrainingError"),
    ("jobs.submit", "ClusterError"),
)


@contextmanager
def mistakes_in_one_line(console: Console, debug: bool) -> Iterator[None]:
    """End the command with the message of a user's mistake, or the last line of any other error and how to see more."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        console.print("interrupted: what is committed stays; run the same command again to go on", highlight=False)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except Exception as error:  # the edge of the program: nothing above can act on it
        if debug:
            sys.stderr.write(redact.text(traceback.format_exc()))
        cause = _root_mistake(error)
        if cause is not None:
            console.print(f"[red]error:[/red] {_escaped(redact.text(str(cause)))}", highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_USAGE if isinstance(cause, ConfigError) else EXIT_UNFINISHED) from None
        console.print(
            f"[red]failed:[/red] {_escaped(redact.text(f'{type(error).__name__}: {error}'.strip().splitlines()[-1]))}\n"
            "what is committed stays; run with --debug for the traceback",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_UNFINISHED) from None


def _root_mistake(error: BaseException) -> BaseException | None:
    """The error in the chain of causes whose message alone tells a user what to do: ours, wherever it was raised."""
    ours: tuple[type[BaseException], ...] = tuple(
        getattr(sys.modules[module], name) for module, name in _TELLING if module in sys.modules
    )
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, ours):
            return current
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return None


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")
