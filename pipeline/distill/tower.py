"""Self-distillation of a causal audio tower: heard block after block, it learns to give what the offline tower of its
model gives, from audio alone. As `qfuxa/qwen3-asr-0.6b-streaming` was trained (github.com/QuentinFuxa/Qwen3-ASR-causal,
experiments/qwen3-causal): mean squared error and cosine, blocks of two sizes, positions far beyond a recording's start.

The two towers do not give as many steps: offline 13 for every 100 mel frames, causal 12.5. A causal step learns from
the offline one whose frames are nearest.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.distill import loop
from pipeline.distill.audio import Loader
from pipeline.distill.config import TowerConfig
from pipeline.distill.examples import ExampleRef, read_examples
from pipeline.distill.feed import feed
from pipeline.distill.loop import Forward
from pipeline.distill.quantize import load
from pipeline.distill.sampling import draw
from pipeline.distill.tower_heldout import TowerHeldout
from pipeline.distill.tower_text import TextLoss
from pipeline.distill.worker import Worker
from pipeline.engine.causal.convolutions import FRAMES_PER_STEP
from pipeline.engine.causal.tower import Geometry, encode_whole
from pipeline.engine.causal.weights import load_tower, save_tower
from pipeline.engine.checkpoint import resolve
from pipeline.engine.features import ClipMel
from pipeline.engine.model import padded
from pipeline.engine.windowed import TOKENS_PER_CHUNK, encode

TOWER_FILE = "model.safetensors"
_CHUNK_FRAMES = 100


@dataclass(frozen=True, slots=True)
class TowerBatch:
    """mel float32 [B, mels, T], zero beyond a clip's `num_frames` int64 [B]; `offsets` int64 [B] are the positions that
    the causal tower begins at, `block_frames` its blocks."""

    refs: Sequence[ExampleRef]
    mel: Tensor
    num_frames: Tensor
    offsets: Tensor
    block_frames: int

    @property
    def num_steps(self) -> Tensor:
        """int64 [B]: whole steps of each clip."""
        return self.num_frames // FRAMES_PER_STEP


def train(config: TowerConfig, worker: Worker) -> None:
    """See loop.train. Raises ConfigError, CheckpointError and StorageError for inputs that cannot be used."""
    loop.train(config, lambda dtype: CausalTower(config, worker, dtype), worker)


class WholeTower(nn.Module):
    """A causal tower that hears recordings in one pass."""

    def __init__(self, tower: Any, left_steps: int) -> None:
        super().__init__()
        self.tower = tower
        self._left_steps = left_steps

    def forward(self, batch: TowerBatch) -> Tensor:
        """[B, T // 8, output_dim], undefined beyond a clip's own steps."""
        device = self.tower.conv_out.weight.device
        mel = batch.mel.transpose(1, 2).to(device)
        geometry = Geometry(batch.block_frames, self._left_steps)
        return encode_whole(self.tower, mel, geometry, batch.offsets.to(device), batch.num_steps.to(device))


class CausalTower:
    """The task of `loop`."""

    def __init__(self, config: TowerConfig, worker: Worker, dtype: torch.dtype) -> None:
        self._config, self._worker, self._dtype = config, worker, dtype
        options, speech, held = config.storage.access, config.speech, config.heldout
        texts = config.text_weight > 0
        self._refs = read_examples(speech.sources, options, speech.languages, speech.min_s, speech.max_s, texts)
        held_refs = read_examples(held.sources, options, held.languages, held.min_s, held.max_s)
        held_refs = draw(held_refs, held.samples_per_language, held.seed)
        checkpoint = resolve(config.model, config.revision, key="model")
        wrapper, offline = (load(checkpoint, worker.device) for _ in range(2))
        self._offline = offline.model.thinker.audio_tower.to(dtype).requires_grad_(False)
        self._text = TextLoss(offline, dtype) if texts else None
        tower = wrapper.model.thinker.audio_tower.float()
        if config.tower is not None:
            load_tower(config.tower, tower, checkpoint.model_id)
        self.model = WholeTower(tower, config.left_steps)
        self.layers = list(tower.layers)
        self._num_mels: int = tower.config.num_mel_bins
        self._made = {"base_model": checkpoint.model_id, "base_revision": checkpoint.revision}
        loader = Loader(options)
        self._heldout = TowerHeldout([loader.load(ref) for ref in held_refs], config, worker.device)
        mel, largest = ClipMel(self._num_mels, torch.device("cpu")), max(config.block_frames)
        self._held_batches = [
            tower_batch([each.pcm for each in group], [each.ref for each in group], mel, [0] * len(group), largest)
            for group in self._heldout.groups()
        ]

    def feed(self, skip: int) -> Generator[TowerBatch]:
        reader = partial(TowerReader, self._config, self._num_mels, self._worker.rank)
        return feed(self._refs, self._config, reader, self._worker.rank, skip)

    def size(self, batch: TowerBatch) -> int:
        return int(batch.num_steps.sum())

    def losses(self, forward: Forward, batch: TowerBatch) -> dict[str, Tensor]:
        """ "loss", "mse" (a number of the embedding), "cosine" (1 less the cosine); "text" where it has a weight."""
        device = self._worker.device
        heard = forward(batch).float()
        with torch.no_grad():
            wanted, _ = encode(self._offline, batch.mel.to(device, self._dtype), batch.num_frames)
        own = torch.arange(heard.shape[1]) < batch.num_steps[:, None]
        nearest = nearest_offline(heard.shape[1]).clamp(max=wanted.shape[1] - 1)
        own = own.to(device)
        mine, its = heard[own], wanted[:, nearest.to(device)][own].float()
        mse = F.mse_loss(mine, its)
        cosine = 1 - F.cosine_similarity(mine, its, dim=-1).mean()
        loss = mse + self._config.cosine_weight * cosine
        if self._text is None:
            return {"loss": loss, "mse": mse, "cosine": cosine}
        text = self._text(heard, batch.num_steps.tolist(), batch.refs)
        return {"loss": loss + self._config.text_weight * text, "mse": mse, "cosine": cosine, "text": text}

    def heldout(self, forward: Forward) -> dict[str, float]:
        sums: dict[str, float] = {}
        total = 0
        for batch in self._held_batches:
            size = self.size(batch)
            for name, loss in self.losses(forward, batch).items():
                sums[name] = sums.get(name, 0.0) + size * float(loss)
            total += size
        return {name: value / total for name, value in sums.items()}

    def write(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """One file in the published layout, in the dtype that engines run."""
        tower = self._heldout.tower
        tower.load_state_dict({name.removeprefix("tower."): tensor for name, tensor in weights.items()})
        partial_folder = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(partial_folder, ignore_errors=True)
        languages = ",".join(sorted({ref.language for ref in self._refs}))
        blocks = ",".join(map(str, self._config.block_frames))
        notes = self._made | {"languages": languages, "block_frames": blocks}
        save_tower(tower, partial_folder / TOWER_FILE, notes | {"left_steps": str(self._config.left_steps)})
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)

    def error_rates(self, folder: Path) -> dict[str, float]:
        return self._heldout.error_rates(folder / TOWER_FILE)


def nearest_offline(num_steps: int) -> Tensor:
    """int64 [num_steps]: the offline step whose frames are nearest to those of each causal step; the earlier of two."""
    first = torch.arange(num_steps) * FRAMES_PER_STEP
    chunk, within = first // _CHUNK_FRAMES, first % _CHUNK_FRAMES
    in_chunk = (within + FRAMES_PER_STEP // 2 - 1) // FRAMES_PER_STEP
    return chunk * TOKENS_PER_CHUNK + in_chunk.clamp(max=TOKENS_PER_CHUNK - 1)


class TowerReader:
    """Makes batches of examples, each with its own blocks and offsets, which follow from the seed and its number."""

    def __init__(self, config: TowerConfig, num_mels: int, rank: int) -> None:
        self._config, self._rank = config, rank
        self._loader = Loader(config.storage.access)
        self._mel = ClipMel(num_mels, torch.device("cpu"))

    def __call__(self, number: int, refs: Sequence[ExampleRef]) -> TowerBatch:
        config = self._config
        rng = random.Random(f"{config.seed} {self._rank} {number}")
        offsets = [
            round(math.exp(rng.uniform(0, math.log(config.max_offset)))) if rng.random() < config.offset_share else 0
            for _ in refs
        ]
        return tower_batch(
            [self._loader.load(ref).pcm for ref in refs], refs, self._mel, offsets, rng.choice(config.block_frames)
        )


def tower_batch(
    clips: Sequence[Any], refs: Sequence[ExampleRef], mel: ClipMel, offsets: Sequence[int], block_frames: int
) -> TowerBatch:
    """From int16 clips."""
    features, num_frames = mel.log_mel([padded(clip) for clip in clips])
    return TowerBatch(refs, features, num_frames, torch.tensor(offsets), block_frames)
