"""Audio of many lengths in one batch, against each clip alone in qwen-asr's feature extractor and tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_asr import Qwen3ASRModel
from transformers import WhisperFeatureExtractor

from pipeline.engine.features import AudioEncoder
from pipeline.engine.model import MIN_SAMPLES
from pipeline.engine.reference import install_windowed_attention
from tests.engine.tiny import noise

EXTRACTOR = WhisperFeatureExtractor(feature_size=128)


@pytest.fixture(scope="module")
def wrapper(tiny_checkpoint: Path) -> Qwen3ASRModel:
    wrapper = Qwen3ASRModel.from_pretrained(str(tiny_checkpoint), dtype=torch.float32, attn_implementation="sdpa")
    install_windowed_attention(wrapper.model.thinker.audio_tower)
    return wrapper


@pytest.fixture(scope="module")
def encoder(wrapper: Qwen3ASRModel) -> AudioEncoder:
    return AudioEncoder(wrapper.model.thinker.audio_tower, torch.device("cpu"), torch.float32)


def alone(clip: np.ndarray) -> torch.Tensor:
    audio = clip.astype(np.float32) / 32768
    options = {"sampling_rate": 16_000, "padding": "longest", "truncation": False, "return_tensors": "pt"}
    return EXTRACTOR([audio], **options).input_features[0]  # type: ignore[no-any-return]


clips = st.lists(st.tuples(st.integers(MIN_SAMPLES, 400_000), st.integers(0, 99)), min_size=1, max_size=5)


@settings(max_examples=20, deadline=None)
@given(shapes=clips)
def test_log_mel_is_each_clips_own_to_its_last_frame(encoder: AudioEncoder, shapes: list[tuple[int, int]]) -> None:
    batch = [noise(samples / 16_000, seed) for samples, seed in shapes]
    mel, num_frames = encoder.log_mel(batch)
    for clip, row, size in zip(batch, mel, num_frames.tolist(), strict=True):
        torch.testing.assert_close(row[:, :size], alone(clip), atol=1e-4, rtol=0)
        assert not row[:, size:].any()


@settings(max_examples=15, deadline=None)
@given(shapes=clips)
def test_embeddings_are_those_of_the_windowed_reference(
    wrapper: Qwen3ASRModel, encoder: AudioEncoder, shapes: list[tuple[int, int]]
) -> None:
    batch = [noise(samples / 16_000, seed) for samples, seed in shapes]
    found, sizes = encoder(batch)
    for clip, row, size in zip(batch, found, sizes.tolist(), strict=True):
        mel = alone(clip)
        with torch.no_grad():
            expected = wrapper.model.thinker.audio_tower(mel, feature_lens=torch.tensor([mel.shape[1]]))
        torch.testing.assert_close(row[:size], expected.last_hidden_state, atol=1e-4, rtol=1e-4)
