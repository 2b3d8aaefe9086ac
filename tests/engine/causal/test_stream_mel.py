"""Frames of a stream against those of its whole recording."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.causal.stream_mel import StreamAudio, StreamMel
from pipeline.engine.mel import HOP, LogMel
from tests.engine.tiny import noise

MEL = StreamMel(128, torch.device("cpu"))


def whole(pcm: np.ndarray) -> torch.Tensor:
    """[T, 128] of one-shot extraction, cut below the loudest frame so far instead of the loudest of all."""
    audio = torch.from_numpy(np.pad(pcm, 200, mode="reflect")).float()[None] / 32768
    log = LogMel().log(audio)[0].T[: len(pcm) // HOP]
    return (torch.maximum(log, log.amax(dim=1).cummax(dim=0).values[:, None] - 8) + 4) / 4


def streamed(pcm: np.ndarray, chunks: list[int], block: int) -> torch.Tensor:
    """The same from chunks of these sizes (again and again), in blocks."""
    audio, peak, frame, parts, at = StreamAudio(), -math.inf, 0, [], 0
    while True:
        size = chunks[at % len(chunks)]
        start = sum(chunks[i % len(chunks)] for i in range(at))
        audio.append(pcm[start : start + size])
        at += 1
        if start + size >= len(pcm):
            audio.is_ended = True
        while audio.num_frames - frame >= block or (audio.is_ended and audio.num_frames > frame):
            count = min(block, audio.num_frames - frame)
            mel, (peak,) = MEL([audio.window(frame, count)], [peak])
            parts.append(mel[0])
            frame += count
            audio.forget(frame)
            assert audio.num_bytes <= 2 * (block * HOP + max(chunks) + 401)
        if audio.is_ended:
            return torch.cat(parts) if parts else torch.zeros(0, 128)


@settings(max_examples=30, deadline=None)
@given(
    num_samples=st.integers(201, 60_000),
    chunks=st.lists(st.integers(1, 9000), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 500),
    block=st.sampled_from([1, 8, 96, 192]),
    seed=st.integers(0, 9),
)
def test_any_chunks_give_the_frames_of_the_whole(num_samples: int, chunks: list[int], block: int, seed: int) -> None:
    pcm = noise(4.0, seed)[:num_samples]
    torch.testing.assert_close(streamed(pcm, chunks, block), whole(pcm), atol=2e-5, rtol=0)


def test_they_are_one_shot_frames_once_the_loudest_was_heard() -> None:
    pcm = noise(6.0, 3)
    pcm[:400] = 20_000 * np.sign(np.sin(np.arange(400) / 5))
    one_shot = LogMel()(torch.from_numpy(pcm).float()[None] / 32768)[0].T
    torch.testing.assert_close(streamed(pcm, [777], 192), one_shot, atol=2e-5, rtol=0)


@pytest.mark.parametrize("num_samples", [0, 1, 160, 200])
def test_a_stream_too_short_for_a_frame_has_none(num_samples: int) -> None:
    assert streamed(noise(1.0)[:num_samples], [160], 192).shape == (0, 128)


def test_streams_of_different_lengths_and_loudness_do_not_meet() -> None:
    clips = [noise(2.0, 1), (noise(1.0, 2) // 50).astype(np.int16), np.zeros(8000, np.int16)]
    audios = [StreamAudio() for _ in clips]
    for audio, clip in zip(audios, clips, strict=True):
        audio.append(clip)
        audio.is_ended = True
    windows, before = [audio.window(0, audio.num_frames) for audio in audios], [-math.inf, 1.5, -math.inf]
    mel, peaks = MEL(windows, before)
    alone = [MEL([window], [peak]) for window, peak in zip(windows, before, strict=True)]
    for row, (want, (peak,)), audio, got in zip(mel, alone, audios, peaks, strict=True):
        torch.testing.assert_close(row[: audio.num_frames], want[0], atol=1e-6, rtol=0)
        assert not row[audio.num_frames :].any() and got == peak
    assert peaks[1] == 1.5


def test_a_stream_that_goes_on_needs_no_audio_from_before() -> None:
    pcm = noise(3.0, 5)
    first, later = StreamAudio(), StreamAudio(first_sample=100 * HOP - 200)
    first.append(pcm)
    later.append(pcm[100 * HOP - 200 :])
    assert later.num_samples == len(pcm) and later.num_frames == first.num_frames
    np.testing.assert_array_equal(later.window(100, 50), first.window(100, 50))
