"""Our log-mel against the feature extractor of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from pipeline.engine.mel import HOP, LogMel
from tests.engine.tiny import noise

MEL = LogMel()
EXTRACTOR = WhisperFeatureExtractor(feature_size=128)


def expected(clips: list[np.ndarray]) -> torch.Tensor:
    """[B, 128, T] of clips padded to the longest."""
    return EXTRACTOR(
        clips, sampling_rate=16_000, padding="longest", truncation=False, return_tensors="pt"
    ).input_features


def audio(seconds: float, seed: int, gain: float = 1.0) -> np.ndarray:
    return (noise(seconds, seed) * (gain / 32768.0)).astype(np.float32)


@pytest.mark.parametrize(
    "clip",
    [
        audio(1.0, 1),
        audio(7.3213, 2),
        audio(30.0, 3),
        audio(0.1, 4),
        audio(2.0, 5, gain=1e-3),
        np.zeros(16_000, np.float32),
        np.eye(1, 16_000, 8_000, dtype=np.float32)[0],
        np.clip(audio(2.0, 6, gain=20), -1, 1),
    ],
    ids=["second", "odd length", "window", "tenth", "quiet", "silence", "click", "clipped"],
)
def test_a_clip_is_that_of_the_feature_extractor(clip: np.ndarray) -> None:
    mel = MEL(torch.from_numpy(clip)[None])
    assert mel.shape == (1, 128, len(clip) // HOP)
    torch.testing.assert_close(mel, expected([clip]), atol=1e-4, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(400, 40_000), st.sampled_from([0.01, 0.3, 1.0])), min_size=1, max_size=4))
def test_a_padded_batch_is_that_of_the_feature_extractor(shapes: list[tuple[int, float]]) -> None:
    clips = [audio(samples / 16_000, seed, gain) for seed, (samples, gain) in enumerate(shapes)]
    batch = np.zeros((len(clips), max(map(len, clips))), np.float32)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    torch.testing.assert_close(MEL(torch.from_numpy(batch)), expected(clips), atol=1e-4, rtol=0)


def test_neighbours_and_padding_do_not_reach_into_a_clip() -> None:
    """All frames but the last two, whose windows reach past the end: there alone is the mirror image of the audio."""
    loud, quiet = audio(3.0, 1), audio(1.0, 2, gain=0.05)
    batch = torch.zeros(2, len(loud))
    batch[0], batch[1, : len(quiet)] = torch.from_numpy(loud), torch.from_numpy(quiet)
    alone = MEL(torch.from_numpy(quiet)[None])[0]
    torch.testing.assert_close(MEL(batch)[1, :, : alone.shape[1] - 2], alone[:, :-2], atol=1e-4, rtol=0)


def test_nothing_of_it_is_a_weight() -> None:
    assert not MEL.state_dict() and not list(MEL.parameters())
