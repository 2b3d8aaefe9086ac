"""Where a stream's segments end: at a sentence once one is long enough, else before it would grow too long.

Encoder and decoder begin anew with every segment, so that compute and memory do not grow with a stream's age. The
figures are qwen3_asr_causal's (asr.py, streamer.py: `SegmentedCachedFullHypothesisStreamer`).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.engine.causal.tower import STEP_S
from pipeline.text import sentence_ends


@dataclass(frozen=True, slots=True)
class RollPolicy:
    """A segment ends where its hypothesis ends a sentence, after `min_s`; and before a block that would make it longer
    than `max_s`, which the end of the stream may. Without `at_sentences` only the latter."""

    min_s: float = 12.0
    max_s: float = 16.0
    at_sentences: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.min_s <= self.max_s:
            raise ValueError(f"min_s ({self.min_s}) must be above 0 and at most max_s ({self.max_s})")

    @property
    def max_steps(self) -> int:
        return round(self.max_s / STEP_S)

    def ends_before(self, num_steps: int, block_steps: int) -> bool:
        """Whether a segment of so many steps has no room for another block."""
        return num_steps > 0 and num_steps + block_steps > self.max_steps

    def ends_after(self, num_steps: int, text: str, language: str | None) -> bool:
        """Whether a segment ends with the hypothesis `text` after so many steps."""
        if not self.at_sentences or num_steps < round(self.min_s / STEP_S):
            return False
        text = text.rstrip()
        return bool(text) and len(text) in sentence_ends(text, language)
