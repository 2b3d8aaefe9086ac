"""A Qwen3-ASR checkpoint on a device, and what engines share around it: prompts, languages, results."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
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
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from pipeline.config import EngineConfig
from pipeline.engine.base import EngineFailure, EngineInfo, Result
from pipeline.engine.checkpoint import Checkpoint, CheckpointError, resolve, weight_names
from pipeline.engine.fake_quant import read_fake_quant
from pipeline.engine.int4 import Int4Weight
from pipeline.engine.int8 import Int8Head
from pipeline.engine.quantized import read
from pipeline.engine.tokens import token_ends
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis, Segment

MIN_SAMPLES = int(MIN_ASR_INPUT_SECONDS * SAMPLE_RATE_HZ)
"""Shorter segments are padded with zeros to so many samples, as qwen-asr pads them."""

_MAX_PROMPTS = 1000  # that are remembered; a job has one for each language, or one for each context of its input


class SegmentError(ValueError):
    """A segment that must not reach the model; `code` is one of EngineFailure's."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


@dataclass(frozen=True)
class LoadedModel:
    """`wrapper` is qwen-asr's own; its model is on `device`, in `dtype`, in evaluation mode."""

    wrapper: Qwen3ASRModel
    config: EngineConfig
    info: EngineInfo
    device: torch.device
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    languages: list[str]
    int4: Mapping[str, Int4Weight]  # of the text layers by name; their linear layers in `model` hold no weights then
    _prompts: dict[tuple[str, str | None], str] = field(default_factory=dict)

    @property
    def model(self) -> Qwen3ASRForConditionalGeneration:
        return self.wrapper.model

    @property
    def processor(self) -> Any:
        return self.wrapper.processor

    @cached_property
    def special_tokens(self) -> list[str]:
        return list(self.processor.tokenizer.all_special_tokens)

    def prompt(self, segment: Segment) -> tuple[str, str | None]:
        """The prompt with one audio placeholder, and the language that it forces. The configuration's language goes
        before the segment's own; the segment's context goes before the configuration's. Raises SegmentError."""
        if segment.duration_s > MAX_ASR_INPUT_SECONDS:
            raise SegmentError(
                "segment_too_long", f"{segment.duration_s:.0f} s of audio; Qwen3-ASR takes {MAX_ASR_INPUT_SECONDS} s"
            )
        context = segment.context or self.config.context
        named = self.config.language or segment.language
        key = (context, named)
        if key not in self._prompts:
            if len(self._prompts) >= _MAX_PROMPTS:
                self._prompts.clear()
            self.check_context(context)
            language = self.known_language(named) if named else None
            self._prompts[key] = self.wrapper._build_text_prompt(context, language)
        return self._prompts[key], self.known_language(named) if named else None

    def check_context(self, context: str) -> None:
        special = [token for token in self.special_tokens if token in context]
        if special:
            raise SegmentError("bad_context", f"context holds {special[0]}, a token of the prompt itself; remove it")

    def known_language(self, name: str) -> str:
        language: str = normalize_language_name(name)
        if language not in self.languages:
            raise SegmentError(
                "unsupported_language", f"{name!r} is no language of this model; it knows {', '.join(self.languages)}"
            )
        return language

    def result(
        self, segment: Segment, language: str | None, token_ids: list[int], logprobs: list[float], finish_reason: str
    ) -> Result:
        """What greedily chosen tokens say; `language` is the forced one."""
        if not np.isfinite(logprobs).all():
            return EngineFailure(segment.segment_id, "not_finite", f"the model's logits are NaN in {self.info.dtype}")
        tokenizer = self.processor.tokenizer
        raw = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        detected, text = parse_asr_output(raw, user_language=language)
        ends = token_ends(tokenizer, token_ids, raw)
        return Hypothesis(text, raw, detected, token_ids, logprobs, finish_reason, token_ends=ends)


def load_model(config: EngineConfig) -> LoadedModel:
    """Raises CheckpointError when the model is not one to run, SegmentError for a context or language of the
    configuration that it cannot take."""
    checkpoint = resolve(config.model, config.revision, quantization=config.quantization)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device(
        config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    )
    dtype = _dtype(config, device)
    int4: Mapping[str, Int4Weight] = {}
    quantization: str = config.quantization
    match config.quantization:
        case "int4":
            quantized = read(checkpoint.path)
            int4 = quantized.linears
            wrapper = _build_from(checkpoint, quantized.others, int4, dtype)
        case "fake_quant":
            fake = read_fake_quant(checkpoint.path)
            quantization = f"fake-{fake.numbers}"
            wrapper = _build_from(checkpoint, fake.tensors, (), dtype)
        case "none":
            wrapper = build(checkpoint, dtype)
    model: Qwen3ASRForConditionalGeneration = wrapper.model
    model.to(device).eval()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    info = EngineInfo(
        engine=config.name,
        model_id=checkpoint.model_id,
        model_revision=checkpoint.revision,
        quantization=quantization + ("+int8-head" if config.lm_head == "int8" else ""),
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        attention=config.attention,
        num_parameters=num_parameters + sum(weight.shape[0] * weight.shape[1] for weight in int4.values()),
    )
    if config.lm_head == "int8":
        model.thinker.lm_head = Int8Head(model.thinker.lm_head)
    languages = list(model.config.support_languages or SUPPORTED_LANGUAGES)
    loaded = LoadedModel(wrapper, config, info, device, dtype, checkpoint.eos_token_ids, languages, int4)
    # a mistake in the configuration must not become a failure of every segment
    loaded.check_context(config.context)
    if config.language is not None:
        loaded.known_language(config.language)
    return loaded


def _dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        chosen: torch.dtype = getattr(torch, config.dtype)
        return chosen
    if device.type != "cpu" or config.quantization == "int4":
        return torch.bfloat16
    return torch.bfloat16 if config.name == "offline" and bfloat16_is_fast() else torch.float32


@cache
def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies matrices faster in bfloat16, as those with AMX or AVX512-BF16 do; measured once."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            nn.functional.linear(a, b)
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < seconds[torch.float32]


def build(checkpoint: Checkpoint, dtype: torch.dtype) -> Qwen3ASRModel:
    """qwen-asr's model as transformers loads it. Raises CheckpointError when the file lacks weights of it."""
    wrapper = Qwen3ASRModel.from_pretrained(
        str(checkpoint.path),
        dtype=dtype,
        use_safetensors=True,
        attn_implementation="sdpa",
        generation_config=_generation_config(checkpoint),
    )
    _require_all(wrapper.model, weight_names(checkpoint.path), checkpoint.model_id)
    return wrapper


def _build_from(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], empty: Collection[str], dtype: torch.dtype
) -> Qwen3ASRModel:
    """The model with these tensors, in which the weights of the layers `empty` have no elements."""
    config = AutoConfig.from_pretrained(str(checkpoint.path))
    config._attn_implementation = "sdpa"
    model = Qwen3ASRForConditionalGeneration(config).to(dtype)
    for name in empty:
        model.get_submodule(name).weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    names = set(model.state_dict()) - set(missing) | {f"{name}.weight" for name in empty}
    _require_all(model, names, checkpoint.model_id)
    model.tie_weights()
    model.generation_config = _generation_config(checkpoint)
    processor = AutoProcessor.from_pretrained(str(checkpoint.path), fix_mistral_regex=True)
    return Qwen3ASRModel(backend="transformers", model=model, processor=processor, max_inference_batch_size=32)


def _generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """Upstream's generate reads the thinker's own; sampling flags in the file would only draw a warning."""
    return GenerationConfig(eos_token_id=list(checkpoint.eos_token_ids))


def _require_all(model: nn.Module, names: set[str], model_id: str) -> None:
    """transformers gives a tensor that the file lacks random values, with no more than a warning."""
    tied = {"thinker.lm_head.weight"} if model.config.thinker_config.text_config.tie_word_embeddings else set()  # type: ignore[union-attr]
    missing = sorted(set(model.state_dict()) - names - tied)
    if missing:
        raise CheckpointError(f"{model_id}: its weights lack {len(missing)} tensors of the model, such as {missing[0]}")


def audio_of(segments: Sequence[Segment]) -> list[np.ndarray]:
    """int16 PCM of each, padded to MIN_SAMPLES."""
    return [padded(segment.pcm) for segment in segments]


def padded(pcm: np.ndarray) -> np.ndarray:
    """At least MIN_SAMPLES of it, with zeros behind."""
    return np.pad(pcm, (0, max(0, MIN_SAMPLES - len(pcm))))
