"""The way back from a row to its audio, for every kind of source, and what is said when there is none."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.config import TranscribeConfig
from pipeline.report import audio as module
from pipeline.report.audio import Clip, read_clips
from pipeline.report.gather import Row
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.sources.plan import plan, samples
from tests.outputs import config

NUM_RECORDINGS = 3
SECONDS = 3


def tone_hz(recording: int, second: int) -> int:
    """Every second of every recording has a tone of its own."""
    return 300 + 400 * recording + 100 * second


def recording(number: int) -> np.ndarray:
    """float32 `[num_samples]`, a tone a second."""
    times = np.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    tones = [0.3 * np.sin(2 * np.pi * tone_hz(number, second) * times) for second in range(SECONDS)]
    return np.concatenate(tones).astype(np.float32)


def encoded(audio: np.ndarray, format: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, SAMPLE_RATE_HZ, format=format)
    return buffer.getvalue()


def write_tar(path: Path, names: list[str], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for number, name in enumerate(names):
            data = encoded(recording(number), "FLAC")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def make_inputs(folder: Path, kind: str) -> str:
    """Recordings 0, 1 and 2 as an input of `kind`; its path."""
    if kind in ("tar", "tar.gz"):
        path = folder / f"shard.{kind}"
        write_tar(path, [f"talk.tar/{i}.flac" for i in range(NUM_RECORDINGS)], "w:gz" if kind == "tar.gz" else "w")
        return str(path)
    if kind == "files":
        for i in range(NUM_RECORDINGS):
            (folder / f"{i} #1.ogg").write_bytes(encoded(recording(i), "OGG"))
        return str(folder)
    if kind == "parquet":
        audio = [{"bytes": encoded(recording(i)), "path": f"{i}.wav"} for i in range(NUM_RECORDINGS)]
        pq.write_table(pa.table({"audio": audio}), folder / "set.parquet", row_group_size=1)
        return str(folder / "set.parquet")
    long = np.concatenate([recording(i) for i in range(NUM_RECORDINGS)])
    (folder / "long.wav").write_bytes(encoded(long))
    lines = [{"audio_filepath": "long.wav", "offset": SECONDS * i, "duration": SECONDS} for i in range(NUM_RECORDINGS)]
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder / "set.jsonl")


def rows_of(job: TranscribeConfig, second: int = 1) -> list[Row]:
    """One row a recording: the given second of it, as the job's own reading would have named it."""
    found = []
    for split in plan(job.inputs, {}, job.units.target_s):
        for sample in samples(split, {}):
            number = len(found)
            found.append(
                Row(
                    unit=f"{split.split_id}-00000-000z", row=number, kind="kept", recording_id=sample.recording_id,
                    audio_filepath=sample.audio_filepath, channel=None, offset=sample.offset_s + second, duration=1.0,
                    text="", text_ref=None, language=None, avg_logprob=None, error=None, filter_reasons=[],
                )
            )  # fmt: skip
    return found


def heard_hz(clip: Clip) -> float:
    """The loudest frequency of a clip."""
    assert clip.ogg is not None, clip.note
    samples_, rate = soundfile.read(io.BytesIO(clip.ogg))
    return float(np.argmax(np.abs(np.fft.rfft(samples_))) * rate / len(samples_))


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "files", "parquet", "manifest"])
def test_a_row_is_heard_where_it_stands_in_its_recording(tmp_path: Path, kind: str) -> None:
    job = config(str(tmp_path / "out"), [make_inputs(tmp_path, kind)], units={"target_s": 4.0})
    rows = rows_of(job)
    clips = read_clips([rows[2], rows[0], rows[1]], job, {})
    assert [heard_hz(clip) for clip in clips] == pytest.approx([tone_hz(2, 1), tone_hz(0, 1), tone_hz(1, 1)], abs=5)
    assert all(soundfile.info(io.BytesIO(clip.ogg or b"")).duration == 1.0 and clip.note == "" for clip in clips)


def test_a_channel_is_heard_alone(tmp_path: Path) -> None:
    both = np.stack([recording(0), recording(2)], axis=1)
    (tmp_path / "call.wav").write_bytes(encoded(both))
    job = config(str(tmp_path / "out"), [str(tmp_path / "call.wav")], audio={"channels": "split"})
    (mixed,) = rows_of(job)
    rows = [replace(mixed, channel=c, recording_id=f"{mixed.recording_id}#ch{c}") for c in (0, 1, 2)]
    left, right, none = read_clips(rows, job, {})
    assert [heard_hz(left), heard_hz(right)] == pytest.approx([tone_hz(0, 1), tone_hz(2, 1)], abs=5)
    assert none == Clip(None, f"{tmp_path / 'call.wav'} has no channel 2 any more")


def test_only_the_recordings_asked_for_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = config(str(tmp_path / "out"), [make_inputs(tmp_path, "tar")])
    decoded = []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda *arguments: decoded.append(arguments[2:]) or decode(*arguments))
    (clip,) = read_clips([rows_of(job)[1]], job, {})
    assert decoded == [(1.0, 1.0)] and heard_hz(clip) == pytest.approx(tone_hz(1, 1), abs=5)


def test_a_long_segment_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CLIP_S", 1.5)
    job = config(str(tmp_path / "out"), [make_inputs(tmp_path, "files")])
    (clip,) = read_clips([replace(rows_of(job)[0], offset=0.0, duration=3.0)], job, {})
    assert clip.note == "the first 1.5 s of it" and soundfile.info(io.BytesIO(clip.ogg or b"")).duration == 1.5


def test_the_same_row_gives_the_same_bytes(tmp_path: Path) -> None:
    job = config(str(tmp_path / "out"), [make_inputs(tmp_path, "parquet")])
    assert read_clips(rows_of(job), job, {}) == read_clips(rows_of(job), job, {})


def test_what_has_no_audio_says_why(tmp_path: Path) -> None:
    job = config(str(tmp_path / "out"), [make_inputs(tmp_path, "tar")])
    first, second, third = rows_of(job)
    rows = [
        replace(first, duration=0.0, error="truncated: it ends"),
        replace(second, offset=500.0),
        replace(third, recording_id="another"),
        replace(third, unit="0" * 16 + "-00000-000z"),
        third,
    ]
    clips = read_clips(rows, job, {})
    assert [clip.note for clip in clips] == [
        "no audio was read of it",
        "no_samples: the file has no audio at 500 s",
        f"its recording is no longer in {tmp_path / 'shard.tar'}",
        "the inputs of the job do not hold it any more",
        "",
    ]
    assert [clip.ogg is None for clip in clips] == [True, True, True, True, False]


def test_an_input_that_is_gone_leaves_the_others_audible(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "there").mkdir()
    inputs = [make_inputs(tmp_path / "gone", "tar"), make_inputs(tmp_path / "there", "parquet")]
    job = config(str(tmp_path / "out"), inputs)
    rows = rows_of(job)
    (tmp_path / "gone" / "shard.tar").unlink()
    clips = read_clips([rows[0], rows[3]], job, {})
    assert clips[0].ogg is None and f"{tmp_path / 'gone' / 'shard.tar'}: no such file" in clips[0].note
    assert heard_hz(clips[1]) == pytest.approx(tone_hz(0, 1), abs=5)


def test_a_recording_that_went_bad_since_says_so(tmp_path: Path) -> None:
    job = config(str(tmp_path / "out"), [make_inputs(tmp_path, "files")])
    rows = rows_of(job)
    path = tmp_path / "0 #1.ogg"
    path.write_bytes(b"\x07" * path.stat().st_size)
    clips = read_clips(rows, job, {})
    assert clips[0].ogg is None and clips[0].note.startswith("not_audio: ")
    assert heard_hz(clips[1]) == pytest.approx(tone_hz(1, 1), abs=5)


def test_no_rows_need_no_inputs(tmp_path: Path) -> None:
    assert read_clips([], config(str(tmp_path), ["nowhere"]), {}) == []
