"""What each filter takes out of an output, from the output alone."""

from __future__ import annotations

import json

from rich.console import Console

from pipeline.funnel import print_funnel, read_funnel
from pipeline.output import Output
from pipeline.storage import Options


def run(url: str, options: Options, as_json: bool, console: Console) -> None:
    """Print rows and hours that are left after each filter, by language. Raises ConfigError when no job has written
    at `url`.
    """
    funnel = read_funnel(Output(url, options))
    if as_json:
        print(json.dumps(funnel.to_json(), ensure_ascii=False, indent=2))
    else:
        print_funnel(funnel, console)
