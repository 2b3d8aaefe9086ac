"""qwen3_asr_causal's runtime, as it is, under the streaming contract: the windowed re-compute that it calls its normal
streaming (the offline tower over 12 s before and 640 ms behind, anew at every update, and a whole hypothesis from
scratch), and its causal one."""

from __future__ import annotations

import importlib
import logging
from contextlib import suppress
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch

from pipeline.config import ConfigError, EngineConfig
from pipeline.engine.checkpoint import resolve
from pipeline.evaluate.contract import Update
from pipeline.languages import language_code
from pipeline.schema import SAMPLE_RATE_HZ

PACKAGE = "qwen3-asr-causal"
VERSION = "0.1.0"
Backend = Literal["windowed", "causal"]
_STEP_S, _BLOCK_S = 0.08, 1.92


class UpstreamSystem:
    """One session at a time, in batches of one, as it serves them. It publishes words and holds the newest back; the
    contract cuts the newest 250 ms of its whole hypothesis."""

    def __init__(self, name: str, config: EngineConfig, backend: Backend, tower: str = "") -> None:
        """`tower` is a file in its layout, for the causal backend. Raises ConfigError without the package."""
        self.name = name
        self._package = _package()
        checkpoint = resolve(config.model, config.revision)
        options: dict[str, Any] = {
            "lan": "en",  # `begin` has the last word
            "model_dir": str(checkpoint.path),
            "qwen3_streaming_audio_backend": backend,
            "qwen3_streaming_device": config.device,
            "qwen3_streaming_dtype": config.dtype,
        }
        if backend == "causal":
            options |= {"qwen3_streaming_tower_checkpoint": tower, "qwen3_streaming_chunk_sec": _BLOCK_S}
        self._asr = self._package.Qwen3StreamingASR(**options)
        self.lm_head = self._asr.model.lm_head
        self.about: dict[str, Any] = {
            "package": f"{PACKAGE}=={version(PACKAGE)}",
            "backend": backend,
            "model_id": checkpoint.model_id,
            "model_revision": checkpoint.revision,
            "tower": tower,
            "dtype": str(self._asr.dtype).removeprefix("torch."),
            "chunk_s": self._asr.chunk_sec,
            "hold_back": self._asr.hold_back_words,
            "stable_iterations": self._asr.stable_iterations,
        }

    def begin(self, language: str) -> None:
        self._asr.original_language = language_code(language)
        self._processor = self._package.Qwen3StreamingOnlineProcessor(self._asr)
        self._said = ""
        self._num_samples = 0

    def hear(self, pcm: np.ndarray) -> list[Update]:
        """As its `process_iter`, which would turn an error into a warning, but for its pacing by the wall clock."""
        processor = self._processor
        self._num_samples += len(pcm)
        processor.insert_audio_chunk(pcm.astype(np.float32) / 32768, self._num_samples / SAMPLE_RATE_HZ)
        if len(processor.audio_buffer) < self._asr.chunk_sec * SAMPLE_RATE_HZ:
            return []
        with torch.no_grad():
            event = processor._decode_pending()
        if event is None:
            return []
        self._take(processor._emit_committed(event["committed"], processor.end))
        # what it has said, and behind that its hypothesis from the word of the same number on: its own rule
        said, hypothesis, segment = self._said.split(), event["hypothesis"].split(), event["segment_hypothesis"].split()
        words = said + hypothesis[len(said) :]
        closed = " ".join(words[: len(hypothesis) - len(segment)])
        return [
            Update(
                at_s=0.0,
                heard_s=event["audio_sec"],
                text=" ".join(words),
                open_from=len(closed),
                open_s=min(event["cached_steps"] * _STEP_S, event["audio_sec"]),
                held_from=len(self._said),
            )
        ]

    def end(self) -> list[Update]:
        with torch.no_grad():
            words, _ = self._processor.finish()
        self._take(words)
        heard_s = self._num_samples / SAMPLE_RATE_HZ
        return [Update(0.0, heard_s, self._said, is_final=True)]

    def _take(self, words: list[Any]) -> None:
        self._said = " ".join([*self._said.split(), *(word.text.strip() for word in words)])


def _package() -> Any:
    with suppress(ModuleNotFoundError):
        package = importlib.import_module("qwen3_asr_causal")
        logging.getLogger("qwen3_asr_causal").setLevel(logging.ERROR)
        return package
    raise ConfigError(
        f"this system is {PACKAGE}'s, which is not installed here: pip install --no-deps {PACKAGE}=={VERSION}"
    )
