"""The commit step: a unit's rows become one Parquet object, whose existence is the commit.

The object's key-value metadata holds a run record (JSON), so that every figure in it can be traced: engine, model and
revision, decode parameters, package versions, config hash; and the sums that `status` adds up.
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import retry
from pipeline.config import TranscribeConfig
from pipeline.output import RECORD_KEY, Output
from pipeline.placement import place_units, sentences
from pipeline.schema import LOGITS, SAMPLE_RATE_HZ, TRANSCRIPTS, Hypothesis, Labels
from pipeline.text import units
from pipeline.units import TranscribedSegment, TranscribedUnit

VERSIONED = ("shardscribe", "ray", "torch", "transformers", "qwen-asr", "silero-vad", "pyarrow", "numpy")

_RECORDED = {"audio", "segmentation", "engine", "agree_with", "labels"}


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the driver learns of a committed unit; `new` is False when another writer was first, `num_retries` counts
    the storage requests made again, from reading its audio to committing it; `errors` failed rows by reason code."""

    unit: str
    new: bool
    audio_s: float
    num_segments: int
    num_failed: int
    num_retries: int = 0
    errors: dict[str, int] = field(default_factory=dict)


def commit_unit(
    output: Output, unit: TranscribedUnit, labels: Sequence[Labels], config: TranscribeConfig, run_id: str
) -> Receipt:
    """Write one unit. `labels` are parallel to `unit.segments`."""
    constants = {
        "unit_id": unit.key.name,
        "engine": unit.engine["engine"],
        "model_id": unit.engine["model_id"],
        "model_revision": unit.engine["model_revision"],
        "quantization": unit.engine["quantization"],
        "config_hash": config.result_hash(),
        "run_id": run_id,
    }
    errors = Counter(segment.error.partition(":")[0] for segment in unit.segments if segment.error)
    pairs = list(zip(unit.segments, labels, strict=True))
    rows = [_row(segment, label) | constants for segment, label in pairs]
    record = {
        "unit": unit.key.name,
        "run_id": run_id,
        "config_hash": constants["config_hash"],
        "committed_at": time.time(),
        "audio_s": unit.audio_s,
        "decoded_s": unit.decoded_s,
        "busy_s": unit.busy_s,
        "num_recordings": unit.num_recordings,
        "num_segments": len(rows),
        "num_retries": unit.num_retries,
        "status": Counter(label.status for label in labels),
        "errors": errors,
        "audio_s_by_language": _audio_by_language(unit.segments),
        "engine": unit.engine,
        "agree_with": unit.agree_with,
        "config": config.model_dump(mode="json", include=_RECORDED, exclude={"labels": {"calibrate"}}),
        "versions": {name: version(name) for name in VERSIONED},
    }
    before = retry.num_retries()
    if config.engine.top_logprobs:
        output.commit_logits(unit.key, logits_to_parquet(unit.segments))
    new = output.commit_unit(unit.key, to_parquet(rows, record))
    num_retries = unit.num_retries + retry.num_retries() - before
    num_failed = sum(label.status == "failed" for label in labels)
    return Receipt(unit.key.name, new, unit.audio_s, len(rows), num_failed, num_retries, dict(errors))


def to_parquet(rows: list[dict[str, Any]], record: dict[str, Any]) -> bytes:
    """Rows in `TRANSCRIPTS` and their run record as Parquet bytes (zstd)."""
    table = pa.Table.from_pylist(rows, schema=TRANSCRIPTS)
    table = table.replace_schema_metadata({RECORD_KEY: json.dumps(record, ensure_ascii=False).encode()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def logits_to_parquet(segments: Sequence[TranscribedSegment]) -> bytes:
    """The likeliest tokens of `segments` as Parquet bytes in `LOGITS`."""
    columns: dict[str, list[Any]] = {name: [] for name in LOGITS.names}
    for segment in segments:
        hypothesis = segment.hypothesis
        if hypothesis is not None and hypothesis.top_ids is not None and hypothesis.top_logprobs is not None:
            columns["segment_id"].append(segment.segment_id)
            columns["token_ids"].append(hypothesis.token_ids)
            columns["num_top"].append(hypothesis.top_ids.shape[1])
            columns["top_ids"].append(hypothesis.top_ids.ravel())
            columns["top_logprobs"].append(hypothesis.top_logprobs.astype(np.float16).ravel())
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=LOGITS), buffer, compression="zstd")
    return buffer.getvalue()


def _row(segment: TranscribedSegment, label: Labels) -> dict[str, Any]:
    hypothesis = segment.hypothesis
    row: dict[str, Any] = {
        "segment_id": segment.segment_id,
        "recording_id": segment.recording_id,
        "audio_filepath": segment.audio_filepath,
        "channel": segment.channel,
        "offset": segment.offset,
        "duration": segment.duration,
        "text": "",
        "text_raw": "",
        "text_ref": segment.text_ref,
        "language_ref": segment.language_ref,
        "speech_ratio": segment.speech_ratio,
        "error": segment.error,
        "keep": label.keep,
        **{each.name: getattr(label, each.name) for each in fields(label)},
    }
    if hypothesis is not None:
        row |= {
            "text": hypothesis.text,
            "text_raw": hypothesis.text_raw,
            "language": hypothesis.language,
            "words": [
                {"word": word.word, "start": word.start_s, "end": word.end_s, "score": word.score}
                for word in hypothesis.words
            ],
            "sentences": _sentences(segment, hypothesis),
            "commit_latencies": _latencies(segment, hypothesis),
            "token_ids": hypothesis.token_ids,
            "token_logprobs": hypothesis.token_logprobs,
            "finish_reason": hypothesis.finish_reason,
        }
    return row


def _sentences(segment: TranscribedSegment, hypothesis: Hypothesis) -> list[dict[str, Any]]:
    return [
        {"text": each.text, "offset": segment.offset + each.start_s, "duration": each.end_s - each.start_s}
        for each in sentences(hypothesis, segment.speech, round(segment.duration * SAMPLE_RATE_HZ))
    ]


def _latencies(segment: TranscribedSegment, hypothesis: Hypothesis) -> list[float] | None:
    """Never below 0: a word that seems to be out before it ends stands earlier than its place in the text tells."""
    if not hypothesis.published_s:
        return None
    ends = place_units(units(hypothesis.text), segment.speech, round(segment.duration * SAMPLE_RATE_HZ))
    return [max(0.0, at_s - end_s) for at_s, end_s in zip(hypothesis.published_s, ends, strict=True)]


def _audio_by_language(segments: Sequence[TranscribedSegment]) -> dict[str, float]:
    seconds: Counter[str] = Counter()
    for segment in segments:
        if segment.hypothesis is not None:
            seconds[segment.hypothesis.language or "none"] += segment.duration  # type: ignore[assignment]
    return dict(seconds)
