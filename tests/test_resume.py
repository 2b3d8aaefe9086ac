"""Kill the driver in the middle of a job and run the same command again: every segment exactly once, the same texts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from jobs import transcribe as job
from pipeline.config import TranscribeConfig
from pipeline.output import RECORD_KEY
from tests.conftest import make_config, write_tar

NUM_CLIPS = 60
ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(tmp_path: Path, tiny_checkpoint: Path) -> TranscribeConfig:
    """Twenty units of three clips, decoded one by one, so that there is a middle to be killed in."""
    for shard in range(2):
        write_tar(tmp_path / f"shard-{shard}.tar", [3.0] * (NUM_CLIPS // 2), prefix=f"s{shard}")
    engine = {"model": str(tiny_checkpoint), "max_new_tokens": 40, "batch_size": 1}
    return make_config(str(tmp_path / "shard-*.tar"), tmp_path / "out", tiny_checkpoint, engine=engine)


def start(config: TranscribeConfig) -> subprocess.Popen[str]:
    """The command line as a user runs it, with a Ray of its own."""
    path = Path(config.output).with_name("conf.yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-c", "from jobs.cli import app; app()", "transcribe", str(path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def units(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.parquet")}


def wait_for_units(folder: Path, count: int, driver: subprocess.Popen[str], limit_s: float = 120) -> None:
    began = time.monotonic()
    while len(units(folder)) < count:
        assert driver.poll() is None, f"the driver ended early: {driver.communicate()[1]}"
        assert time.monotonic() - began < limit_s, "no units in time"
        time.sleep(0.02)


def rows(folder: Path) -> list[tuple[Any, ...]]:
    columns = ["segment_id", "text_raw", "token_ids", "offset", "duration", "unit_id"]
    table = ds.dataset(folder).to_table(columns=columns).to_pylist()
    return sorted(tuple(map(str, row.values())) for row in table)


@pytest.mark.usefixtures("local_ray")
def test_sigkill_of_the_driver_then_resume(config: TranscribeConfig, tmp_path: Path) -> None:
    transcripts = tmp_path / "out" / "transcripts"
    killed = start(config)
    wait_for_units(transcripts, 3, killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    time.sleep(3)  # what was in flight may still commit; Ray's processes notice that their driver is gone
    before = units(transcripts)
    assert 3 <= len(before) < 20, "killed in the middle"
    during = ds.dataset(transcripts).to_table(columns=["segment_id"]).to_pylist()
    assert len({row["segment_id"] for row in during}) == len(during), "readers see each segment once, also in between"

    resumed = start(config)
    _, errors = resumed.communicate(timeout=180)
    assert resumed.returncode == 0, errors
    after = units(transcripts)
    assert before <= after and len(after) == 20

    undisturbed = config.model_copy(update={"output": str(tmp_path / "undisturbed")})
    assert job.run(undisturbed, Console(quiet=True)) == 0
    expected = rows(tmp_path / "undisturbed" / "transcripts")
    assert rows(transcripts) == expected, "ids, texts and units of an undisturbed run"
    assert len({row[0] for row in expected}) == NUM_CLIPS

    runs = [json.loads(pq.read_metadata(transcripts / name).metadata[RECORD_KEY])["run_id"] for name in after]
    assert len(set(runs)) == 2 and runs.count(max(runs)) == 20 - len(before), "only what was missing was done again"
    print(f"planned 20, committed before the kill {len(before)}, done after it {20 - len(before)}, lost 0, doubled 0")


def test_ctrl_c_says_how_to_go_on(config: TranscribeConfig, tmp_path: Path) -> None:
    driver = start(config)
    wait_for_units(tmp_path / "out" / "transcripts", 1, driver)
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 130, errors
    assert "run the same command again" in errors and "Traceback" not in errors
