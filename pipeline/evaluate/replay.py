"""A recording as a system hears it live, and what the public sees of it under the streaming contract.

The clock is the stream's own: audio arrives in real time, work on a chunk begins when it is there and what came before
is done, and takes the time that it takes here. So an hour is replayed in as long as its work takes, with the latencies
that it would have had. Operations are counted in a second pass, which is not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import psutil
from torch import nn

from pipeline.engine.flops import FlopMeter
from pipeline.evaluate.contract import Contract, Published, Update, latencies, spoken_words
from pipeline.metrics import ErrorCounts, error_counts
from pipeline.schema import SAMPLE_RATE_HZ

CHUNK_S = 0.1  # as a microphone gives audio; every block waits for the end of a chunk
_MINUTE = 60 * SAMPLE_RATE_HZ
_WARM_UP_S = 20.0  # at which kernels are compiled and buffers made


@dataclass(frozen=True, slots=True)
class Talk:
    """A recording, int16 [n] at 16 kHz, in a language as Qwen3-ASR writes it, with its reference. `sentences` have
    `text`, `offset` and `duration` in seconds; latency is measured where there are any."""

    name: str
    language: str
    text: str
    pcm: np.ndarray
    sentences: Sequence[dict[str, object]] = ()

    @property
    def duration_s(self) -> float:
        return len(self.pcm) / SAMPLE_RATE_HZ


class StreamingSystem(Protocol):
    """What is replayed to. `about` says what it is, as JSON; `lm_head` is counted apart."""

    name: str
    about: dict[str, Any]
    lm_head: nn.Module

    def begin(self, language: str) -> None:
        """A new stream; the one before is forgotten."""
        ...

    def hear(self, pcm: np.ndarray) -> list[Update]:
        """What it says after more audio, int16 [n]; `at_s` is not its business."""
        ...

    def end(self) -> list[Update]:
        """What it says when no more comes: the last update is final."""
        ...


@dataclass(slots=True)
class Minute:
    """Of a stream, by the audio that came in it: seconds of work, memory at its end, and operations where counted (with
    those of the output layer, and those alone)."""

    audio_s: float = 0.0
    compute_s: float = 0.0
    rss_bytes: int = 0
    flops: int | None = None
    lm_head_flops: int | None = None


@dataclass(slots=True)
class Replay:
    """What came of a talk. `num_retractions` counts updates, the last one included, in which the system took back words
    that were out, `num_refused` those of which nothing was published as it did not go on from what was out. `end_s` is
    the work after the end. Offline systems have no latencies."""

    system: str
    talk: str
    language: str
    audio_s: float
    text: str
    errors: ErrorCounts
    latencies_s: list[float] | None
    num_updates: int = 0
    num_refused: int = 0
    num_retractions: int = 0
    minutes: list[Minute] = field(default_factory=list)
    end_s: float = 0.0
    peak_rss_bytes: int = 0

    @property
    def rtf(self) -> float:
        return (sum(minute.compute_s for minute in self.minutes) + self.end_s) / self.audio_s


@dataclass(slots=True)
class Screen:
    """What the public sees."""

    contract: Contract = field(default_factory=Contract)
    num_updates: int = 0
    num_retractions: int = 0

    def show(self, update: Update) -> None:
        out, offered = self.contract.text, update.offered
        self.num_updates += 1
        is_shorter = out.startswith(offered) and not update.is_final
        self.num_retractions += not (offered.startswith(out) or is_shorter)
        self.contract.take(update)
        assert self.contract.text.startswith(out), "what is out is never rewritten"


def measure(system: StreamingSystem, talk: Talk, count_every: int | None = 10) -> Replay:
    """Replays a talk, and again for the operations of the first minute, every so many-th and the last (None: never)."""
    replay(system, replace(talk, pcm=talk.pcm[: int(_WARM_UP_S * SAMPLE_RATE_HZ)], text="", sentences=()))
    found = replay(system, talk)
    if count_every is not None:
        minutes = counted_minutes(len(found.minutes), len(talk.pcm) // _MINUTE, count_every)
        for number, meter in count(system, talk, minutes).items():
            found.minutes[number].flops, found.minutes[number].lm_head_flops = meter.total, meter.lm_head
    return found


def replay(
    system: StreamingSystem, talk: Talk, chunk_s: float = CHUNK_S, clock: Callable[[], float] = time.perf_counter
) -> Replay:
    """`clock` gives seconds of work."""
    process, screen = psutil.Process(), Screen()
    minutes = [Minute() for _ in range(num_minutes(talk))]
    done_s, end_s, peak = 0.0, 0.0, 0
    system.begin(talk.language)
    for number, num_samples, arrives_s, work in _calls(system, talk, chunk_s):
        began = clock()
        updates = work()
        took = clock() - began
        done_s = max(arrives_s, done_s) + took
        for update in updates:
            screen.show(replace(update, at_s=done_s))
        rss = process.memory_info().rss
        peak = max(peak, rss)
        if number is None:
            end_s = took
        else:
            minute = minutes[number]
            minute.audio_s += num_samples / SAMPLE_RATE_HZ
            minute.compute_s += took
            minute.rss_bytes = rss
    return Replay(
        system=system.name,
        talk=talk.name,
        language=talk.language,
        audio_s=talk.duration_s,
        text=screen.contract.text,
        errors=error_counts(talk.text, screen.contract.text, talk.language),
        latencies_s=latencies_of(screen.contract.published, talk),
        num_updates=screen.num_updates,
        num_refused=screen.contract.num_refused,
        num_retractions=screen.num_retractions,
        minutes=minutes,
        end_s=end_s,
        peak_rss_bytes=peak,
    )


def count(
    system: StreamingSystem, talk: Talk, minutes: Sequence[int], chunk_s: float = CHUNK_S
) -> dict[int, FlopMeter]:
    """The operations of some minutes of a talk, each with what is said in it."""
    found = {number: FlopMeter(system.lm_head) for number in minutes}
    system.begin(talk.language)
    for number, _, _, work in _calls(system, talk, chunk_s):
        if number in found:
            with found[number]:
                work()
        elif number is not None and number > max(minutes):
            break
        else:
            work()
    return found


def latencies_of(published: Sequence[Published], talk: Talk) -> list[float] | None:
    return latencies(published, spoken_words(talk.sentences)) if talk.sentences else None


def num_minutes(talk: Talk) -> int:
    return max(1, -(-len(talk.pcm) // _MINUTE))


def counted_minutes(num: int, num_full: int, every: int) -> list[int]:
    """From 0: the first, every so many-th, and the last one that is full (of a short talk the only one)."""
    last = max(num_full - 1, 0) if num_full else num - 1
    return sorted({0, *range(every - 1, last + 1, every), last})


def _calls(
    system: StreamingSystem, talk: Talk, chunk_s: float
) -> Iterator[tuple[int | None, int, float, Callable[[], list[Update]]]]:
    """The minute (None: after the end), how many samples are new, when they are all there, and what is to be done."""
    size = round(chunk_s * SAMPLE_RATE_HZ)
    for start in range(0, len(talk.pcm), size):
        chunk = talk.pcm[start : start + size]
        end = start + len(chunk)
        yield (end - 1) // _MINUTE, len(chunk), end / SAMPLE_RATE_HZ, partial(system.hear, chunk)
    yield None, 0, talk.duration_s, system.end
