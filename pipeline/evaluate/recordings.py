"""An output folder as items to score: the segments of a recording are joined, and its reference counts once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from pipeline import redact, storage
from pipeline.config import ConfigError
from pipeline.evaluate.items import UNKNOWN, Item, Row, System, checked_language
from pipeline.metrics import unit_name
from pipeline.output import Output
from pipeline.report.gather import shard_name
from pipeline.summary import summarize_records

_COLUMNS = [
    "recording_id", "audio_filepath", "channel", "offset", "duration", "text", "text_ref", "language_ref", "language",
    "token_ids", "avg_logprob", "status", "filter_reasons",
]  # fmt: skip
_MADE_BY = ("engine", "model_id", "model_revision", "quantization", "dtype", "device", "attention")
_SHARD_NUMBER = re.compile(r"[-_.]\d{3,}(-of-\d{3,})?$")
_MANIFEST = re.compile(r"([^/*?{}]+?)\.(json|jsonl)(\.gz)?$", re.IGNORECASE)


@dataclass(slots=True)
class _Recording:
    """A recording with a reference, and its rows without the columns that all of them share."""

    audio_filepath: str
    text_ref: str
    language_ref: str | None
    segments: list[dict[str, Any]] = field(default_factory=list)


def read_output(url: str, options: storage.Options, language: str | None = None) -> System:
    """The system that wrote the output at `url`; `language` overrides what the inputs named and the model detected.

    The channels of a recording count as one. Raises ConfigError for an output that is unfinished or has no references.
    """
    output = Output(url, options)
    plan, committed = output.read_plan(), output.committed()
    keys = sorted(key for done in committed.values() for key in done.keys)
    recordings: dict[str, _Recording] = {}
    rows: list[Row] = []
    without: set[str] = set()
    newest: dict[str, Any] = {"committed_at": 0.0}

    def observed() -> Iterator[dict[str, Any]]:
        nonlocal newest
        for _, record, table in output.tables(keys, _COLUMNS):
            _collect(table, recordings, rows, without)
            newest = record if record["committed_at"] > newest["committed_at"] else newest
            yield record

    summary = summarize_records(plan, committed, observed())
    shown = redact.names(output.url)
    if not summary.is_complete:
        raise ConfigError(
            f"{shown} is unfinished ({summary.splits_complete} of {summary.splits_planned} splits are complete), and a "
            "recording may lack its end; run its `shardscribe transcribe` again to finish it"
        )
    if not recordings:
        raise ConfigError(
            f"{shown} holds no references: text_ref is null in all of its {summary.num_segments:,} rows. Inputs give "
            "them as KEY.txt or KEY.json beside the audio, a manifest's `text`, or a Parquet column"
        )
    sets = _Sets([each.audio_filepath for each in recordings.values()], _inputs(output, options))
    return System(
        shown,
        [_item(name, each, sets, language) for name, each in sorted(recordings.items())],
        rows,
        len(without),
        {key: value for key in _MADE_BY if (value := newest.get("engine", {}).get(key)) is not None},
        summary.rtfx,
    )


def _collect(table: pa.Table, recordings: dict[str, _Recording], rows: list[Row], without: set[str]) -> None:
    """Add a unit's rows to what is known of its recordings; `without` names those that have no reference."""
    num_tokens = pc.list_value_length(table["token_ids"])
    for row in table.drop_columns(["token_ids"]).append_column("num_tokens", num_tokens).to_pylist():
        rows.append(Row(row["duration"], tuple(row["filter_reasons"])))
        name = row.pop("recording_id").removesuffix(f"#ch{row['channel']}")
        shared = row.pop("audio_filepath"), row.pop("text_ref"), row.pop("language_ref")
        if shared[1] is None:
            without.add(name)
        else:
            recordings.setdefault(name, _Recording(*shared)).segments.append(row)


def _item(name: str, recording: _Recording, sets: _Sets, language: str | None) -> Item:
    segments = sorted(recording.segments, key=lambda row: (row["offset"], row["channel"] or 0))
    heard: Counter[str] = Counter()
    for row in segments:
        heard[row["language"] or ""] += row["duration"]
    detected = max(heard, key=lambda each: (bool(each), heard[each])) or None
    named = language or recording.language_ref or detected
    try:
        spoken = checked_language(named) if named else UNKNOWN
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}, or override it with --language") from None
    reached = [row for row in segments if row["status"] != "failed"]
    texts = [row["text"].strip() for row in reached]
    joiner = "" if unit_name(spoken) == "CER" else " "
    scored = [row for row in reached if row["avg_logprob"] is not None and row["num_tokens"]]
    num_tokens = sum(row["num_tokens"] for row in scored)
    return Item(
        item_id=name,
        reference=recording.text_ref,
        hypothesis=joiner.join(text for text in texts if text) if reached else None,
        language=spoken,
        set_name=sets.name(recording.audio_filepath),
        duration_s=max(row["offset"] + row["duration"] for row in segments) - segments[0]["offset"],
        detected=detected,
        avg_logprob=sum(row["avg_logprob"] * row["num_tokens"] for row in scored) / num_tokens if num_tokens else None,
        filter_reasons=tuple(dict.fromkeys(reason for row in segments for reason in row["filter_reasons"])),
    )


class _Sets:
    """Names of the sets that audio belongs to: its tar or Parquet file without the shard's number; all files outside of
    such belong to the one manifest that was the input, or to the folder that they share."""

    def __init__(self, audio_filepaths: Sequence[str], inputs: Sequence[str]) -> None:
        manifest = _MANIFEST.search(inputs[0]) if len(inputs) == 1 else None
        folders = [PurePosixPath(path).parent.parts for path in audio_filepaths if shard_name([path]) == path]
        shared = [parts[0] for parts in zip(*folders, strict=False) if len(set(parts)) == 1]
        self._of_files = manifest[1] if manifest else shared[-1].strip("/") if shared else ""

    def name(self, audio_filepath: str) -> str:
        shard = shard_name([audio_filepath])
        if shard == audio_filepath:
            return self._of_files
        stem = re.sub(r"\.(tar|tar\.gz|tgz|parquet)$", "", PurePosixPath(shard).name, flags=re.IGNORECASE)
        return _SHARD_NUMBER.sub("", stem) or stem


def _inputs(output: Output, options: storage.Options) -> list[str]:
    """The paths of the configuration that the output belongs to."""
    resolved: Mapping[str, Any] = yaml.safe_load(
        storage.read_bytes(storage.join(output.url, "shardscribe.yaml"), options)
    )
    return [source["path"] for source in resolved["config"]["inputs"]]
