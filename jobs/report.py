"""One HTML page about an output, from the output and the audio of a few of its segments."""

from __future__ import annotations

from rich.console import Console

from pipeline import storage
from pipeline.output import Output
from pipeline.report.audio import read_clips
from pipeline.report.gather import gather
from pipeline.report.page import render
from pipeline.storage import Options


def run(url: str, options: Options, out: str | None, num_samples: int, with_audio: bool, console: Console) -> None:
    """Write the page about the output at `url` to `out`, a path or URL; None: into the output when that is local, else
    into the working directory. Raises ConfigError when no job has written at `url`.
    """
    output = Output(url, options)
    with console.status("reading the output"):
        report = gather(output, options, num_samples)
    clips = None
    if with_audio:
        with console.status("reading the audio of the samples"):
            clips = read_clips([row for _, row in report.samples], report.config, options)
    page = render(report, clips).encode()
    target = storage.resolve(
        out or (storage.join(output.url, "report.html") if storage.is_local(url) else "report.html")
    )
    storage.write_bytes(target, page, options)
    console.print(f"{target}  ({len(page) / 1e6:.1f} MB)", highlight=False, markup=False, soft_wrap=True)
    heard = zip(report.samples, clips or (), strict=clips is not None)
    missing = [clip.note for (_, row), clip in heard if clip.ogg is None and row.duration]
    if missing:
        console.print(
            f"{len(missing)} of {len(report.samples)} samples without audio, such as: {missing[0]}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
