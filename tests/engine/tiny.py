"""Random Qwen3-ASR checkpoints of 72,000 parameters, built in milliseconds, and audio that they react to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from qwen_asr.core.transformers_backend import Qwen3ASRForConditionalGeneration

from pipeline.embedded.checkpoint_files import model_config, save_checkpoint, save_tokenizer
from pipeline.schema import SAMPLE_RATE_HZ, Segment

TEXTS = ["the quick brown fox jumps over the lazy dog", "language English language Chinese language None", "你好世界"]


def build_checkpoint(folder: Path, seed: int = 2) -> Path:
    """Random weights, scaled so that audio decides which token comes next: a small tied embedding would otherwise see
    its own last token most of all, and a flat distribution would turn on rounding."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(folder, TEXTS * 3, 320)
    config = model_config(
        tokenizer,
        audio_d_model=32,
        audio_layers=2,
        audio_heads=2,
        audio_ffn=64,
        downsample_hidden=8,
        text_hidden=32,
        text_layers=2,
        text_heads=2,
        text_kv_heads=1,
        text_intermediate=64,
    )
    torch.manual_seed(seed)
    model = Qwen3ASRForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1 if "embed_tokens" in name else 1.5 / parameter[0].numel() ** 0.5)
            elif name.endswith("q_norm.weight"):
                parameter.fill_(4.0)
        model.thinker.model.norm.weight.fill_(6.0)
    save_checkpoint(folder, model, tokenizer, torch.float32)
    return folder


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """int16 [seconds * 16,000]: noise under a slow, seeded envelope, so that clips differ to the model."""
    generator = np.random.default_rng(seed)
    num_samples = int(seconds * SAMPLE_RATE_HZ)
    time_s = np.arange(num_samples) / SAMPLE_RATE_HZ
    tone = np.sin(2 * np.pi * generator.uniform(200, 3000) * time_s)
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * generator.uniform(0.3, 3) * time_s)
    return ((0.2 * generator.normal(size=num_samples) + 0.4 * tone) * envelope * 8000).astype(np.int16)


def segment(seconds: float, seed: int = 0, language: str | None = None, context: str = "") -> Segment:
    return Segment(f"noise-{seconds}-{seed}", noise(seconds, seed), language, context)
