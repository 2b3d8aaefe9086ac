"""Recordings that kill the process that reads or hears them, in a whole job on Ray."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow.dataset as ds
import pytest
import soundfile

from pipeline.attempts import CRASHED
from pipeline.schema import SAMPLE_RATE_HZ
from tests import commands
from tests.conftest import make_config
from tests.engine.tiny import noise


def shard(path: Path, names: list[str]) -> Path:
    """A second of noise under each name; `poison-<way>` kills who reads it, `deaf-<way>` who hears it."""
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            buffer = io.BytesIO()
            soundfile.write(buffer, noise(1.0, seed=number), SAMPLE_RATE_HZ, format="WAV")
            data = buffer.getvalue()
            if name.startswith("poison-"):
                data += f"POISON:{name.removeprefix('poison-')}".encode()
            info = tarfile.TarInfo(f"{name}.wav")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.usefixtures("local_ray")
def test_what_kills_its_process_fails_and_everything_else_is_done_once(tmp_path: Path, light_checkpoint: Path) -> None:
    deadly = {
        "read": ["poison-segfault", "poison-endless"],
        "heard": ["deaf-segfault", "deaf-endless"],
        "healthy": [],
    }
    healthy = [f"good-{i}" for i in range(4)]
    for name, poisons in deadly.items():
        mixed = [each for pair in zip(healthy, [*poisons, *[""] * 4], strict=False) for each in pair if each]
        shard(tmp_path / f"{name}.tar", [*mixed, *healthy[4:]])
    config = make_config(
        str(tmp_path / "*.tar"),
        tmp_path / "out",
        light_checkpoint,
        units={"target_s": 3},
        engine={"model": str(light_checkpoint), "stall_timeout_s": 3.0},
        ray={"read_stall_timeout_s": 3.0},
    )
    job = commands.run(config, tmp_path / "conf.yaml")
    assert job.exit_code == 3, job.output
    rows = ds.dataset(tmp_path / "out" / "transcripts").to_table().to_pylist()
    found = Counter(row["audio_filepath"].removeprefix(f"{tmp_path}/") for row in rows)
    expected = [f"{name}.tar/{each}.wav" for name, poisons in deadly.items() for each in [*healthy, *poisons]]
    assert found == Counter(expected), "each recording is one row"
    for row in rows:
        if "good-" in row["audio_filepath"]:
            assert (row["status"], row["text"]) == ("ok", "heard")
        else:
            assert (row["status"], row["error"]) == ("failed", f"crashed_process: {CRASHED}")
    assert "4 crashed_process" in job.output and "Traceback" not in job.output
