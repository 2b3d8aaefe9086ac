"""The main job with the engine of streams: recordings are streams, its segments are rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from rich.console import Console

from jobs import transcribe as job
from pipeline.config import ConfigError, TranscribeConfig, validate
from pipeline.engine.causal.engine import CausalEngine
from pipeline.engine.causal.weights import save_tower
from pipeline.engine.checkpoint import CheckpointError
from pipeline.output import Output
from pipeline.schema import Hypothesis, Segment
from pipeline.text import units
from tests.conftest import write_tar
from tests.engine.causal.test_engine import STREAMS
from tests.engine.causal.upstream import tower_of
from tests.engine.tiny import noise, segment


def config_of(model: Path, folder: Path, tower: str = "offline", **engine: Any) -> TranscribeConfig:
    options = {"name": "causal", "model": str(model), "tower": tower, "dtype": "float32", "streams": STREAMS}
    data = {
        "inputs": [str(folder / "*.tar")],
        "output": str(folder / "out"),
        "segmentation": {"policy": "stream"},
        "engine": options | engine,
        "ray": {"num_cpus": 1},
    }
    return validate(TranscribeConfig, data, "test")


def rows_of(config: TranscribeConfig) -> list[dict[str, Any]]:
    table = ds.dataset(Output(config.output, {}).transcripts_url).to_table()
    return sorted(table.to_pylist(), key=lambda row: (row["recording_id"], row["offset"]))


@pytest.mark.usefixtures("local_ray")
def test_recordings_are_streams_and_rows_their_segments(tmp_path: Path, tiny_checkpoint: Path) -> None:
    seconds = [9, 3, 14, 1]
    write_tar(tmp_path / "a.tar", seconds, prefix="a")
    config = config_of(tiny_checkpoint, tmp_path)
    assert job.run(config, Console(quiet=True)) == 0
    found = rows_of(config)
    assert len({row["recording_id"] for row in found}) == 4 and len(found) > 8
    engine = CausalEngine(config.engine)
    for recording in sorted({row["recording_id"] for row in found}):
        mine = [row for row in found if row["recording_id"] == recording]
        length = sum(row["duration"] for row in mine)
        assert length == pytest.approx(min(seconds, key=lambda each: abs(each - length)))
        assert [row["offset"] for row in mine[1:]] == pytest.approx([r["offset"] + r["duration"] for r in mine[:-1]])
        for row in mine:
            assert row["engine"] == "causal" and row["keep"] in (True, False)
            latencies = row["commit_latencies"] or []
            assert len(latencies) == len(units(row["text"])) and all(each >= 0 for each in latencies)
    engine.close()
    before = found
    assert job.run(config, Console(quiet=True)) == 0 and rows_of(config) == before


def test_the_engine_tiles_recordings_and_says_what_submit_says(tiny_checkpoint: Path, tmp_path: Path) -> None:
    engine = CausalEngine(config_of(tiny_checkpoint, tmp_path).engine)
    recordings = [segment(each, i) for i, each in enumerate((7.3, 0.0, 0.01, 21.0))]
    parts, whole = engine.stream(recordings).result(60), engine.submit(recordings).result(60)
    engine.close()
    for recording, heard, one in zip(recordings, parts, whole, strict=True):
        assert heard[0].start == 0 and heard[-1].end == len(recording.pcm)
        assert [each.start for each in heard[1:]] == [each.end for each in heard[:-1]]
        texts = [each.result.text for each in heard if isinstance(each.result, Hypothesis)]
        assert len(texts) == len(heard) and isinstance(one, Hypothesis)
        assert "".join(" ".join(texts).split()) == "".join(one.text.split())


def test_languages_that_a_tower_was_not_trained_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tower = tmp_path / "tower.safetensors"
    save_tower(tower_of(tiny_checkpoint), tower, {"languages": "English,Vietnamese"})
    with pytest.raises(CheckpointError, match=r"Chinese is none of the languages .*\(English, Vietnamese\)"):
        CausalEngine(config_of(tiny_checkpoint, tmp_path, str(tower), language="Chinese").engine)
    asked = [Segment("a", noise(3.0, 1), "English"), Segment("b", noise(3.0, 2), "Chinese")]
    engine = CausalEngine(config_of(tiny_checkpoint, tmp_path, str(tower)).engine)
    assert engine.info.model_revision.count("+tower@") == 1
    english, chinese = engine.submit(asked).result(60)
    ((refused,),) = engine.stream(asked[1:]).result(60)
    engine.close()
    assert isinstance(english, Hypothesis)
    for each in (chinese, refused.result):
        assert str(each).startswith("unsupported_language: Chinese is none") and "--force" in str(each)
    forced = CausalEngine(config_of(tiny_checkpoint, tmp_path, str(tower), untrained_languages=True).engine)
    assert all(isinstance(each, Hypothesis) for each in forced.submit(asked).result(60))
    forced.close()


def test_an_output_knows_its_tower(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tower = tmp_path / "tower.safetensors"
    save_tower(tower_of(tiny_checkpoint), tower, {"languages": "English"})
    config = config_of(tiny_checkpoint, tmp_path, str(tower))
    output = Output(config.output, {})
    job.claim(output, config)
    job.claim(output, config)
    job.claim(output, config_of(tiny_checkpoint, tmp_path, str(tower), slots=3))  # which changes no text
    save_tower(tower_of(tiny_checkpoint), tower, {"languages": "Chinese"})
    with pytest.raises(ConfigError, match="the weights in"):
        job.claim(output, config)


def test_mistakes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for engine, message in (
        ({"tower": None}, "engine.name: causal needs one"),
        ({"aligner": "x"}, "causal writes no word times"),
        ({"top_logprobs": 8}, "label with offline"),
        ({"name": "offline"}, "is of engine.name: causal, not of offline"),
        ({"streams": {"block_frames": 100}}, "multiple of 8"),
        ({"streams": {"left_steps": 3}}, "must hold a block"),
        ({"streams": {"max_waiting_s": 3}}, "must hold two blocks"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_of(tiny_checkpoint, tmp_path, **engine)
    with pytest.raises(ConfigError, match="segmentation.policy: stream belongs to engine.name: causal"):
        validate(TranscribeConfig, {"inputs": ["a"], "output": "b", "segmentation": {"policy": "stream"}}, "test")
    with pytest.raises(CheckpointError, match="no file or folder on this machine and no Hub id"):
        CausalEngine(config_of(tiny_checkpoint, tmp_path, "embedded/nothing").engine)
