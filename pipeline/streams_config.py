"""How `engine.name: causal` hears and writes. The defaults are those of the published tower and its runtime."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from pipeline.section import Section

_SHORTEST_S = {"sentence": 7.0, "mark": 12.0, "fixed": 7.0}


class StreamsConfig(Section):
    block_frames: int = Field(192, ge=8, multiple_of=8)  # of 10 ms, heard at once; the towers know 96, too
    left_steps: PositiveInt = 195  # of 80 ms, that a block sees before itself
    # a word is published once it stood in `stable_iterations` hypotheses more, `hold_back` words before their end
    hold_back: int = Field(6, ge=0)
    stable_iterations: PositiveInt = 1
    # a segment ends between min_s and max_s: at the pause behind a sentence; mark: where its hypothesis ends with a
    # sentence's mark, as the published runtime has it; fixed: at max_s
    roll: Literal["sentence", "mark", "fixed"] = "sentence"
    min_s: float | None = Field(None, gt=0)  # null: 7, under mark 12, as the published runtime has it
    max_s: float = Field(16.0, gt=0, le=120)
    repetition_penalty: float = Field(1.15, ge=1)
    no_repeat_ngram: int = Field(3, ge=0)  # 0: any may come again
    max_new_tokens: PositiveInt = 256  # of a segment's hypothesis
    # what follows changes when a text comes, not the text
    max_streams: PositiveInt = 10_000  # open at once, of which engine.slots have their state in memory
    max_waiting_s: float = Field(60.0, gt=0)  # audio of a stream that was not heard yet
    park_after_s: float = Field(6.0, ge=0)  # a stream without audio for so long gives its slot to one that waits

    @property
    def shortest_s(self) -> float:
        """Of a segment."""
        return self.min_s if self.min_s is not None else _SHORTEST_S[self.roll]

    @model_validator(mode="after")
    def _fits(self) -> StreamsConfig:
        if self.shortest_s > self.max_s:
            raise ValueError(f"min_s ({self.shortest_s}) must be at most max_s ({self.max_s})")
        if self.max_s < self.block_frames / 100:
            raise ValueError(f"max_s ({self.max_s}) must hold a block, which is {self.block_frames / 100} s")
        if self.left_steps < self.block_frames // 8:
            raise ValueError(f"left_steps ({self.left_steps}) must hold a block, which is {self.block_frames // 8}")
        if self.max_waiting_s < 2 * self.block_frames / 100:
            raise ValueError(
                f"max_waiting_s ({self.max_waiting_s}) must hold two blocks of {self.block_frames / 100} s"
            )
        return self


SPEED_KEYS = frozenset({"max_streams", "max_waiting_s", "park_after_s"})
"""Keys that change no row."""
