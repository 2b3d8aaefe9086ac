"""qwen3-asr-causal, the runtime that ours is held against."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qwen_asr.core.transformers_backend import Qwen3ASRForConditionalGeneration
from safetensors.torch import save_file

from pipeline.engine.checkpoint import EMBEDDED_FOLDER

STUDENT = EMBEDDED_FOLDER / "student"


def upstream(module: str = "") -> Any:
    """`qwen3_asr_causal` or a module of it; skips the test where it is not installed."""
    try:
        return importlib.import_module(f"qwen3_asr_causal{module}")
    except ModuleNotFoundError:
        pytest.skip("qwen3-asr-causal is not here: pip install --no-deps qwen3-asr-causal==0.1.0")


def tower_of(folder: Path) -> Any:
    """The audio tower of a checkpoint, in float32."""
    model = Qwen3ASRForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.thinker.audio_tower.eval()


def causal_encoder(tower: Any, block_frames: int, left_frames: int = 1500) -> Any:
    config = upstream(".config").RealtimeAudioConfig(
        d_model=tower.config.output_dim,
        n_mels=tower.config.num_mel_bins,
        qwen_audio_block_bidirectional=True,
        qwen_audio_block_frames=block_frames,
    )
    return upstream(".causal").QwenAudioCausalKVEncoder(tower, config, left_context_frames=left_frames).eval()


def save_flat(model: Path, folder: Path) -> Path:
    """The offline tower of a checkpoint in the layout of a causal one."""
    file = folder / "tower.safetensors"
    save_file(tower_of(model).state_dict(), file)
    return file


def runtime(model: Path, folder: Path, **options: Any) -> Any:
    """Its model holder with the offline tower of `model`, a decode for every block."""
    return upstream().Qwen3StreamingASR(
        lan=options.pop("language", "en"),
        model_dir=str(model),
        qwen3_streaming_audio_backend="causal",
        qwen3_streaming_tower_checkpoint=str(save_flat(model, folder)),
        qwen3_streaming_device="cpu",
        qwen3_streaming_dtype="float32",
        qwen3_streaming_chunk_sec=options.get("block_frames", 192) / 100,
        **{f"qwen3_streaming_{name}": value for name, value in options.items()},
    )


class OurMel:
    """Our frames for its processor, whose own are cut below the loudest of a chunk and so depend on its chunks."""

    def __init__(self) -> None:
        from pipeline.engine.causal.stream_mel import StreamAudio, StreamMel

        self._mel, self._audio = StreamMel(128, torch.device("cpu")), StreamAudio()
        self._frame, self._peak = 0, -np.inf

    def append(self, audio: np.ndarray) -> torch.Tensor | None:
        self._audio.append((audio * 32768).astype(np.int16))
        return self._new()

    def flush(self) -> torch.Tensor | None:
        self._audio.is_ended = True
        return self._new()

    def _new(self) -> torch.Tensor | None:
        count = self._audio.num_frames - self._frame
        if count <= 0:
            return None
        mel, (self._peak,) = self._mel([self._audio.window(self._frame, count)], [self._peak])
        self._frame += count
        return mel


def transcribe(asr: Any, pcm: np.ndarray, our_mel: bool, heard: Callable[[dict[str, Any]], None]) -> str:
    """What its online processor publishes of a recording that comes a block at a time; `heard` gets every event."""
    processor = upstream().Qwen3StreamingOnlineProcessor(asr)
    processor._PACING = 0.0  # the wall clock of a decode decides nothing
    if our_mel:
        processor.mel = OurMel()
    streamer = processor.streamer
    update = streamer.update_from_hypothesis

    def observed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        event: dict[str, Any] = update(*args, **kwargs)
        heard(event)
        return event

    streamer.update_from_hypothesis = observed
    words = []
    size = asr.block_frames * 160
    for start in range(0, len(pcm), size):
        chunk = pcm[start : start + size].astype(np.float32) / 32768
        processor.insert_audio_chunk(chunk, (start + len(chunk)) / 16_000)
        words += processor.process_iter()[0]
    words += processor.finish()[0]
    return "".join(word.text for word in words)
