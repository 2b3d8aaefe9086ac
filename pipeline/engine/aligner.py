"""Word times by Qwen3-ForcedAligner, around any engine: the text that the engine gives is aligned with its audio."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from qwen_asr import Qwen3ForcedAligner
from qwen_asr.inference.utils import MAX_FORCE_ALIGN_INPUT_SECONDS

from pipeline.config import EngineConfig
from pipeline.engine.base import AsrEngine, Result
from pipeline.engine.checkpoint import resolve
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis, Segment, Word

LANGUAGES = frozenset(
    {"Chinese", "English", "Cantonese", "French", "German", "Italian", "Japanese", "Korean", "Portuguese", "Russian",
     "Spanish"}
)  # fmt: skip
"""What Qwen3-ForcedAligner-0.6B aligns, by its model card; a text in another language gets no word times."""

_log = logging.getLogger(__name__)


class AlignedEngine:
    """`engine`, with `words` in its hypotheses. Raises CheckpointError when `config.aligner` is none to run.

    Words are as the aligner splits them, without punctuation; times come in steps of the aligner's (80 ms in the
    published one). A text that it cannot align keeps its empty `words`.
    """

    def __init__(self, engine: AsrEngine, config: EngineConfig) -> None:
        assert config.aligner is not None
        checkpoint = resolve(config.aligner, config.aligner_revision, key="engine.aligner")
        self._engine, self._config = engine, config
        dtype = getattr(torch, engine.info.dtype)
        self._aligner = Qwen3ForcedAligner.from_pretrained(
            str(checkpoint.path), dtype=dtype, device_map=engine.info.device, use_safetensors=True
        )
        self._aligner.model.eval()
        self._worker = ThreadPoolExecutor(1, "aligner")
        self.info = replace(engine.info, aligner=f"{checkpoint.model_id}@{checkpoint.revision}")

    def submit(self, segments: Sequence[Segment]) -> Future[list[Result]]:
        """See AsrEngine."""
        aligned: Future[list[Result]] = Future()
        aligned.set_running_or_notify_cancel()
        transcribed = self._engine.submit(segments)
        transcribed.add_done_callback(lambda done: self._worker.submit(self._finish, done, segments, aligned))
        return aligned

    def close(self) -> None:
        self._engine.close()
        self._worker.shutdown()

    def _finish(self, done: Future[list[Result]], segments: Sequence[Segment], aligned: Future[list[Result]]) -> None:
        try:
            results = done.result()
            for batch in self._batches(segments, results):
                for index, words in zip(batch, self._align(batch, segments, results), strict=True):
                    results[index] = replace(results[index], words=words)  # type: ignore[arg-type]
            aligned.set_result(results)
        except BaseException as error:  # the end of the thread: who waits must hear of it
            aligned.set_exception(error)

    def _batches(self, segments: Sequence[Segment], results: Sequence[Result]) -> Iterator[list[int]]:
        """Indices of what can be aligned, of like lengths together, within the engine's batch limits."""
        indices = [
            index
            for index, (segment, result) in enumerate(zip(segments, results, strict=True))
            if isinstance(result, Hypothesis)
            and result.text.strip()
            and result.language in LANGUAGES
            and segment.duration_s <= MAX_FORCE_ALIGN_INPUT_SECONDS
        ]
        indices.sort(key=lambda index: -len(segments[index].pcm))
        while indices:
            longest_s = max(segments[indices[0]].duration_s, 1e-3)
            size = max(1, min(self._config.batch_size, int(self._config.batch_audio_s / longest_s)))
            yield indices[:size]
            indices = indices[size:]

    def _align(self, batch: list[int], segments: Sequence[Segment], results: Sequence[Result]) -> list[list[Word]]:
        hypotheses = [result for index in batch if isinstance(result := results[index], Hypothesis)]
        try:
            found = self._aligner.align(
                [(segments[index].pcm.astype(np.float32) / 32768, SAMPLE_RATE_HZ) for index in batch],
                [hypothesis.text for hypothesis in hypotheses],
                [hypothesis.language for hypothesis in hypotheses],
            )
        except (RuntimeError, ValueError, IndexError) as error:
            if len(batch) > 1:
                return [words for index in batch for words in self._align([index], segments, results)]
            _log.warning("no word times for %s: %s: %s", segments[batch[0]].segment_id, type(error).__name__, error)
            return [[]]
        return [
            [
                Word(item.text, *(min(t, segments[index].duration_s) for t in (item.start_time, item.end_time)))
                for item in one
            ]
            for index, one in zip(batch, found, strict=True)
        ]
