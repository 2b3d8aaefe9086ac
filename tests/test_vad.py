import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch

from pipeline import vad
from pipeline.vad import FRAME_SAMPLES, speech_probabilities, speech_spans

FSDD_SHARD = Path(__file__).parents[2] / "shared" / "speech" / "fsdd" / "train-00000.tar"
RATE = 16_000

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
needs_fsdd = pytest.mark.skipif(not FSDD_SHARD.exists(), reason=f"no FSDD speech at {FSDD_SHARD}")


def pcm16(data: bytes) -> np.ndarray:
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    resampled = soxr.resample(samples, rate, RATE)
    return (np.clip(resampled, -1, 1) * 32767).astype(np.int16)


def espeak(text: str) -> np.ndarray:
    return pcm16(subprocess.run(["espeak-ng", "--stdout", text], check=True, capture_output=True).stdout)


def noise(seconds: float, level: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(0, level * 32767, int(seconds * RATE))).astype(np.int16)


def noise_bursts() -> np.ndarray:
    """20 s, longer than one block, of noise that comes and goes, and no whole number of frames."""
    return np.concatenate([noise(0.5 + 0.1 * (i % 7), 0.2 if i % 2 else 0.001, seed=i) for i in range(25)])[: 20 * RATE]


def words_with_pauses(num_words: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """FSDD digits with 0.5 s of faint noise before, between and after, and where each lies."""
    words: list[np.ndarray] = []
    with tarfile.open(FSDD_SHARD) as shard:
        for member in shard:
            if member.name.endswith(".wav") and len(words) < num_words:
                file = shard.extractfile(member)
                assert file is not None
                words.append(pcm16(file.read()))
    pieces, places, position = [noise(0.5, 0.0003)], [], RATE // 2
    for word in words:
        places.append((position, position + len(word)))
        pieces += [word, noise(0.5, 0.0003)]
        position += len(word) + RATE // 2
    return np.concatenate(pieces), places


def library_probabilities(pcm: np.ndarray) -> np.ndarray:
    """What the package's own frame-by-frame model gives."""
    threads = torch.get_num_threads()
    from silero_vad import load_silero_vad

    model = load_silero_vad()
    torch.set_num_threads(threads)
    padded = np.pad(pcm.astype(np.float32) / 32768, (0, -len(pcm) % FRAME_SAMPLES))
    with torch.no_grad():
        return np.array([model(frame, RATE).item() for frame in torch.from_numpy(padded).split(FRAME_SAMPLES)])


def assert_as_the_library(pcm: np.ndarray) -> None:
    from silero_vad import get_speech_timestamps_from_probs

    expected = library_probabilities(pcm)
    np.testing.assert_allclose(speech_probabilities(pcm), expected, atol=5e-5)
    spans = get_speech_timestamps_from_probs(
        expected.tolist(), min_speech_duration_ms=64, audio_length_samples=len(pcm)
    )
    assert speech_spans(pcm, 0.5, 100) == [(span["start"], span["end"]) for span in spans]


def test_noise_scores_as_the_library_scores_it():
    assert_as_the_library(noise_bursts())


@needs_fsdd
def test_real_speech_scores_as_the_library_scores_it():
    assert_as_the_library(words_with_pauses(60)[0])


@pytest.mark.parametrize(("num_samples", "num_frames"), [(0, 0), (1, 1), (512, 1), (513, 2), (512 * 513, 513)])
def test_one_probability_a_frame(num_samples, num_frames):
    probabilities = speech_probabilities(np.zeros(num_samples, np.int16))
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (num_frames,)


def test_no_audio_has_no_speech():
    assert speech_spans(np.zeros(0, np.int16), 0.5, 100) == []


def test_bursts_of_noise_are_not_speech():
    assert speech_spans(noise_bursts(), 0.5, 100) == []


@needs_espeak
def test_speech_between_noise_is_found():
    words = espeak("the meeting starts at nine")
    lead = noise(2, 0.003)
    spans = speech_spans(np.concatenate([lead, words, noise(2, 0.003, seed=1)]), 0.5, 100)
    assert abs(spans[0][0] - len(lead)) < 0.3 * RATE
    assert abs(spans[-1][1] - len(lead) - len(words)) < 0.4 * RATE  # espeak ends on silence
    assert spans == sorted(spans)


@needs_fsdd
def test_spoken_digits_are_found_and_the_pauses_between_them_too():
    pcm, places = words_with_pauses(100)
    spans = speech_spans(pcm, 0.5, 100)
    found = sum(any(start < end_w and end > start_w for start, end in spans) for start_w, end_w in places)
    assert found >= 99
    pause_middles = [end + RATE // 4 for _, end in places]
    assert not [m for m in pause_middles if any(start <= m < end for start, end in spans)]


def test_the_shortest_silence_setting_closes_no_pause(monkeypatch):
    probabilities = np.array(([0.9] * 10 + [0.1] * 2) * 5, np.float32)
    monkeypatch.setattr(vad, "speech_probabilities", lambda pcm: probabilities)
    spans = speech_spans(np.zeros(len(probabilities) * FRAME_SAMPLES, np.int16), 0.5, 1)
    assert len(spans) == 5
    assert all(end < start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))


def test_torch_threads_are_one_during_the_call_and_then_as_before(monkeypatch):
    during = []
    real = vad._model()

    def model(frames, state):
        during.append(torch.get_num_threads())
        return real(frames, state)

    monkeypatch.setattr(vad, "_model", lambda: model)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    speech_spans(noise(1, 0.1), 0.5, 100)
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert (during, after) == ([1], 2)


def test_importing_the_package_leaves_torch_threads_alone():
    # In a process of its own: the package changes the setting once, on its first import.
    code = (
        "import sys, numpy, torch; torch.set_num_threads(2); from pipeline.vad import speech_spans;"
        "speech_spans(numpy.zeros(512, numpy.int16), 0.5, 100); sys.exit(torch.get_num_threads() != 2)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("pcm", [np.zeros(10, np.float32), np.zeros((10, 2), np.int16)])
def test_other_audio_is_refused_by_name(pcm):
    with pytest.raises(ValueError, match=rf"int16 .*not {pcm.dtype} of shape \[10"):
        speech_probabilities(pcm)
