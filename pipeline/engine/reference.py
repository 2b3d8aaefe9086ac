"""qwen-asr's own model, run as it is published: slow, trusted, and what every other engine is held against.

Added to it: batches over submissions, end tokens read from the checkpoint, a log-probability per token, and (with
`attention: windowed`) the mask that qwen-asr 0.0.6 prepares and never passes. Only the last can change a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from qwen_asr import Qwen3ASRModel
from qwen_asr.core.transformers_backend import Qwen3ASRForConditionalGeneration
from qwen_asr.inference.utils import (
    MAX_ASR_INPUT_SECONDS,
    MIN_ASR_INPUT_SECONDS,
    SUPPORTED_LANGUAGES,
    normalize_language_name,
    parse_asr_output,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipeline.config import EngineConfig
from pipeline.engine.base import EngineFailure, EngineInfo, Result
from pipeline.engine.batching import BatchWorker
from pipeline.engine.checkpoint import CheckpointError, resolve, weight_names
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis, Segment

_MIN_SAMPLES = int(MIN_ASR_INPUT_SECONDS * SAMPLE_RATE_HZ)


class SegmentError(ValueError):
    """A segment that must not reach the model; `code` is one of EngineFailure's."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


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

    def __init__(self, config: EngineConfig) -> None:
        checkpoint = resolve(config.model, config.revision)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = torch.device(
            config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        )
        dtype_name = config.dtype if config.dtype != "auto" else ("float32" if device.type == "cpu" else "bfloat16")
        self._dtype: torch.dtype = getattr(torch, dtype_name)
        self._device = device
        self._config = config
        self._eos_token_ids = checkpoint.eos_token_ids
        self._wrapper = Qwen3ASRModel.from_pretrained(
            str(checkpoint.path),
            dtype=self._dtype,
            use_safetensors=True,
            attn_implementation="sdpa",
            # Upstream's generate reads the thinker's own; sampling flags in the file would only draw a warning.
            generation_config=GenerationConfig(eos_token_id=list(checkpoint.eos_token_ids)),
        )
        self._processor = self._wrapper.processor
        self._pad_token_id = self._processor.tokenizer.pad_token_id
        model: Qwen3ASRForConditionalGeneration = self._wrapper.model
        _require_all_weights(model, weight_names(checkpoint.path), checkpoint.model_id)
        self._model = model.to(device).eval()
        self._languages = list(model.config.support_languages or SUPPORTED_LANGUAGES)
        if config.attention == "windowed":
            install_windowed_attention(model.thinker.audio_tower)
        # Prefill needs the logits of its last position only; at 16 clips of 30 s and the published vocabulary, all of
        # them are 4 GB in float32.
        model.thinker.lm_head.register_forward_pre_hook(lambda _, args: (args[0][:, -1:],))
        self.info = EngineInfo(
            engine="reference",
            model_id=checkpoint.model_id,
            model_revision=checkpoint.revision,
            quantization="none",
            dtype=dtype_name,
            device=str(device),
            attention=config.attention,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        )
        # A mistake in the configuration, or a model that cannot run here, must not become a failure of every segment.
        self._check_context(config.context)
        if config.language is not None:
            self._known_language(config.language)
        self._decode([self._prepare(Segment("warm-up", np.zeros(_MIN_SAMPLES, np.int16)))], max_new_tokens=2)
        self._worker = BatchWorker(self._transcribe, config.batch_size, config.batch_audio_s)

    def submit(self, segments: Sequence[Segment]) -> Future[list[Result]]:
        """See AsrEngine. The configuration's language goes before the segment's own; the segment's context goes before
        the configuration's."""
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
        if segment.duration_s > MAX_ASR_INPUT_SECONDS:
            raise SegmentError(
                "segment_too_long", f"{segment.duration_s:.0f} s of audio; Qwen3-ASR takes {MAX_ASR_INPUT_SECONDS} s"
            )
        context = segment.context or self._config.context
        self._check_context(context)
        named = self._config.language or segment.language
        language = self._known_language(named) if named else None
        audio = segment.pcm.astype(np.float32) / 32768
        audio = np.pad(audio, (0, max(0, _MIN_SAMPLES - len(audio))))
        prompt = self._wrapper._build_text_prompt(context, language)
        inputs = self._processor(text=[prompt], audio=[audio], return_tensors="pt", padding=True)
        num_frames = int(inputs["feature_attention_mask"].sum())
        return _Inputs(segment, language, inputs["input_ids"][0], inputs["input_features"][0, :, :num_frames])

    def _check_context(self, context: str) -> None:
        special = [token for token in self._processor.tokenizer.all_special_tokens if token in context]
        if special:
            raise SegmentError("bad_context", f"context holds {special[0]}, a token of the prompt itself; remove it")

    def _known_language(self, name: str) -> str:
        language: str = normalize_language_name(name)
        if language not in self._languages:
            raise SegmentError(
                "unsupported_language", f"{name!r} is no language of this model; it knows {', '.join(self._languages)}"
            )
        return language

    @torch.inference_mode()
    def _decode(self, inputs: list[_Inputs], max_new_tokens: int) -> list[Result]:
        recorder = _ChosenLogprobs()
        batch = {name: tensor.to(self._device) for name, tensor in self._collate(inputs).items()}
        output = self._model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self._eos_token_ids),
            pad_token_id=self._pad_token_id,
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([recorder]),
        )
        new_tokens = output.sequences[:, batch["input_ids"].shape[1] :].cpu()
        logprobs = torch.stack(recorder.steps, dim=1).cpu()
        return [self._result(*row) for row in zip(inputs, new_tokens.tolist(), logprobs.tolist(), strict=True)]

    def _collate(self, inputs: list[_Inputs]) -> dict[str, Tensor]:
        """Prompts padded on the left, features on the right, as Qwen3ASRProcessor pads them."""
        ids = [item.input_ids for item in inputs]
        features = [item.features.T.to(self._dtype) for item in inputs]
        return {
            "input_ids": pad_sequence(ids, True, self._pad_token_id, padding_side="left"),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0, padding_side="left"),
            "input_features": pad_sequence(features, True).transpose(1, 2),
            "feature_attention_mask": pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in features], True),
        }

    def _result(self, inputs: _Inputs, token_ids: list[int], logprobs: list[float]) -> Result:
        end = next((i for i, token in enumerate(token_ids) if token in self._eos_token_ids), None)
        num_tokens = len(token_ids) if end is None else end + 1
        token_ids, logprobs = token_ids[:num_tokens], logprobs[:num_tokens]
        if not np.isfinite(logprobs).all():
            dtype = str(self._dtype).removeprefix("torch.")
            return EngineFailure(inputs.segment.segment_id, "not_finite", f"the model's logits are NaN in {dtype}")
        raw = self._processor.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        language, text = parse_asr_output(raw, user_language=inputs.language)
        return Hypothesis(
            text=text,
            text_raw=raw,
            language=language,
            token_ids=token_ids,
            token_logprobs=logprobs,
            finish_reason="length" if end is None else "stop",
        )


class _ChosenLogprobs(LogitsProcessor):
    """Keeps the log-probability of each step's greedy choice, float32 [B] a step. `generate(output_logits=True)` would
    keep the whole distribution: 10 GB for 512 steps of 32 rows at the published vocabulary."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.max(dim=-1).values - scores.logsumexp(dim=-1))
        return scores


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


def _require_all_weights(model: nn.Module, names: set[str], model_id: str) -> None:
    """transformers gives a tensor that the file lacks random values, with no more than a warning."""
    tied = {"thinker.lm_head.weight"} if model.config.thinker_config.text_config.tie_word_embeddings else set()  # type: ignore[union-attr]
    missing = sorted(set(model.state_dict()) - names - tied)
    if missing:
        raise CheckpointError(f"{model_id}: its weights lack {len(missing)} tensors of the model, such as {missing[0]}")
