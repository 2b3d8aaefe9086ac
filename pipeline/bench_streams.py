"""Live streams of one engine beside qwen3-asr-causal, which serves one at a time, on the same weights and audio.

`pip install --no-deps qwen3-asr-causal==0.1.0` brings the latter; without it ours are shown alone.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from pipeline.bench import Figure, clips
from pipeline.config import EngineConfig
from pipeline.engine.causal.batch import StreamBatch
from pipeline.engine.causal.load import Causal, load_causal
from pipeline.engine.checkpoint import resolve
from pipeline.schema import SAMPLE_RATE_HZ

_STREAM_S, _LANGUAGE, _CODE = 64.0, "English", "en"
_PARTS = 4  # audio comes in so many pieces a block


def streams(model: str, tower: str, num_streams: int, threads: int) -> list[Figure]:
    """Seconds of audio a second of work: `num_streams` in one batch, in each dtype that this device runs well, beside
    the runtime in float32 on a CPU and bfloat16 on a GPU, as it loads itself; and the memory of a stream. Compared is
    its own rule for the end of a segment; ours, "sentence", hears some audio again."""
    torch.set_num_threads(threads)
    is_cuda = torch.cuda.is_available()
    audio = clips(num_streams, _STREAM_S, _STREAM_S)
    speed: dict[str, float] = {}
    memory: dict[str, float] = {}
    for dtype in ("bfloat16",) if is_cuda else ("float32", "bfloat16"):
        for roll in ("sentence", "mark"):
            options: dict[str, Any] = {
                "name": "causal", "model": model, "tower": tower, "dtype": dtype, "slots": num_streams,
                "batch_size": num_streams, "language": _LANGUAGE, "streams": {"roll": roll},
            }  # fmt: skip
            causal = load_causal(EngineConfig.model_validate(options))
            speed[f"{roll} {dtype}"], memory[dtype] = _ours(causal, audio)
    theirs = _runtime(model, causal, audio[0])
    best, same = (max(found for name, found in speed.items() if roll in name) for roll in ("sentence", "mark"))
    found = [
        Figure(f"streams x real time, {num_streams} in one engine", best, "x", detail=speed | {"threads": threads}),
        *(Figure(f"memory of a stream, {dtype}", size / 1e6, "MB") for dtype, size in memory.items()),
    ]
    if theirs is not None:
        detail = speed | {"runtime": theirs}
        target = 20 if is_cuda else 10
        found.append(Figure("the same by its rule of segments / qwen3-asr-causal", same / theirs, "x", target,
                            detail=detail))  # fmt: skip
    return found


def _ours(causal: Causal, audio: Sequence[np.ndarray]) -> tuple[float, float]:
    """All streams live: their audio comes piece by piece, side by side. And the bytes that a slot holds."""
    batch = StreamBatch(causal.loaded, causal.settings, languages=causal.languages)
    piece = causal.settings.geometry.block_frames * 160 // _PARTS
    for warm in (True, False):
        open_streams = [batch.open(f"{warm} {number}", _LANGUAGE) for number in range(len(audio))]
        length = 4 * piece * _PARTS if warm else len(audio[0])
        began = time.perf_counter()
        for at in range(0, length, piece):
            for stream, pcm in zip(open_streams, audio, strict=True):
                batch.push(stream, pcm[at : min(length, at + piece)])
            while batch.has_work:
                batch.turn()
        for stream in open_streams:
            batch.end(stream)
        while batch.has_work:
            batch.turn()
        took = time.perf_counter() - began
    return sum(map(len, audio)) / SAMPLE_RATE_HZ / took, float(batch.bytes_per_slot)


def _runtime(model: str, causal: Causal, pcm: np.ndarray) -> float | None:
    """The runtime on the same tower; one stream, as it has no more at once."""
    try:
        package: Any = importlib.import_module("qwen3_asr_causal")
    except ModuleNotFoundError:
        return None
    frames = causal.settings.geometry.block_frames
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tower.safetensors"
        tower = causal.loaded.model.thinker.audio_tower
        save_file({name: tensor.float().cpu().contiguous() for name, tensor in tower.state_dict().items()}, file)
        asr = package.Qwen3StreamingASR(
            lan=_CODE,
            model_dir=str(resolve(model).path),
            qwen3_streaming_audio_backend="causal",
            qwen3_streaming_tower_checkpoint=str(file),
            qwen3_streaming_chunk_sec=frames / 100,
        )
    took = 0.0
    for seconds in (8.0, len(pcm) / SAMPLE_RATE_HZ):  # the first to warm up
        processor = package.Qwen3StreamingOnlineProcessor(asr)
        processor._PACING = 0.0
        began = time.perf_counter()
        for start in range(0, int(seconds * SAMPLE_RATE_HZ), frames * 160):
            chunk = pcm[start : start + frames * 160].astype(np.float32) / 32768
            processor.insert_audio_chunk(chunk, (start + len(chunk)) / SAMPLE_RATE_HZ)
            processor.process_iter()
        processor.finish()
        took = time.perf_counter() - began
    return len(pcm) / SAMPLE_RATE_HZ / took
