"""What befalls whole jobs: credentials that expire, a disk that fills up, two drivers at once, an output of another
configuration. Committed units stay, one line says what to do, and the same command ends with every row once."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pyarrow.dataset as ds
import pytest

from pipeline.config import TranscribeConfig
from tests import commands
from tests.conftest import make_config, write_tar
from tests.fault_proxy import FaultProxy, Refusal, Request, no_faults

NUM_CLIPS = 24
POISON = Path(__file__).parent / "poison"


@pytest.fixture
def inputs(tmp_path: Path) -> str:
    """Eight units of three clips."""
    for shard in range(2):
        write_tar(tmp_path / f"shard-{shard}.tar", [3.0] * (NUM_CLIPS // 2), prefix=f"s{shard}")
    return str(tmp_path / "shard-*.tar")


def recordings(output: str, **storage: Any) -> Counter[str]:
    """How many rows each recording has in an output, but for failed ones: there are none."""
    filesystem = fsspec.filesystem("s3", use_listings_cache=False, **storage) if storage else None
    folder = f"{output}/transcripts".removeprefix("s3://")
    rows = ds.dataset(folder, filesystem=filesystem).to_table(columns=["recording_id", "status"]).to_pylist()
    assert {row["status"] for row in rows} <= {"ok"}
    return Counter(row["recording_id"].rpartition("/")[2] for row in rows)


EVERY_ROW_ONCE = Counter(f"s{shard}-{clip:03d}.wav" for shard in range(2) for clip in range(NUM_CLIPS // 2))


@pytest.mark.usefixtures("local_ray")
def test_credentials_that_expire_midway_end_the_job_and_new_ones_go_on(
    inputs: str, s3_options: dict[str, dict[str, Any]], light_checkpoint: Path, tmp_path: Path
) -> None:
    endpoint = s3_options["s3"]["endpoint_url"]
    name = "expiring"
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=endpoint, **keys).create_bucket(Bucket=name)
    with FaultProxy(int(endpoint.rpartition(":")[2])) as proxy:
        access = {"options": {"s3": {"endpoint_url": proxy.url, "key": "AKIDEXPIRED", "secret": "y" * 20}}}
        config = make_config(inputs, f"s3://{name}/out", light_checkpoint, storage=access)

        def expire(request: Request) -> Refusal | None:
            return "expired" if proxy.requests["PUT"] > 5 else None

        proxy.plan = expire
        job = commands.run(config, tmp_path / "conf.yaml")
        assert job.exit_code == 1, job.output
        last = job.output.strip().splitlines()[-1]
        assert last.startswith("error: s3://expiring/") and "run the same command again with new ones" in last
        assert "AKIDEXPIRED" not in job.output and "Traceback" not in job.output
        proxy.plan = no_faults
        before = recordings(config.output, **s3_options["s3"])
        assert 0 < len(before) < NUM_CLIPS and set(before.values()) == {1}
        again = commands.run(config, tmp_path / "conf.yaml")
        assert again.exit_code == 0, again.output
    assert recordings(config.output, **s3_options["s3"]) == EVERY_ROW_ONCE


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system needs root and mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.usefixtures("local_ray")
def test_a_full_disk_ends_the_job_and_room_lets_it_go_on(
    inputs: str, small_disk: Path, light_checkpoint: Path, tmp_path: Path
) -> None:
    config = make_config(inputs, small_disk / "out", light_checkpoint)
    job = commands.run(config, tmp_path / "conf.yaml")
    assert job.exit_code == 1, job.output
    last = job.output.strip().splitlines()[-1]
    assert last.startswith(f"error: {small_disk}/out/") and "No space left on device" in last
    assert "MB are free there. Make room and run the same command again" in last and "Traceback" not in job.output
    left = [file.name for file in (small_disk / "out").rglob("*") if file.is_file()]
    assert not [name for name in left if "partial" in name], "nothing half written"
    before = recordings(config.output)
    assert 0 < len(before) < NUM_CLIPS and set(before.values()) == {1}, "what was committed stays"
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    again = commands.run(config, tmp_path / "conf.yaml")
    assert again.exit_code == 0, again.output
    assert recordings(config.output) == EVERY_ROW_ONCE


def test_two_drivers_on_one_output_at_once(inputs: str, light_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(inputs, tmp_path / "out", light_checkpoint)
    env = {"PYTHONPATH": str(POISON)}
    drivers = [commands.start(config, tmp_path / f"{name}.yaml", env=env) for name in "ab"]
    ends = [driver.communicate(timeout=240) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], ends
    assert recordings(config.output) == EVERY_ROW_ONCE
    for _, errors in ends:
        assert "8 committed of 8 planned (2 of 2 splits complete)" in errors and "nothing left to do" not in errors


@pytest.mark.usefixtures("local_ray")
def test_an_output_that_belongs_to_another_configuration(inputs: str, light_checkpoint: Path, tmp_path: Path) -> None:
    def job(**sections: Any) -> TranscribeConfig:
        return make_config(inputs, tmp_path / "out", light_checkpoint, **sections)

    assert commands.run(job(), tmp_path / "conf.yaml").exit_code == 0
    before = recordings(str(tmp_path / "out"))
    refused = commands.run(job(segmentation={"max_s": 20}), tmp_path / "conf.yaml")
    assert refused.exit_code == 2 and "holds results of another configuration" in refused.output
    assert "changed: segmentation.max_s" in refused.output and len(refused.output.strip().splitlines()) == 1
    assert recordings(str(tmp_path / "out")) == before == EVERY_ROW_ONCE
