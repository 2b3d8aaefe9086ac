"""What a step of a causal tower is judged by: held-out speech, heard in one pass as a stream would hear it, and written
by the model's own decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import EngineConfig
from pipeline.distill.audio import Example
from pipeline.distill.config import TowerConfig
from pipeline.engine.causal.tower import Geometry, encode_whole
from pipeline.engine.causal.weights import load_tower
from pipeline.engine.decoder import SlotDecoder
from pipeline.engine.features import ClipMel
from pipeline.engine.model import LoadedModel, load_model, padded
from pipeline.metrics import ErrorCounts, error_counts
from pipeline.schema import Hypothesis, Segment

_TOKENS_PER_S, _MORE_TOKENS = 12, 16  # a text that is longer has run away
_STEP = 8  # mel frames


class TowerHeldout:
    def __init__(self, examples: Sequence[Example], config: TowerConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._loaded: LoadedModel = load_model(
            EngineConfig(model=config.model, revision=config.revision, device=str(device))
        )
        thinker: Any = self._loaded.model.thinker
        self.tower: Any = thinker.audio_tower
        self._examples = sorted(examples, key=lambda example: len(example.pcm))
        self._mel = ClipMel(self.tower.config.num_mel_bins, device)

    def groups(self) -> list[list[Example]]:
        """Of like length, within `batch_audio_s`."""
        groups: list[list[Example]] = []
        for example in self._examples:
            if not groups or (len(groups[-1]) + 1) * example.ref.duration_s > self._config.batch_audio_s:
                groups.append([])
            groups[-1].append(example)
        return groups

    def error_rates(self, file: Path) -> dict[str, float]:
        """WER (CER where metrics.unit_name says so) by language of the tower in `file`, in its largest blocks."""
        load_tower(str(file), self.tower, self._loaded.info.model_id)
        counts: dict[str, ErrorCounts] = {}
        for group in self.groups():
            for example, text in zip(group, self._transcribe(group), strict=True):
                language = example.ref.language
                counts[language] = counts.get(language, ErrorCounts()) + error_counts(example.ref.text, text, language)
        return {language: its.rate for language, its in sorted(counts.items())}

    @torch.inference_mode()
    def _transcribe(self, group: Sequence[Example]) -> list[str]:
        """Greedily, without a forced language."""
        loaded, thinker = self._loaded, self._loaded.model.thinker
        mel, num_frames = self._mel.log_mel([padded(example.pcm) for example in group])
        geometry = Geometry(max(self._config.block_frames), self._config.left_steps)
        num_steps = num_frames // _STEP
        heard = encode_whole(
            self.tower, mel.transpose(1, 2).to(loaded.dtype), geometry, None, num_steps.to(self._device)
        )
        prompts, sizes = self._prompts(heard, num_steps.tolist())
        limits = [_MORE_TOKENS + int(_TOKENS_PER_S * example.ref.duration_s) for example in group]
        decoder = SlotDecoder(thinker, len(group), prompts.shape[1] + max(limits), loaded.int4)
        choice = decoder.prefill(range(len(group)), prompts, sizes)
        answers: list[list[int]] = [[] for _ in group]
        ended = [False] * len(group)
        for count in range(1, max(limits) + 1):
            for row, token in enumerate(choice.tokens.tolist()):
                if not ended[row]:
                    answers[row].append(token)
                    ended[row] = token in loaded.eos_token_ids or len(answers[row]) >= limits[row]
            if all(ended):
                break
            choice = decoder.step(decoder.num_rows_for(len(group)), min(prompts.shape[1] + count, decoder.width))
        texts = []
        for example, ids in zip(group, answers, strict=True):
            found = loaded.result(Segment(example.ref.example_id, example.pcm), None, ids, [0.0] * len(ids), "stop")
            texts.append(found.text if isinstance(found, Hypothesis) else "")
        return texts

    def _prompts(self, heard: Tensor, num_steps: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Embeddings of the prompt with each one's audio, padded behind: [B, T, hidden], and their lengths."""
        thinker: Any = self._loaded.model.thinker
        text, _ = self._loaded.prompt(Segment("", padded(self._examples[0].pcm)))
        ids = self._loaded.processor.tokenizer(text)["input_ids"]
        at = ids.index(thinker.config.audio_token_id)
        embed = thinker.model.embed_tokens
        head, tail = (embed(torch.tensor(part, device=self._device)) for part in (ids[:at], ids[at + 1 :]))
        rows = [
            torch.cat([head, each[:size].to(head.dtype), tail]) for each, size in zip(heard, num_steps, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), [len(row) for row in rows]
