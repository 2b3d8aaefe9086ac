"""The read step on real tars and folders, with a small unit size: which audio ends in which unit, and what a resume
opens."""

from __future__ import annotations

import io
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import read as read_module
from pipeline import segmentation, vad
from pipeline.audio import Channels
from pipeline.config import AudioConfig, InputConfig, TranscribeConfig, UnitsConfig
from pipeline.read import read_units
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.sources.plan import plan, samples
from pipeline.sources.sample import Sample
from pipeline.storage import StorageError
from pipeline.units import Done, Split, Unit, UnitKey


def noise(seconds: float, seed: int = 0, channels: int = 1) -> np.ndarray:
    shape = (round(seconds * SAMPLE_RATE_HZ), channels)
    return np.random.default_rng(seed).integers(-9_000, 9_000, shape).astype(np.int16)


def wav(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def flac(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE_HZ, format="FLAC")
    return buffer.getvalue()


def faint(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise that FLAC packs to less than a third of what sizes are estimated by."""
    samples = np.random.default_rng(seed).integers(-2, 3, (round(seconds * SAMPLE_RATE_HZ), 1))
    return samples.astype(np.int16)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def config(path: Path, target_s: float, channels: Channels = "mix") -> TranscribeConfig:
    return TranscribeConfig(
        inputs=[InputConfig(path=str(path))],
        output="unused",
        units=UnitsConfig(target_s=target_s),
        audio=AudioConfig(channels=channels),
    )


def units_of(path: Path, target_s: float, done: Done = Done(), channels: Channels = "mix") -> list[Unit]:  # noqa: B008
    options = config(path, target_s, channels)
    (split,) = plan(options.inputs, {}, target_s)
    return list(read_units(split, done, options))


def names(units: list[Unit]) -> list[str]:
    return [unit.key.name.split("-", 1)[1] for unit in units]


def joined(units: list[Unit]) -> dict[str, np.ndarray]:
    """The audio of each recording, its parts put together; fails where their offsets leave a gap."""
    pieces: dict[str, list[np.ndarray]] = defaultdict(list)
    for unit in units:
        for recording in unit.recordings:
            held = sum(map(len, pieces[recording.recording_id]))
            assert round(recording.offset_s * SAMPLE_RATE_HZ) == held
            pieces[recording.recording_id].append(recording.pcm)
    return {name: np.concatenate(parts) for name, parts in pieces.items()}


@pytest.fixture
def plain_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """No VAD: a cut lies 100 samples before the limit."""
    monkeypatch.setattr(vad, "speech_spans", lambda pcm, threshold, min_silence_ms: [(0, len(pcm))])
    monkeypatch.setattr(segmentation, "cut_at_pause", lambda speech, lo, hi: max(hi - 100, lo + 1))


def test_groups_follow_from_sizes(tmp_path: Path) -> None:
    audio = {f"{i}.wav": noise(1.0, i) for i in range(7)}
    path = write_tar(tmp_path / "t.tar", {name: wav(pcm) for name, pcm in audio.items()})
    units = units_of(path, 3.1)
    assert names(units) == ["00000-000g", "00001-000g", "00002-000z"]
    assert [len(unit.recordings) for unit in units] == [3, 3, 1]
    for unit in units:
        for recording in unit.recordings:
            assert np.array_equal(recording.pcm, audio[Path(recording.audio_filepath).name][:, 0])
            assert recording.recording_id == recording.audio_filepath == f"{path}/{Path(recording.audio_filepath).name}"
            assert (recording.channel, recording.offset_s, recording.error) == (None, 0.0, None)
    again = units_of(path, 3.1)
    assert [(unit.key, [r.recording_id for r in unit.recordings]) for unit in again] == [
        (unit.key, [r.recording_id for r in unit.recordings]) for unit in units
    ]


def test_text_and_language_travel(tmp_path: Path) -> None:
    members = {"a.wav": wav(noise(0.2)), "a.json": b'{"text": "hello", "lang": "English"}', "b.wav": wav(noise(0.2))}
    (unit,) = units_of(write_tar(tmp_path / "t.tar", members), 100)
    assert [(r.text_ref, r.language) for r in unit.recordings] == [("hello", "English"), (None, None)]


@pytest.mark.usefixtures("plain_cut")
def test_a_long_recording_goes_on_in_the_next_part(tmp_path: Path) -> None:
    long, short = noise(10.0), noise(0.5, 1)
    path = write_tar(tmp_path / "t.tar", {"a.wav": wav(short), "long.m4a": wav(long), "z.wav": wav(short)})
    units = units_of(path, 2.0)  # a part holds at most 4 s
    assert names(units) == ["00000-000g", "00001-000p", "00001-001p", "00001-002g", "00002-000z"]
    assert [round(unit.audio_s, 1) for unit in units] == [0.5, 4.0, 4.0, 2.0, 0.5]
    assert np.array_equal(joined(units)[f"{path}/long.m4a"], long[:, 0])
    assert len(units[1].recordings[0].pcm) == 4 * SAMPLE_RATE_HZ - 100


@pytest.mark.usefixtures("plain_cut")
def test_a_part_ends_between_recordings_where_it_can(tmp_path: Path) -> None:
    audio = {f"{i}.flac": faint(1.9, i) for i in range(3)}
    path = write_tar(tmp_path / "t.tar", {name: flac(pcm) for name, pcm in audio.items()})
    units = units_of(path, 2.04)  # by their sizes they are one group; decoded, only two fit under 4.08 s
    assert names(units) == ["00000-000p", "00000-001z"]
    assert [len(unit.recordings) for unit in units] == [2, 1]
    assert {name[-6:]: pcm.tolist() for name, pcm in joined(units).items()} == {
        name: pcm[:, 0].tolist() for name, pcm in audio.items()
    }


def test_a_cut_lies_in_the_longest_pause(tmp_path: Path) -> None:
    rate = SAMPLE_RATE_HZ
    spoken = np.concatenate([pcm for _ in range(4) for pcm in (noise(1.6), np.zeros((rate * 4 // 10, 1), np.int16))])
    seen: list[tuple[int, int]] = []

    def loud(pcm: np.ndarray, threshold: float, min_silence_ms: int) -> list[tuple[int, int]]:
        seen.append((len(pcm), min_silence_ms))
        edges = np.flatnonzero(np.diff(np.concatenate([[0], (np.abs(pcm.astype(int)) > 0), [0]])))
        spans = [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
        return [spans[0]] + [span for span in spans[1:] if span[1] - span[0] > 100] if spans else []

    path = write_tar(tmp_path / "t.tar", {"a.flac": flac(spoken)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vad, "speech_spans", loud)
        units = units_of(path, 2.0)  # a part holds at most 4 s, and a cut may lie in its last 0.8 s
    assert np.array_equal(joined(units)[f"{path}/a.flac"], spoken[:, 0])
    assert seen[0] == (round(0.8 * rate), 100)
    first = len(units[0].recordings[0].pcm)
    assert 3.6 * rate < first < 4.0 * rate
    assert not spoken[first - 1_000 : first + 1_000].any()


@pytest.mark.usefixtures("plain_cut")
def test_channels_become_recordings(tmp_path: Path) -> None:
    stereo = noise(5.0, 3, channels=2)
    path = write_tar(tmp_path / "t.tar", {"call.wav": wav(stereo)})
    units = units_of(path, 2.0, channels="split")
    assert [unit.key.end for unit in units] == ["p", "p", "z"]
    assert all([r.channel for r in unit.recordings] == [0, 1] for unit in units)
    assert all(unit.audio_s <= 4.0 for unit in units)
    audio = joined(units)
    for channel in (0, 1):
        assert np.array_equal(audio[f"{path}/call.wav#ch{channel}"], stereo[:, channel])
    mixed = joined(units_of(path, 2.0))[f"{path}/call.wav"]
    assert np.abs(mixed - stereo.mean(axis=1)).max() <= 0.51


def test_a_recording_that_cannot_be_read_is_there_with_its_reason(tmp_path: Path) -> None:
    good, cut = wav(noise(1.0)), wav(noise(1.0))[:20_044]
    members = {"a.wav": b"", "b.mp3": b"no audio at all", "c.wav": cut, "d.txt": b"alone", "e.wav": good}
    (unit,) = units_of(write_tar(tmp_path / "t.tar", members), 100)
    found = {Path(r.recording_id).name: ((r.error or "").split(":")[0], len(r.pcm)) for r in unit.recordings}
    assert found == {
        "a.wav": ("empty_file", 0),
        "b.mp3": ("not_audio", 0),
        "c.wav": ("truncated", 10_000),
        "d": ("no_audio", 0),
        "e.wav": ("", 16_000),
    }


def test_a_missing_file_is_a_failed_recording_and_a_failing_store_is_not(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "gone.wav"}\n{"audio_filepath": "here.wav", "offset": 0.5}\n')
    (tmp_path / "here.wav").write_bytes(wav(noise(1.0)))
    (unit,) = units_of(tmp_path / "m.jsonl", 100)
    gone, here = unit.recordings
    assert gone.error is not None and gone.error.startswith(f"missing_file: {tmp_path}/gone.wav: no such file")
    assert (here.recording_id, here.offset_s) == (f"{tmp_path}/here.wav#t=0.5-", 0.5)
    assert np.array_equal(here.pcm, noise(1.0)[8_000:, 0])
    (tmp_path / "n.jsonl").write_text('{"audio_filepath": "nosuch://b/a.wav"}\n')
    with pytest.raises(StorageError, match="nosuch"):
        units_of(tmp_path / "n.jsonl", 100)


def test_an_empty_split_is_one_empty_unit(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", {})
    (unit,) = units_of(path, 100)
    assert (unit.recordings, unit.key.group, unit.key.part, unit.key.end) == ([], 0, 0, "z")
    assert units_of(path, 100, Done.of([unit.key])) == []


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the recordings opened from here on."""
    log: list[str] = []

    def logged(sample: Sample) -> Sample:
        real = sample.open
        assert real is not None

        def open_and_log() -> BinaryIO:
            log.append(Path(sample.recording_id).name)
            return real()  # type: ignore[return-value]

        sample.open = open_and_log
        return sample

    monkeypatch.setattr(read_module, "samples", lambda split, options: map(logged, samples(split, options)))
    return log


@pytest.mark.usefixtures("plain_cut")
def test_what_is_committed_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {f"{i}.wav": wav(noise(1.0, i)) for i in range(4)} | {"long.flac": flac(faint(5.2))}
    members |= {"x.flac": flac(faint(0.3)), "z.wav": wav(noise(2.0))}
    path = write_tar(tmp_path / "t.tar", members)
    every = units_of(path, 2.1)
    assert names(every) == ["00000-000g", "00001-000g", "00002-000p", "00002-001g", "00003-000z"]
    keys = [unit.key for unit in every]
    log = opened(monkeypatch)
    assert units_of(path, 2.1, Done.of(keys)) == []
    assert log == []
    for missing in (0, 1, len(keys) - 1):
        log.clear()
        (unit,) = units_of(path, 2.1, Done.of(key for key in keys if key != keys[missing]))
        assert unit.key == keys[missing]
        assert log == [Path(recording.recording_id).name for recording in unit.recordings]
    log.clear()
    first_part = UnitKey(keys[0].split_id, 2, 0, "p")
    (unit,) = units_of(path, 2.1, Done.of(key for key in keys if key != first_part))
    assert unit.key == first_part
    assert log == ["long.flac"]  # and not the recordings that share its group


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.floats(0.05, 3.0), st.booleans()), min_size=1, max_size=6),
    target_s=st.floats(0.2, 2.0),
    data=st.data(),
)
@pytest.mark.usefixtures("plain_cut")
def test_any_resume_yields_exactly_what_is_missing(
    lengths: list[tuple[float, bool]], target_s: float, data: st.DataObject, tmp_path: Path
) -> None:
    audio = {
        f"{i}.flac": faint(seconds, i) if is_faint else noise(seconds, i)
        for i, (seconds, is_faint) in enumerate(lengths)
    }
    path = write_tar(tmp_path / "t.tar", {name: flac(pcm) for name, pcm in audio.items()})
    every = units_of(path, target_s)
    assert Done.of(unit.key for unit in every).complete()
    assert all(unit.audio_s <= 2 * target_s for unit in every)
    assert {name.rsplit("/", 1)[1]: pcm.tobytes() for name, pcm in joined(every).items()} == {
        name: pcm.tobytes() for name, pcm in audio.items()
    }
    done = data.draw(st.sets(st.sampled_from([unit.key for unit in every])))
    missing = [unit for unit in every if unit.key not in done]
    again = units_of(path, target_s, Done.of(done))
    assert [unit.key for unit in again] == [unit.key for unit in missing]
    for unit, expected in zip(again, missing, strict=True):
        for recording, other in zip(unit.recordings, expected.recordings, strict=True):
            assert (recording.recording_id, recording.offset_s) == (other.recording_id, other.offset_s)
            assert np.array_equal(recording.pcm, other.pcm)


def test_the_split_may_travel(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.wav").write_bytes(wav(noise(1.0, i)))
    options = config(tmp_path, 2.1)
    splits = list(plan(options.inputs, {}, 2.1))
    units = [unit for split in splits for unit in read_units(Split.from_json(split.to_json()), Done(), options)]
    assert [unit.key.split_id for unit in units] == [split.split_id for split in splits]
    assert names(units) == ["00000-000z", "00000-000z"]
    assert [len(unit.recordings) for unit in units] == [2, 1]
