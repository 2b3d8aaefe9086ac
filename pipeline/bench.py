"""Figures of this machine, each a ratio in one run on the same weights and audio; `shardscribe bench` shows them.

The audio is what comes with the package, joined to clips of 1 to 30 seconds; `0.6b` is the published model's shape with
random weights, whose texts mean nothing and whose lengths are drawn.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from qwen_asr import Qwen3ASRModel
from qwen_asr.core.transformers_backend import Qwen3ASRForConditionalGeneration
from torch import Tensor, nn

from pipeline import vad
from pipeline.audio import decode
from pipeline.config import EngineConfig, TranscribeConfig
from pipeline.embedded.checkpoint_files import model_config
from pipeline.embedded.evaluation import HELDOUT_FOLDER
from pipeline.engine.base import EngineInfo
from pipeline.engine.checkpoint import resolve
from pipeline.engine.decoder import SlotDecoder
from pipeline.engine.int4 import Int4Weight
from pipeline.engine.model import LoadedModel
from pipeline.engine.offline import OfflineEngine
from pipeline.engine.quantized import fitted
from pipeline.schema import SAMPLE_RATE_HZ, Segment
from pipeline.sources.plan import plan, samples

STUDENT = "embedded/student"
_TOKENS_PER_S, _SPREAD = 3.6, 0.25  # 160 words a minute of 1.3 tokens and the language; log-normal
_GROUP = 128
_BATCH = 32  # of qwen-asr's transcribe


@dataclass(frozen=True, slots=True)
class Figure:
    """`target` is what it should be at least (at most where `at_most`); None where it is shown for what it is."""

    name: str
    value: float
    unit: str = ""
    target: float | None = None
    at_most: bool = False
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def is_met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


def clips(num_clips: int, shortest_s: float = 1.0, longest_s: float = 30.0, seed: int = 0) -> list[np.ndarray]:
    """int16 clips of lengths drawn evenly, of embedded held-out speech."""
    rng, speech = random.Random(seed), list(recordings())
    found = []
    for _ in range(num_clips):
        num_samples = int(rng.uniform(shortest_s, longest_s) * SAMPLE_RATE_HZ)
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < num_samples:
            parts.append(rng.choice(speech))
        found.append(np.concatenate(parts)[:num_samples])
    return found


def recordings() -> Iterator[np.ndarray]:
    config = TranscribeConfig.model_validate({"inputs": [f"{HELDOUT_FOLDER}/*.tar"], "output": "unused"})
    for split in plan(config.inputs, {}, 1800.0):
        for sample in samples(split, {}):
            assert sample.open is not None
            with sample.open() as file:
                yield np.concatenate([block[:, 0] for block in decode(file, "mix", 0.0, None)])


def engines(num_clips: int, threads: int) -> list[Figure]:
    """The offline engine beside qwen-asr's `transcribe`, on the embedded student."""
    audio = clips(num_clips)
    seconds = sum(map(len, audio)) / SAMPLE_RATE_HZ
    torch.set_num_threads(threads)
    rtfx = {}
    for dtype in ("float32", "bfloat16"):
        wrapper = student(getattr(torch, dtype))
        wrapper.transcribe([as_upstream(audio[0])])
        began = time.perf_counter()
        wrapper.transcribe([as_upstream(clip) for clip in audio])
        rtfx[f"reference {dtype}"] = seconds / (time.perf_counter() - began)
    engine = OfflineEngine(EngineConfig(name="offline", model=STUDENT, threads=threads))
    took = run(engine, audio)
    counts = engine.counts
    engine.close()
    ours = seconds / took
    best = max(rtfx.values())
    detail = {"RTFx": rtfx | {f"offline {engine.info.dtype}": ours}, "audio_s": seconds, "threads": threads}
    shares = {name: getattr(counts, f"{name}_s") / took for name in ("encode", "prefill", "decode", "idle")}
    return [
        Figure("offline / reference, student", ours / best, "x", 8, detail=detail | {"share of time": shares}),
        Figure("offline / reference in float32, as qwen-asr loads it", ours / rtfx["reference float32"], "x", 8),
        Figure("slot efficiency", counts.useful_row_steps / counts.row_steps, "", 0.90, detail={"steps": counts.steps}),
    ]


def run(engine: OfflineEngine, audio: Sequence[np.ndarray]) -> float:
    """Seconds that the engine takes for all of it."""
    began = time.perf_counter()
    engine.submit([Segment(str(i), clip) for i, clip in enumerate(audio)]).result()
    return time.perf_counter() - began


def student(dtype: torch.dtype) -> Qwen3ASRModel:
    """As a user of qwen-asr loads it, with the end tokens of the checkpoint."""
    checkpoint = resolve(STUDENT)
    wrapper = Qwen3ASRModel.from_pretrained(str(checkpoint.path), dtype=dtype, max_inference_batch_size=_BATCH)
    wrapper.model.generate = functools.partial(
        wrapper.model.generate,
        eos_token_id=list(checkpoint.eos_token_ids),
        pad_token_id=wrapper.processor.tokenizer.pad_token_id,
    )
    return wrapper


def as_upstream(clip: np.ndarray) -> tuple[np.ndarray, int]:
    return clip.astype(np.float32) / 32768, SAMPLE_RATE_HZ


class _Fixed(OfflineEngine):
    """Every row ends after its drawn number of tokens; segments are named by their numbers."""

    def __init__(self, config: EngineConfig, loaded: LoadedModel, lengths: Sequence[int]) -> None:
        self._lengths = {str(number): length for number, length in enumerate(lengths)}
        super().__init__(config, loaded=loaded)

    def _prefill(self, slots: list[int], rows: list[Any]) -> Any:
        for row in rows:
            row.max_new_tokens = self._lengths.get(row.segment.segment_id, 1)
        return super()._prefill(slots, rows)

    def _finish(self, slot: int, row: Any, reason: str) -> None:
        if reason != "repetition":  # as random weights do, and their lengths are drawn
            super()._finish(slot, row, reason)


class _Spoken(nn.Module):
    """A head that chooses letters of the embedded tokenizer only: what it chooses can be read, and never ends."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x)
        logits[..., :40] = -1e4
        logits[..., 240:] = -1e4
        return logits


def shape_06b(device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Qwen3-ASR-0.6B's shape with random weights and the embedded tokenizer."""
    processor = Qwen3ASRModel.from_pretrained(str(resolve(STUDENT).path)).processor
    config = model_config(
        processor.tokenizer,
        audio_d_model=896,
        audio_layers=18,
        audio_heads=14,
        audio_ffn=3584,
        downsample_hidden=480,
        text_hidden=1024,
        text_layers=28,
        text_heads=16,
        text_kv_heads=8,
        text_intermediate=3072,
    )
    text = config.thinker_config.text_config
    text.head_dim, text.vocab_size = 128, 151_936
    text.rope_scaling["mrope_section"] = [24, 20, 20]
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Qwen3ASRForConditionalGeneration(config).to(device).eval()
    finally:
        torch.set_default_dtype(default)
    model.thinker.lm_head = _Spoken(model.thinker.lm_head)
    wrapper = Qwen3ASRModel("transformers", model, processor, max_inference_batch_size=_BATCH)
    name = str(dtype).removeprefix("torch.")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    info = EngineInfo("offline", "0.6b", "random", "none", name, str(device), "windowed", num_parameters)
    engine = EngineConfig(name="offline", model="0.6b")
    return LoadedModel(wrapper, engine, info, device, dtype, (151_935,), ["English"], {})


def engines_06b(num_clips: int, threads: int, device: torch.device) -> list[Figure]:
    """The same on the published shape: bfloat16, output lengths drawn.

    On a CPU clips end at 15 s: of longer ones a single batch of 32 takes qwen-asr over four minutes, as it copies its
    cache at every step.
    """
    torch.set_num_threads(threads)
    loaded = shape_06b(device, torch.bfloat16)
    audio = clips(num_clips, longest_s=30.0 if device.type == "cuda" else 15.0)
    seconds, rng = sum(map(len, audio)) / SAMPLE_RATE_HZ, random.Random(1)
    rates = [_TOKENS_PER_S * rng.lognormvariate(0, _SPREAD) for _ in audio]
    lengths = [4 + int(rate * len(clip) / SAMPLE_RATE_HZ) for rate, clip in zip(rates, audio, strict=True)]

    wrapper = loaded.wrapper
    wrapper.model.generate = functools.partial(
        wrapper.model.generate, eos_token_id=151_935, pad_token_id=wrapper.processor.tokenizer.pad_token_id
    )
    synchronize(device)
    began = time.perf_counter()
    for i in range(0, num_clips, _BATCH):
        wrapper.max_new_tokens = max(lengths[i : i + _BATCH])  # a batch runs until its longest row ends
        wrapper.transcribe([as_upstream(clip) for clip in audio[i : i + _BATCH]])
    synchronize(device)
    reference = seconds / (time.perf_counter() - began)

    options = EngineConfig(name="offline", model="0.6b", slots=min(64, max(8, num_clips // 3)), max_new_tokens=10_000)
    engine = _Fixed(options, loaded, lengths)
    took = run(engine, audio)
    counts = engine.counts
    engine.close()
    if counts.useful_row_steps != sum(lengths) - num_clips:  # the first token of each is the prefill's
        raise RuntimeError(f"{counts.useful_row_steps} tokens were decoded, {sum(lengths)} were drawn")
    ours = seconds / took
    shares = {name: getattr(counts, f"{name}_s") / took for name in ("encode", "prefill", "decode", "idle")}
    detail = {"RTFx": {"reference": reference, "offline": ours}, "audio_s": seconds, "tokens": sum(lengths)}
    target = 10 if device.type == "cuda" else 1.6
    return [
        Figure(f"offline / reference, 0.6B shape on {device.type}", ours / reference, "x", target,
               detail=detail | {"share of time": shares, "slots": options.slots}),
        Figure("slot efficiency, 0.6B shape", counts.useful_row_steps / max(counts.row_steps, 1), "", 0.90),
    ]  # fmt: skip


def int4(device: torch.device, threads: int, batches: Sequence[int] = (1, 8, 32, 64)) -> list[Figure]:
    """The 0.6B shape's decoder in INT4 beside bfloat16: bytes of its weights, and decode steps of full batches."""
    torch.set_num_threads(threads)
    loaded = shape_06b(device, torch.bfloat16)
    thinker: Any = loaded.model.thinker
    names = [name for name, module in thinker.model.layers.named_modules() if isinstance(module, nn.Linear)]
    num_bytes = sum(2 * thinker.model.layers.get_submodule(name).weight.numel() for name in names)
    speed = {"bf16": decode_speed(thinker, {}, batches)}
    quantized: dict[str, Int4Weight] = {}
    for name in names:
        weight = thinker.model.layers.get_submodule(name).weight.detach()
        amax = weight.float().abs().unflatten(1, (-1, _GROUP)).amax(-1)
        quantized[f"thinker.model.layers.{name}"] = fitted(weight.cpu(), amax.flatten()[:, None].cpu(), _GROUP)
    held = sum(weight.num_bytes for weight in quantized.values())
    speed["int4"] = decode_speed(thinker, quantized, batches)
    ratios = {batch: speed["int4"][batch] / speed["bf16"][batch] for batch in batches}
    return [
        Figure("INT4 / bf16 bytes of the decoder's weights", held / num_bytes, "", 0.30, at_most=True,
               detail={"int4 MB": held / 1e6, "bf16 MB": num_bytes / 1e6}),
        *(Figure(f"INT4 / bf16 decode tokens a second, batch {batch}", ratio, "x", 1.8 if batch == 1 else None,
                 detail={kind: speed[kind][batch] for kind in speed})
          for batch, ratio in ratios.items()),
    ]  # fmt: skip


def decode_speed(thinker: Any, weights: dict[str, Int4Weight], batches: Sequence[int]) -> dict[int, float]:
    """Tokens a second of decode steps at 512 positions, by batch."""
    speed, length = {}, 512
    decoder = SlotDecoder(thinker, max(batches), length, weights)
    for batch in batches:
        for _ in range(2):
            decoder.step(batch, length)
        times = []
        for _ in range(5):
            synchronize(thinker.model.embed_tokens.weight.device)
            began = time.perf_counter()
            decoder.step(batch, length)
            synchronize(thinker.model.embed_tokens.weight.device)
            times.append(time.perf_counter() - began)
        speed[batch] = batch / sorted(times)[len(times) // 2]
    return speed


def reading() -> list[Figure]:
    """What a core does beside the engine."""
    torch.set_num_threads(1)
    began = time.process_time()
    audio = list(recordings())
    decoding = time.process_time() - began
    hours = sum(map(len, audio)) / SAMPLE_RATE_HZ / 3600
    began = time.process_time()
    for clip in audio:
        vad.speech_spans(clip, 0.5, 100)
    return [
        Figure("decode", decoding / hours, "core-s / h of audio", detail={"audio_h": hours}),
        Figure("VAD", (time.process_time() - began) / hours, "core-s / h of audio"),
    ]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
