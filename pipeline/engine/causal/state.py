"""What one stream is between two turns: audio that is still needed, the open segment, and what it has said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pipeline.engine.base import EngineFailure
from pipeline.engine.causal.commit import CommitPolicy, Committer, between
from pipeline.engine.causal.convolutions import FRAMES_PER_STEP
from pipeline.engine.causal.stream_mel import StreamAudio, first_sample_of
from pipeline.engine.mel import HOP
from pipeline.schema import SAMPLE_RATE_HZ

_FRAMES_PER_S = SAMPLE_RATE_HZ // HOP


class StreamError(ValueError):
    """What a stream cannot take. Codes: `bad_audio` (no int16 [n]), `wrong_rate`, `overrun` (more audio waits than a
    stream may have), `ended`, `too_many_streams`, and EngineFailure's for prompts."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code, self.detail = code, detail


@dataclass(frozen=True, slots=True)
class ClosedSegment:
    """A segment that has ended, `why`: at a "sentence" or "clause", by the "cap" (it would have grown too long) or at
    the "end" of the stream.

    Seconds are from the stream's start. `text` is what was published of it, `published_s` for each of its text.units
    how much had been heard by then; tokens, with log-probabilities, and
    `text_raw` are of its last hypothesis, which may have changed its mind about words that were out.
    """

    index: int
    offset_s: float
    duration_s: float
    text: str
    text_raw: str
    language: str
    token_ids: list[int]
    token_logprobs: list[float]
    finish_reason: str
    why: str
    published_s: list[float]


@dataclass(frozen=True, slots=True)
class Update:
    """What a stream says after another block. The `text` of all its updates, one behind the other, is its transcript;
    `hypothesis` is the whole of its open segment (or of the one that has ended here), `tail` what of it may follow and
    may change; `heard_s` how far it has been heard, `resume` where another stream can go on. After an `error` it says
    nothing more, nor after `is_last`."""

    stream_id: str
    text: str
    tail: str
    hypothesis: str
    heard_s: float
    segment: ClosedSegment | None = None
    is_last: bool = False
    error: EngineFailure | None = None
    resume: Resume | None = None


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a stream can go on after an interruption: its audio is needed from `first_sample` on, and `published`, the
    words of the open segment that are out (`published_s` as in ClosedSegment), are not said again."""

    first_frame: int = 0
    peak: float = -math.inf
    num_segments: int = 0
    published: Sequence[str] = ()
    published_s: Sequence[float] = ()
    last_char: str = ""

    @property
    def first_sample(self) -> int:
        return first_sample_of(self.first_frame)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids before and behind the audio, and the language that they force."""

    head: Sequence[int]
    tail: Sequence[int]
    language: str | None


@dataclass(slots=True)
class OpenSegment:
    """`first_frame` of the stream; of its frames `num_frames` are encoded in a slot, and `num_heard` have a hypothesis:
    more than are encoded where the slot was lost, and those are encoded again without decoding. The hypothesis before
    that one had heard `num_before`.

    The loudest log-mel power is `peak` before it, `loudest` up to `num_frames`, `heard_peak` up to `num_heard`.
    `embeddings` the decoder has not been given yet, of `num_cached` positions it holds keys and values.
    """

    first_frame: int
    peak: float
    committer: Committer
    published_s: list[float] = field(default_factory=list)
    num_frames: int = 0
    num_heard: int = 0
    num_before: int = 0
    loudest: float = -math.inf
    heard_peak: float = -math.inf
    embeddings: list[Tensor] = field(default_factory=list)
    num_cached: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    text: str = ""
    text_raw: str = ""
    language: str = ""
    finish_reason: str = ""

    def __post_init__(self) -> None:
        self.loudest = self.heard_peak = self.peak

    @property
    def num_steps(self) -> int:
        """In a slot."""
        return self.num_frames // FRAMES_PER_STEP

    def start_over(self) -> None:
        """Nothing of it is in a slot any more."""
        self.num_frames, self.loudest, self.num_cached = 0, self.peak, 0
        self.embeddings = []


@dataclass(slots=True, eq=False)
class Stream:
    """One stream; `idle_since` when it last had something to do, `alone` when something failed with it among others.
    Frames up to `furthest` have been in some hypothesis."""

    stream_id: str
    prompt: Prompt
    audio: StreamAudio
    segment: OpenSegment
    num_segments: int = 0
    last_char: str = ""
    furthest: int = 0
    slot: int | None = None
    is_waiting: bool = False
    is_decoding: bool = False
    is_done: bool = False
    alone: bool = False
    idle_since: float = 0.0

    @property
    def next_frame(self) -> int:
        """To encode."""
        return self.segment.first_frame + self.segment.num_frames

    @property
    def num_heard(self) -> int:
        """Frames of the stream that have a hypothesis."""
        return self.segment.first_frame + self.segment.num_heard

    @property
    def num_heard_steps(self) -> int:
        """Of the open segment."""
        return self.segment.num_heard // FRAMES_PER_STEP

    @property
    def heard_s(self) -> float:
        return self.furthest / _FRAMES_PER_S

    @property
    def num_heard_samples(self) -> int:
        return self.furthest * HOP

    @property
    def waiting_samples(self) -> int:
        """That were not heard yet."""
        return self.audio.num_samples - self.num_heard_samples

    def frames_to_hear(self, block_frames: int) -> int:
        """A block that was not heard yet, or at the end whole steps that are left; 0 when there is nothing."""
        left = self.audio.num_frames - self.num_heard
        if left >= block_frames:
            return block_frames
        return left // FRAMES_PER_STEP * FRAMES_PER_STEP if self.audio.is_ended else 0

    def has_work(self, block_frames: int) -> bool:
        return not self.is_done and (self.audio.is_ended or self.frames_to_hear(block_frames) > 0)

    def publish(self, units: Sequence[str]) -> str:
        """The text of `units`, which follow what is out, as it follows it."""
        text = "".join(units)
        text = between(self.last_char, text) + text
        if not self.last_char:
            text = text.lstrip()
        self.last_char = text[-1:] or self.last_char
        self.segment.published_s += [self.heard_s] * len(units)
        return text

    def close(self, policy: CommitPolicy, why: str) -> tuple[str, ClosedSegment]:
        """Ends the open segment and begins the next: the text that is still to publish, and the segment."""
        ended = self.segment
        text = self.publish(ended.committer.finish(ended.text))
        closed = ClosedSegment(
            index=self.num_segments,
            offset_s=ended.first_frame / _FRAMES_PER_S,
            duration_s=ended.num_heard / _FRAMES_PER_S,
            text="".join(ended.committer.published).strip(),
            text_raw=ended.text_raw,
            language=self.prompt.language or ended.language,
            token_ids=ended.token_ids,
            token_logprobs=ended.logprobs,
            finish_reason=ended.finish_reason,
            why=why,
            published_s=ended.published_s,
        )
        self.num_segments += 1
        self.segment = OpenSegment(self.num_heard, ended.heard_peak, Committer(policy))
        self.audio.forget(self.segment.first_frame)
        return text, closed

    @property
    def resume(self) -> Resume:
        segment = self.segment
        return Resume(
            segment.first_frame,
            segment.peak,
            self.num_segments,
            segment.committer.published,
            list(segment.published_s),
            self.last_char,
        )


def new_stream(stream_id: str, prompt: Prompt, policy: CommitPolicy, resume: Resume) -> Stream:
    committer = Committer(policy, resume.published)
    segment = OpenSegment(resume.first_frame, resume.peak, committer, list(resume.published_s))
    audio = StreamAudio(resume.first_sample)
    return Stream(stream_id, prompt, audio, segment, resume.num_segments, resume.last_char, resume.first_frame)


def check_audio(pcm: np.ndarray, sample_rate_hz: int) -> None:
    """Raises StreamError for a chunk that is no 16 kHz int16 mono."""
    if sample_rate_hz != SAMPLE_RATE_HZ:
        raise StreamError("wrong_rate", f"a chunk at {sample_rate_hz} Hz; streams are {SAMPLE_RATE_HZ} Hz: resample it")
    if not isinstance(pcm, np.ndarray) or pcm.dtype != np.int16 or pcm.ndim != 1:
        kind = f"{pcm.dtype} {list(pcm.shape)}" if isinstance(pcm, np.ndarray) else type(pcm).__name__
        raise StreamError("bad_audio", f"a chunk of {kind}; streams are mono int16 [num_samples]")
