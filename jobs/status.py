"""What an output folder holds so far, from the output alone: works while the job runs on another machine."""

from __future__ import annotations

from rich.console import Console

from pipeline.output import Output
from pipeline.storage import Options
from pipeline.summary import print_summary, summarize


def run(url: str, options: Options, console: Console) -> None:
    """Print units planned and committed, hours, failures by reason, RTFx and ETA of the output at `url`.

    Raises ConfigError when no job has written there.
    """
    print_summary(summarize(Output(url, options)), console)
