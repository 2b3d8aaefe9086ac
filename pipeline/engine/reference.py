"""qwen-asr's own model, run as it is published: slow, trusted, and what every other engine is held against.

Added to it: batches over submissions, end tokens read from the checkpoint, a log-probability per token, and (with
`attention: windowed`) the mask that qwen-asr 0.0.6 prepares and never passes. Only the last can change a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList

from pipeline.attempts import Watchdog
from pipeline.config import EngineConfig
from pipeline.engine.base import EngineFailure, Observer, Result
from pipeline.engine.batching import BatchWorker
from pipeline.engine.int4 import Int4Weight
from pipeline.engine.model import MIN_SAMPLES, SegmentError, audio_of, load_model
from pipeline.schema import Segment


@dataclass(frozen=True, slots=True)
class _Inputs:
    """One segment as the model takes it: input_ids int64 [T]; features float32 [128, F], log-mel at 100 frames/s."""

    segment: Segment
    language: str | None
    input_ids: Tensor
    features: Tensor


class ReferenceEngine:
    """Greedy decoding with `Qwen3ASRModel` (SDPA attention).

    Mel features are made clip by clip, so a text is what `Qwen3ASRModel.transcribe` gives for that clip alone. (In one
    call with longer clips, upstream computes the last frame across the zero padding and may count one frame more.)
    Clips below 0.5 s are padded with zeros to 0.5 s.

    Raises CheckpointError when the model is not one to run, ValueError for a language it does not know.
    """

    def __init__(self, config: EngineConfig, observe: Observer | None = None) -> None:
        self._loaded = load_model(config)
        self._config = config
        self.info = self._loaded.info
        thinker: Any = self._loaded.model.thinker
        for name, weight in self._loaded.int4.items():
            _fake_quantize(self._loaded.model.get_submodule(name), weight, self._loaded.dtype)
        if config.attention == "windowed":
            install_windowed_attention(thinker.audio_tower)
        # Prefill needs the logits of its last position only; at 16 clips of 30 s and the published vocabulary, all of
        # them are 4 GB in float32.
        thinker.lm_head.register_forward_pre_hook(lambda _, args: (args[0][:, -1:],))
        # A model that cannot run here must not become a failure of every segment.
        self._decode([self._prepare(Segment("warm-up", np.zeros(MIN_SAMPLES, np.int16)))], max_new_tokens=2)
        self._worker = BatchWorker(
            self._transcribe, config.batch_size, config.batch_audio_s, Watchdog(config.stall_timeout_s), observe
        )

    def submit(self, segments: Sequence[Segment]) -> Future[list[Result]]:
        """See AsrEngine and LoadedModel.prompt."""
        return self._worker.submit(segments)

    def close(self) -> None:
        self._worker.close()

    def _transcribe(self, segments: Sequence[Segment]) -> list[Result]:
        results: dict[int, Result] = {}
        inputs: dict[int, _Inputs] = {}
        for index, segment in enumerate(segments):
            try:
                inputs[index] = self._prepare(segment)
            except SegmentError as error:
                results[index] = EngineFailure(segment.segment_id, error.code, str(error))
        if inputs:
            decoded = self._decode(list(inputs.values()), self._config.max_new_tokens)
            results.update(zip(inputs, decoded, strict=True))
        return [results[index] for index in range(len(segments))]

    def _prepare(self, segment: Segment) -> _Inputs:
        prompt, language = self._loaded.prompt(segment)
        (pcm,) = audio_of([segment])
        audio = pcm.astype(np.float32) / 32768
        inputs = self._loaded.processor(text=[prompt], audio=[audio], return_tensors="pt", padding=True)
        num_frames = int(inputs["feature_attention_mask"].sum())
        return _Inputs(segment, language, inputs["input_ids"][0], inputs["input_features"][0, :, :num_frames])

    @torch.inference_mode()
    def _decode(self, inputs: list[_Inputs], max_new_tokens: int) -> list[Result]:
        recorder = _ChosenLogprobs(self._config.top_logprobs)
        batch = {name: tensor.to(self._loaded.device) for name, tensor in self._collate(inputs).items()}
        output = self._loaded.model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self._loaded.eos_token_ids),
            pad_token_id=self._loaded.processor.tokenizer.pad_token_id,
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([recorder]),
        )
        new_tokens = output.sequences[:, batch["input_ids"].shape[1] :].cpu()
        logprobs = torch.stack(recorder.steps, dim=1).cpu()
        results = [self._result(*row) for row in zip(inputs, new_tokens.tolist(), logprobs.tolist(), strict=True)]
        if not recorder.top:
            return results
        top_logprobs, top_ids = (torch.stack(each, dim=1).cpu().numpy() for each in zip(*recorder.top, strict=True))
        return [_with_top(*row) for row in zip(results, top_ids.astype(np.int32), top_logprobs, strict=True)]

    def _collate(self, inputs: list[_Inputs]) -> dict[str, Tensor]:
        """Prompts padded on the left, features on the right, as Qwen3ASRProcessor pads them."""
        pad = self._loaded.processor.tokenizer.pad_token_id
        ids = [item.input_ids for item in inputs]
        features = [item.features.T.to(self._loaded.dtype) for item in inputs]
        return {
            "input_ids": pad_sequence(ids, True, pad, padding_side="left"),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0, padding_side="left"),
            "input_features": pad_sequence(features, True).transpose(1, 2),
            "feature_attention_mask": pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in features], True),
        }

    def _result(self, inputs: _Inputs, token_ids: list[int], logprobs: list[float]) -> Result:
        end = next((i for i, token in enumerate(token_ids) if token in self._loaded.eos_token_ids), None)
        num_tokens = len(token_ids) if end is None else end + 1
        return self._loaded.result(
            inputs.segment,
            inputs.language,
            token_ids[:num_tokens],
            logprobs[:num_tokens],
            "length" if end is None else "stop",
        )


def _with_top(result: Result, top_ids: np.ndarray, top_logprobs: np.ndarray) -> Result:
    if isinstance(result, EngineFailure):
        return result
    length = len(result.token_ids)
    return replace(result, top_ids=top_ids[:length], top_logprobs=top_logprobs[:length])


class _ChosenLogprobs(LogitsProcessor):
    """Keeps the log-probability of each step's greedy choice, float32 [B] a step. `generate(output_logits=True)` would
    keep the whole distribution: 10 GB for 512 steps of 32 rows at the published vocabulary. `top`: log-probabilities
    and ids of the likeliest `num_top`, [B, num_top] each a step."""

    def __init__(self, num_top: int) -> None:
        self.steps: list[Tensor] = []
        self.top: list[tuple[Tensor, Tensor]] = []
        self._num_top = num_top

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.max(dim=-1).values - scores.logsumexp(dim=-1))
        if self._num_top:
            values, indices = scores.log_softmax(dim=-1).topk(self._num_top, dim=-1)
            self.top.append((values, indices))
        return scores


def _fake_quantize(linear: nn.Module, weight: Int4Weight, dtype: torch.dtype) -> None:
    """Gives a linear layer the values that its INT4 weights stand for, at full size."""
    device = linear.weight.device
    linear.weight = nn.Parameter(weight.dequantized(dtype).to(device), requires_grad=False)  # type: ignore[arg-type]
    if weight.pre_scale is not None:
        scale = weight.pre_scale.to(device, dtype)  # type: ignore[arg-type]
        linear.register_forward_pre_hook(lambda _, args: (args[0] * scale,))


def install_windowed_attention(tower: nn.Module) -> None:
    """Make a Qwen3ASRAudioEncoder attend within windows of 8 s (104 tokens) under SDPA and eager attention, as it does
    under FlashAttention 2 and vLLM: qwen-asr has the mask (`_prepare_attention_mask`) and never passes it."""
    layers: Any = tower.layers
    mask: Tensor | None = None

    def pass_mask(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal mask
        if layer is layers[0]:
            mask = tower._prepare_attention_mask(*args)  # type: ignore[operator]
        return args, {**kwargs, "attention_mask": mask}

    for layer in layers:
        layer.register_forward_pre_hook(pass_mask, with_kwargs=True)
