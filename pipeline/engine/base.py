"""The boundary between a job and whatever turns audio into text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from pipeline.schema import Hypothesis, Segment


class EngineError(RuntimeError):
    """The engine cannot go on: it is closed, or its device or its own code failed. No segment is to blame."""


@dataclass(frozen=True, slots=True)
class EngineFailure:
    """A segment that the engine could not transcribe, while others of its batch went well.

    Codes: `unsupported_language` (of the model, or of its causal tower), `bad_context`, `segment_too_long`,
    `out_of_memory` (even alone in its batch), `not_finite` (NaN logits, as float16 overflow makes them),
    `engine_error` (the exception is in `detail`), `crashed_process` (its process died over it every time).
    """

    segment_id: str
    code: str
    detail: str

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


Result = Hypothesis | EngineFailure


@dataclass(frozen=True, slots=True)
class Heard:
    """Samples `[start, end)` of a recording that an engine has cut by itself, and what it made of them."""

    start: int
    end: int
    result: Result


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Which weights ran, and how; every output object records it."""

    engine: str
    model_id: str
    model_revision: str
    quantization: str
    dtype: str
    device: str
    attention: str
    num_parameters: int
    aligner: str = ""  # of word times: model id@revision


@dataclass(frozen=True, slots=True)
class Batch:
    """What an engine tells of a batch that it has run: seconds of audio, without and with the padding to the longest
    segment; the wall time it took; how many segments wait now for a later batch."""

    audio_s: float
    padded_s: float
    busy_s: float
    num_waiting: int


Observer = Callable[[Batch], None]
"""Called after every batch, before its results are given out, from the engine's own thread. It must be quick and must
not raise."""


class AsrEngine(Protocol):
    @property
    def info(self) -> EngineInfo: ...

    def submit(self, segments: Sequence[Segment]) -> Future[list[Result]]:
        """One result per segment, in order. Returns at once, from any thread; segments of all pending submissions share
        batches. Cancelling the future gives up what of it has not begun, or more. It raises EngineError when the engine
        breaks. Submitting to a closed or broken engine raises EngineError."""
        ...

    def close(self) -> None:
        """Finish what was submitted, then release the engine. May be called twice."""
        ...


class StreamEngine(AsrEngine, Protocol):
    def stream(self, recordings: Sequence[Segment]) -> Future[list[list[Heard]]]:
        """As `submit`, of recordings of any length: each one's segments, in order, which tile it."""
        ...
