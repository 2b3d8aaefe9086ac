"""`shardscribe pseudolabel` on local Ray: the transcribe job with a second model, fitted thresholds, and filters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner, Result

from jobs.cli import app
from pipeline.output import RECORD_KEY, Output
from tests.conftest import make_config, write_tar

pytestmark = pytest.mark.usefixtures("local_ray")


def run(conf: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["pseudolabel", str(conf), *arguments])


@pytest.fixture
def conf(tmp_path: Path, light_checkpoint: Path) -> Path:
    """Three shards of two units each; a second model that is the first one again."""
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [4, 5, 3, 5], prefix=f"s{shard}")
    second = {"model": str(light_checkpoint)}
    config = make_config(str(tmp_path / "{0..2}.tar"), tmp_path / "out", light_checkpoint, agree_with=second)
    data = config.model_dump(mode="json")
    data["labels"] = {"calibrate": {"units": 2, "min_segments": 1}, "languages": {}}
    path = tmp_path / "conf.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def rows_of(output: Path) -> list[dict[str, Any]]:
    table = ds.dataset(output / "transcripts").to_table()
    return sorted(table.to_pylist(), key=lambda row: str(row["segment_id"]))


def test_the_job_from_the_sample_to_the_last_unit(conf: Path, tmp_path: Path, light_checkpoint: Path) -> None:
    out = tmp_path / "out"
    plan = run(conf, "--dry-run")
    assert plan.exit_code == 0 and "thresholds will be fitted" in plan.stdout and not out.exists()
    done = run(conf)
    assert done.exit_code == 0, done.output
    assert "a sample first, to fit thresholds on: 1 units of 2 of 3 splits" in done.output.replace("\n", " ")
    sampled = Output(str(out / "calibration"), {}).committed()
    assert len(sampled) == 2 and {key.group for each in sampled.values() for key in each.keys} == {0}
    fitted = yaml.safe_load((out / "calibration" / "thresholds.yaml").read_text())
    assert fitted["num_segments"] == {"English": 4} and fitted["languages"]["English"]["max_char_rate"] == 1.625

    resolved = yaml.safe_load((out / "shardscribe.yaml").read_text())
    assert resolved["config"]["labels"]["languages"] == fitted["languages"]
    assert resolved["agree_with_revision"] == resolved["model_revision"]
    rows = rows_of(out)
    assert len(rows) == 12 and {row["config_hash"] for row in rows} == {resolved["config_hash"]}
    for row in rows:
        assert (row["text"], row["agreement_text"], row["agreement_wer"]) == ("heard", "heard", 0.0)
        fast = row["char_rate"] > fitted["languages"]["English"]["max_char_rate"]
        assert row["filter_reasons"] == ["char_rate"] * fast + ["reference_mismatch"] and row["reference_wer"] == 1.0
    assert {row["duration"] for row in rows if "char_rate" in row["filter_reasons"]} == {3.0}
    files = sorted((out / "transcripts").iterdir())
    assert len(files) == 6
    record = json.loads(pq.read_metadata(files[0]).metadata[RECORD_KEY])
    assert record["agree_with"]["model_id"] == str(light_checkpoint) and "model_revision" in record["agree_with"]
    assert record["config"]["labels"]["languages"] == fitted["languages"]

    before = (out / "calibration" / "thresholds.yaml").read_bytes()
    files[0].unlink()
    again = run(conf)
    assert again.exit_code == 0 and "a sample first" not in again.output
    assert (out / "calibration" / "thresholds.yaml").read_bytes() == before
    assert [row["filter_reasons"] for row in rows_of(out)] == [row["filter_reasons"] for row in rows]
    assert "nothing left to do" in run(conf).output
    assert "thresholds are fitted" in run(conf, "--dry-run").stdout

    changed = run(conf, "--set", "labels.calibrate.units=3")
    assert changed.exit_code == 2 and "was fitted for another configuration" in changed.output.replace("\n", " ")


def test_a_fit_on_another_output(conf: Path, tmp_path: Path) -> None:
    first = run(conf, "--set", "labels.calibrate=null")
    assert first.exit_code == 0 and not (tmp_path / "out" / "calibration").exists()
    second = run(
        conf, "--set", f"output={tmp_path}/second", "--set", "labels.calibrate.units=1",
        "--set", f"labels.calibrate.output={tmp_path}/out",
    )  # fmt: skip
    assert second.exit_code == 0, second.output
    fitted = yaml.safe_load((tmp_path / "second" / "calibration" / "thresholds.yaml").read_text())
    assert fitted["sample"] == str(tmp_path / "out")
    assert [file.name for file in (tmp_path / "second" / "calibration").iterdir()] == ["thresholds.yaml"]
    assert len(rows_of(tmp_path / "second")) == 12
