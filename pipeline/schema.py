"""The contracts that flow between steps: engine input and output, and the Arrow schema of a transcript.

`TRANSCRIPTS` is declared once, here, and is what readers of the output may rely on. Names follow the NeMo
manifest where it has one (`audio_filepath`, `offset`, `duration`, `text`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

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
    clean-up, `token_ends` how many of its characters stand after each token (empty where the engine does not say).
    `finish_reason` is "stop" (end token), "length" (token limit), "repetition" (it began to loop and was ended) or
    "sentence" (the window was ended at a sentence, what follows is the next one's). `published_s`, of an engine of
    streams, says for each of `text.units(text)` how many seconds of the segment had been heard when it was published.
    `top_ids` int32 and `top_logprobs` float32, `[num_tokens, k]`, are each token's likeliest alternatives, best first,
    where `engine.top_logprobs` asks.
    """

    text: str
    text_raw: str
    language: str
    token_ids: list[int]
    token_logprobs: list[float]
    finish_reason: str
    words: list[Word] = field(default_factory=list)
    token_ends: list[int] = field(default_factory=list)
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    published_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of a segment; times in seconds from the segment's start."""

    text: str
    start_s: float
    end_s: float


Status = Literal["ok", "empty", "failed"]
Reason = Literal[
    "failed", "empty", "truncated", "causal", "duration", "no_speech", "low_logprob", "repetitive", "few_unique_words",
    "long_word", "char_rate", "known_phrase", "context_leak", "wrong_script", "disagreement", "reference_mismatch",
]  # fmt: skip
REASONS: tuple[Reason, ...] = get_args(Reason)
"""Why a filter catches a row, the weightiest first; a funnel asks in this order."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What the label step adds to a row; None where there is nothing to compute from. The figures are columns."""

    status: Status
    avg_logprob: float | None = None
    compression_ratio: float | None = None
    char_rate: float | None = None
    unique_word_share: float | None = None
    max_word_chars: int | None = None
    known_phrase: str | None = None
    context_run: float | None = None
    context_share: float | None = None
    script_share: float | None = None
    agreement_text: str | None = None
    agreement_wer: float | None = None
    reference_wer: float | None = None
    filter_reasons: list[Reason] = field(default_factory=list)

    @property
    def keep(self) -> bool:
        return not self.filter_reasons


ERROR_CODES = {
    # what is named cannot be had
    "missing_file": "no such file, or a folder",
    "permission_denied": "this user, or these credentials, may not read it",
    "unreachable": "its store answers for others and not for it, after every retry",
    "bad_manifest_line": "a manifest's line that names no recording",
    "no_audio": "a key, link or row without audio",
    "damaged_tar": "the tar breaks here, and what follows is lost",
    "damaged_parquet": "the rest of a row group that cannot be read",
    "too_large": "more than is unpacked of one recording",
    # its audio cannot be decoded, or not to its end: audio.AudioError
    "empty_file": "no bytes",
    "not_audio": "no audio in it",
    "no_samples": "no samples, or none in the stretch asked for",
    "truncated": "it breaks before it ends",
    "corrupt": "more than 1 % of its packets do not decode",
    "bad_format": "a sample rate or a change of channels that makes no sense",
    # its audio cannot be transcribed: engine.base.EngineFailure
    "unsupported_language": "none of the model's languages, or none that its causal tower was trained on",
    "bad_context": "hotwords that hold tokens of the prompt",
    "segment_too_long": "more audio than the model takes",
    "out_of_memory": "not even alone in its batch",
    "not_finite": "the model's logits are NaN",
    "engine_error": "what the engine raised over it",
    # either
    "crashed_process": "the process that works on it dies, every time",
}
"""The reason codes that begin the `error` of a failed row, up to the colon."""

LOGITS = pa.schema(
    [
        pa.field("segment_id", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),  # as in the transcript: what was written
        pa.field("num_top", pa.int32(), nullable=False),
        # num_top numbers a token, the likeliest first:
        pa.field("top_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("top_logprobs", pa.list_(pa.float16()), nullable=False),
    ]
)
"""A teacher's sparse distribution, a row a segment that has text, in `OUT/logits/<unit>.parquet`."""

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
        pa.field("language_ref", pa.string()),  # the language that the input names for it
        pa.field("language", pa.string()),
        pa.field(
            "words",
            pa.list_(
                pa.struct(
                    [("word", pa.string()), ("start", pa.float64()), ("end", pa.float64()), ("score", pa.float32())]
                )
            ),
        ),
        pa.field(
            "sentences",  # the text at its punctuation; seconds as in offset and duration
            pa.list_(pa.struct([("text", pa.string()), ("offset", pa.float64()), ("duration", pa.float64())])),
        ),
        # of streams, for every word (character where they are not spaced): seconds from its end, as its place in the
        # text tells it, to its publication; in a job those of audio, under `follow` those of the clock
        pa.field("commit_latencies", pa.list_(pa.float32())),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("token_logprobs", pa.list_(pa.float32())),
        pa.field("avg_logprob", pa.float32()),
        pa.field("compression_ratio", pa.float32()),
        pa.field("speech_ratio", pa.float32()),
        pa.field("char_rate", pa.float32()),  # characters a second
        pa.field("unique_word_share", pa.float32()),
        pa.field("max_word_chars", pa.int32()),
        pa.field("known_phrase", pa.string()),
        pa.field("context_run", pa.float32()),  # words in a row that are the hotword prompt's
        pa.field("context_share", pa.float32()),
        pa.field("script_share", pa.float32()),
        pa.field("agreement_text", pa.string()),  # what the second model wrote
        pa.field("agreement_wer", pa.float32()),  # 0.05 for 5 %; CER where metrics.unit_name says so
        pa.field("reference_wer", pa.float32()),
        pa.field("finish_reason", pa.string()),
        pa.field("status", pa.string(), nullable=False),  # ok | empty | failed
        pa.field("error", pa.string()),  # "<reason code>: <detail>" of a failed row: ERROR_CODES
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
