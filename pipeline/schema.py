"""The contracts that flow between steps: engine input and output, and the Arrow schema of a transcript.

`TRANSCRIPTS` is declared once, here, and is what readers of the output may rely on. Names follow the NeMo
manifest where it has one (`audio_filepath`, `offset`, `duration`, `text`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa

SAMPLE_RATE_HZ = 16_000
"""Every engine of the Qwen3-ASR family takes 16 kHz mono; audio is int16 PCM from decode to the actor."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One stretch of audio as an engine takes it.

    `pcm` is int16 `[num_samples]` at 16 kHz mono (a view, never copied). `language` forces the language (a name as
    Qwen3-ASR writes it, "English"); None lets the model detect it. `context` is the hotword prompt.
    """

    segment_id: str
    pcm: np.ndarray
    language: str | None = None
    context: str = ""

    @property
    def duration_s(self) -> float:
        return len(self.pcm) / SAMPLE_RATE_HZ


@dataclass(frozen=True, slots=True)
class Word:
    word: str
    start_s: float
    end_s: float
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What an engine says about one segment.

    `token_ids` and `token_logprobs` are parallel and include the end token when there is one; log-probabilities are
    natural, of the chosen token under the unmodified distribution. `text_raw` is the decoded text before any
    clean-up. `finish_reason` is "stop" (end token) or "length" (token limit).
    """

    text: str
    text_raw: str
    language: str
    token_ids: list[int]
    token_logprobs: list[float]
    finish_reason: str
    words: list[Word] = field(default_factory=list)


Status = Literal["ok", "empty", "failed"]
Reason = Literal["failed", "empty", "truncated", "no_speech", "low_logprob", "repetitive", "char_rate"]


@dataclass(frozen=True, slots=True)
class Labels:
    """What the label step adds to a row; None where there is nothing to compute from."""

    status: Status
    avg_logprob: float | None
    compression_ratio: float | None
    char_rate: float | None
    filter_reasons: list[Reason]

    @property
    def keep(self) -> bool:
        return not self.filter_reasons


_dictionary = pa.dictionary(pa.int32(), pa.string())

TRANSCRIPTS = pa.schema(
    [
        pa.field("segment_id", pa.string(), nullable=False),
        pa.field("recording_id", pa.string(), nullable=False),
        pa.field("audio_filepath", pa.string(), nullable=False),
        pa.field("channel", pa.int16()),  # null: all channels mixed down
        pa.field("offset", pa.float64(), nullable=False),  # seconds from the start of the audio file
        pa.field("duration", pa.float64(), nullable=False),  # seconds
        pa.field("text", pa.string(), nullable=False),
        pa.field("text_raw", pa.string(), nullable=False),
        pa.field("text_ref", pa.string()),  # the reference of the whole recording, where the input has one
        pa.field("language", pa.string()),
        pa.field(
            "words",
            pa.list_(
                pa.struct(
                    [("word", pa.string()), ("start", pa.float64()), ("end", pa.float64()), ("score", pa.float32())]
                )
            ),
        ),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("token_logprobs", pa.list_(pa.float32())),
        pa.field("avg_logprob", pa.float32()),
        pa.field("compression_ratio", pa.float32()),
        pa.field("speech_ratio", pa.float32()),
        pa.field("char_rate", pa.float32()),
        pa.field("finish_reason", pa.string()),
        pa.field("status", pa.string(), nullable=False),  # ok | empty | failed
        pa.field("error", pa.string()),  # "<reason code>: <detail>" of a failed row
        pa.field("keep", pa.bool_(), nullable=False),
        pa.field("filter_reasons", pa.list_(pa.string()), nullable=False),
        pa.field("unit_id", pa.string(), nullable=False),
        # constant in a file:
        pa.field("engine", _dictionary, nullable=False),
        pa.field("model_id", _dictionary, nullable=False),
        pa.field("model_revision", _dictionary),
        pa.field("quantization", _dictionary),
        pa.field("config_hash", _dictionary, nullable=False),
        pa.field("run_id", _dictionary, nullable=False),
    ]
)
