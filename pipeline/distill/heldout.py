"""What a step is judged by: held-out speech, teacher-forced and decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import EngineConfig
from pipeline.distill.audio import Loader
from pipeline.distill.collate import NO_LOSS, collate
from pipeline.distill.examples import ExampleRef
from pipeline.distill.loss import distillation_loss
from pipeline.engine.create import create_engine
from pipeline.metrics import ErrorCounts, error_counts
from pipeline.schema import Hypothesis, Segment
from pipeline.storage import Options

Logits = Callable[[Mapping[str, Tensor]], Tensor]


class Heldout:
    def __init__(
        self, refs: Sequence[ExampleRef], processor: Any, dtype: torch.dtype, batch_audio_s: float, options: Options
    ) -> None:
        loader = Loader(options)
        self._examples = sorted((loader.load(ref) for ref in refs), key=lambda example: example.ref.duration_s)
        self._batches, start = [], 0
        for end in range(1, len(self._examples) + 1):
            is_last = end == len(self._examples)
            if is_last or (end - start + 1) * self._examples[end].ref.duration_s > batch_audio_s:
                self._batches.append(collate(self._examples[start:end], processor, dtype))
                start = end

    def losses(self, student: Logits, teacher: Logits | None, device: torch.device) -> dict[str, float]:
        """`ce` of the texts and, where there is a teacher, `kl` from it; means over tokens, in nats."""
        ce = kl = num_tokens = 0.0
        with torch.no_grad():
            for batch in self._batches:
                tensors = {name: tensor.to(device) for name, tensor in batch.items()}
                targets = tensors["labels"][:, 1:]
                targets = targets[targets != NO_LOSS]
                logits = student(tensors)
                loss = distillation_loss(logits, targets, logits if teacher is None else teacher(tensors))
                ce += float(loss.ce) * len(targets)
                kl += float(loss.kl) * len(targets)
                num_tokens += len(targets)
        found = {"ce": ce / num_tokens}
        return found if teacher is None else found | {"kl": kl / num_tokens}

    def error_rates(self, folder: Path, device: torch.device) -> dict[str, float]:
        """WER (CER where metrics.unit_name says so) by language of the checkpoint in `folder`, as engines run it."""
        threads = torch.get_num_threads()
        engine = create_engine(EngineConfig(model=str(folder), quantization="fake_quant", device=str(device)))
        try:
            segments = [Segment(example.ref.example_id, example.pcm) for example in self._examples]
            results = engine.submit(segments).result()
        finally:
            engine.close()
            torch.set_num_threads(threads)
        counts: dict[str, ErrorCounts] = {}
        for example, result in zip(self._examples, results, strict=True):
            text = result.text if isinstance(result, Hypothesis) else ""
            language = example.ref.language
            counts[language] = counts.get(language, ErrorCounts()) + error_counts(example.ref.text, text, language)
        return {language: its.rate for language, its in sorted(counts.items())}
