"""What decides how a causal engine hears and writes; the defaults are qwen3_asr_causal's for its published tower."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config import EngineConfig
from pipeline.engine.causal.commit import CommitPolicy
from pipeline.engine.causal.roll import RollPolicy
from pipeline.engine.causal.tower import Geometry


@dataclass(frozen=True, slots=True)
class Settings:
    """The last five change no text, only when it comes.

    `slots` streams have their state in memory at once (others wait for one), `max_streams` may be open. A stream may be
    `max_waiting_s` of audio ahead of what was heard of it. One that gives no audio for `park_after_s` leaves its slot
    when others wait, and what was heard of its segment is heard again. `batch` streams are heard at once.
    """

    geometry: Geometry = field(default_factory=Geometry)
    commit: CommitPolicy = field(default_factory=CommitPolicy)
    roll: RollPolicy = field(default_factory=RollPolicy)
    repetition_penalty: float = 1.15
    no_repeat_ngram: int = 3
    max_new_tokens: int = 256
    slots: int = 64
    max_streams: int = 10_000
    max_waiting_s: float = 60.0
    park_after_s: float = 6.0
    batch: int = 32

    def __post_init__(self) -> None:
        if self.roll.max_steps < self.geometry.block_steps:
            raise ValueError(
                f"roll.max_s ({self.roll.max_s}) must hold a block, which is {self.geometry.block_frames / 100} s"
            )
        for name in ("max_new_tokens", "slots", "max_streams", "max_waiting_s", "batch"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")


def settings_of(config: EngineConfig) -> Settings:
    streams = config.streams
    return Settings(
        geometry=Geometry(streams.block_frames, streams.left_steps),
        commit=CommitPolicy(streams.hold_back, streams.stable_iterations),
        roll=RollPolicy(streams.shortest_s, streams.max_s, streams.roll),
        repetition_penalty=streams.repetition_penalty,
        no_repeat_ngram=streams.no_repeat_ngram,
        max_new_tokens=streams.max_new_tokens,
        slots=config.slots,
        max_streams=streams.max_streams,
        max_waiting_s=streams.max_waiting_s,
        park_after_s=streams.park_after_s,
        batch=config.batch_size,
    )
