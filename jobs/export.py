"""The rows of an output in the formats that others read, with the audio of their segments where a format holds it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import yaml
from rich.console import Console

from pipeline import storage
from pipeline.config import ConfigError, TranscribeConfig, validate
from pipeline.export.folder import Folder, Row
from pipeline.export.formats import FORMATS, KINDS
from pipeline.export.rows import Selection, with_audio, without_audio
from pipeline.languages import NAMES, language_name
from pipeline.output import Output
from pipeline.progress import duration
from pipeline.storage import Options
from pipeline.summary import summarize

EXIT_OK, EXIT_SOME_MISSING = 0, 3
_SHOWN = 5  # of the segments whose audio is missing


def run(
    url: str,
    options: Options,
    to: str,
    out: str | None,
    only_kept: bool | None,
    languages: Sequence[str],
    audio: str | None,
    console: Console,
) -> int:
    """Export the output at `url` to the format `to`, into the new folder `out` (None: OUT/exports/<format>).

    `only_kept` None and `audio` None are the format's own choice. Returns 0, or 3 when the audio of some segments could
    not be read again: those are left out and counted. Raises ConfigError for a mistake in the command.
    """
    kind = next((kind for name, kind in KINDS.items() if name == to), None)
    if kind is None:
        raise ConfigError(f"--to {to}: known are {', '.join(FORMATS)}")
    mode = next((mode for mode in kind.audio if audio in (None, mode)), None)
    if mode is None:
        raise ConfigError(f"--audio {audio}: {to} knows {' and '.join(kind.audio)}")
    for language in languages:
        if language_name(language) not in NAMES:
            raise ConfigError(f"--language {language}: known are {', '.join(NAMES)}")
    output = Output(url, options)
    summary = summarize(output)
    config_url = storage.join(output.url, "shardscribe.yaml")
    resolved = yaml.safe_load(storage.read_bytes(config_url, options))
    config = validate(TranscribeConfig, resolved["config"], config_url)
    selection = Selection(
        kind.only_kept if only_kept is None else only_kept, kind.only_heard, tuple(languages), kind.columns
    )
    target = out or storage.join(output.url, f"exports/{to}")
    num_rows, audio_s, missing = 0, 0.0, []
    with Folder(target, options) as folder, console.status(f"writing {folder.url}"):
        writer = kind.writer(folder, mode)
        for split in _splits(output, selection, config, options, mode == "copy"):
            for row, pcm in split:
                if isinstance(pcm, str):
                    missing.append(f"{row['segment_id']}: {pcm}")
                    continue
                writer.add(row, pcm)
                num_rows += 1
                audio_s += row["duration"]
            writer.end_split()
        writer.close()
        record = {
            "format": to,
            "audio": mode,
            "source": output.url,
            "config_hash": resolved["config_hash"],
            "only_kept": selection.only_kept,
            "languages": list(languages),
            "num_rows": num_rows,
            "audio_s": round(audio_s, 3),
            "num_without_audio": len(missing),
            "is_complete": summary.is_complete,
        }
        folder.put("export.json", json.dumps(record, indent=2).encode())
    lines = [f"{folder.url}  {num_rows:,} segments, {duration(audio_s)}"]
    if not summary.is_complete:
        lines.append("the job is not finished: this is what it had committed")
    if missing:
        lines += [
            f"{len(missing):,} segments left out, their audio could not be read again, such as:",
            *missing[:_SHOWN],
        ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return EXIT_SOME_MISSING if missing else EXIT_OK


def _splits(
    output: Output, selection: Selection, config: TranscribeConfig, options: Options, copies_audio: bool
) -> Iterator[Iterator[tuple[Row, np.ndarray | str | None]]]:
    if copies_audio:
        yield from with_audio(output, selection, config, options)
    else:
        for rows in without_audio(output, selection):
            yield ((row, None) for row in rows)
