"""The audio of segments, cut from the inputs again: the samples that the engine heard, in bounded memory."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pipeline.config import TranscribeConfig
from pipeline.export import rows as module
from pipeline.export.folder import Folder
from pipeline.export.rows import cut_recording
from pipeline.export.webdataset import WebdatasetWriter
from pipeline.read import read_units
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.segment import segment_unit
from pipeline.sources.plan import plan, samples
from pipeline.units import Done
from tests.engine.tiny import noise
from tests.export.inputs import export, make


@pytest.mark.parametrize(("suffix", "rate"), [("wav", 16_000), ("flac", 44_100), ("mp3", 22_050), ("ogg", 48_000)])
def test_segments_are_the_samples_that_the_engine_heard(tmp_path: Path, suffix: str, rate: int) -> None:
    left, right = noise(13, 1), noise(13, 2)
    stereo = np.stack([left, right], axis=1)[: 13 * 16_000]
    soundfile.write(tmp_path / f"call.{suffix}", stereo, rate)
    config = TranscribeConfig.model_validate(
        {
            "inputs": [str(tmp_path / f"call.{suffix}")],
            "output": "o",
            "audio": {"channels": "split"},
            "units": {"target_s": 3},
            "segmentation": {"policy": "fixed", "fixed_s": 1.7},
        }
    )
    (split,) = plan(config.inputs, {}, 1800)
    rows, heard = [], {}
    for unit in read_units(split, Done(), config):
        unit = segment_unit(unit, config.segmentation)
        for span in unit.spans:
            recording = unit.recordings[span.recording]
            start, end = span.bounds
            row = {
                "recording_id": recording.recording_id,
                "channel": recording.channel,
                "offset": recording.offset_s + start / SAMPLE_RATE_HZ,
                "duration": (end - start) / SAMPLE_RATE_HZ,
            }
            rows.append(row)
            heard[recording.channel, row["offset"]] = recording.pcm[start:end].copy()
    assert len(rows) >= 6
    (sample,) = samples(split, {})
    cut = list(cut_recording(sample, rows[::-1]))
    assert len(cut) == len(rows)
    for row, pcm in cut:
        np.testing.assert_array_equal(pcm, heard[row["channel"], row["offset"]])


def test_no_more_is_held_than_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour in blocks of a second, of which three segments are wanted."""
    decoded = 0

    def blocks(*_: Any) -> Iterator[np.ndarray]:
        nonlocal decoded
        for second in range(3600):
            decoded += 1
            yield np.full((SAMPLE_RATE_HZ, 1), second, np.int16)

    largest = 0
    concatenate = np.concatenate

    def spy(parts: Any) -> np.ndarray:
        nonlocal largest
        joined: np.ndarray = concatenate(parts)
        largest = max(largest, len(joined))
        return joined

    monkeypatch.setattr(module, "decode", blocks)
    monkeypatch.setattr(module.np, "concatenate", spy)
    sample = module.Sample("a", "a.wav", 3600.0, open=lambda: io.BytesIO())  # type: ignore[arg-type,return-value]
    rows = [
        {"recording_id": "a", "channel": None, "offset": offset, "duration": 20.0} for offset in (0.0, 900.5, 1800.0)
    ]
    cut = list(cut_recording(sample, rows))
    assert [set(pcm.tolist()) for _, pcm in cut] == [  # type: ignore[union-attr]
        set(range(20)), set(range(900, 921)), set(range(1800, 1820)),
    ]  # fmt: skip
    assert largest <= 22 * SAMPLE_RATE_HZ and decoded == 1821, "and nothing is decoded behind the last"


def test_what_can_not_be_read_any_more_is_left_out_and_counted(tmp_path: Path) -> None:
    output = make(tmp_path)
    long = tmp_path / "in" / "long.wav"
    whole = long.read_bytes()
    long.write_bytes(whole[: len(whole) // 2] + b"\0" * (len(whole) - len(whole) // 2))
    assert export(output, "webdataset", tmp_path / "same").exit_code == 0, "damage that nobody can tell"
    long.write_bytes(b"no audio at all".ljust(len(whole)))
    result = export(output, "webdataset", tmp_path / "wds")
    assert result.exit_code == 3 and "3 segments left out" in result.output and "not_audio" in result.output
    record = json.loads((tmp_path / "wds" / "export.json").read_text())
    assert (record["num_rows"], record["num_without_audio"]) == (1, 3)


def test_shards_are_bounded(tmp_path: Path) -> None:
    pcm = noise(2, 3)
    row = {"segment_id": "", "recording_id": "in/a.b.wav", "text": "t"}
    with Folder(str(tmp_path / "out"), {}, shard_bytes=70_000) as folder:
        writer = WebdatasetWriter(folder)
        for number in range(5):
            writer.add(row | {"segment_id": str(number)}, pcm)
        writer.close()
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("shard-*.tar"))]
    assert len(sizes) == 3 and max(sizes) < 150_000, "a shard ends after the segment that fills it"
