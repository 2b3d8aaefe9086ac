"""The whole job on local Ray: every input kind, the output's promises, resume, S3."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
from pathlib import Path
from typing import Any

import boto3
import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import soundfile
from rich.console import Console

from jobs import transcribe as job
from pipeline import graph, units
from pipeline.attempts import Ledger
from pipeline.config import ConfigError, TranscribeConfig
from pipeline.output import RECORD_KEY, Output
from pipeline.read import read_units
from pipeline.schema import SAMPLE_RATE_HZ, TRANSCRIPTS
from pipeline.segment import segment_unit
from pipeline.sources.plan import plan
from pipeline.summary import summarize
from pipeline.units import Done
from tests.conftest import make_config, write_tar
from tests.engine.tiny import noise

pytestmark = pytest.mark.usefixtures("local_ray")


def run(config: TranscribeConfig) -> int:
    return job.run(config, Console(quiet=True))


def rows_of(config: TranscribeConfig) -> list[dict[str, Any]]:
    output = Output(config.output, config.storage.options)
    return sorted(ds.dataset(output.transcripts_url).to_table().to_pylist(), key=lambda row: row["segment_id"])


def wav_bytes(seconds: float, seed: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, noise(seconds, seed), SAMPLE_RATE_HZ, format="WAV")
    return buffer.getvalue()


def test_tar_shards_become_rows_that_any_reader_sees_once(tmp_path: Path, tiny_checkpoint: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"shard-{shard}.tar", [3, 4, 5, 2, 6, 3], prefix=f"s{shard}")
    config = make_config(str(tmp_path / "shard-{0..1}.tar"), tmp_path / "out", tiny_checkpoint)
    assert run(config) == 0
    rows = rows_of(config)
    assert len(rows) == 12 and len({row["segment_id"] for row in rows}) == 12
    assert {row["text_ref"] for row in rows} == {f"reference {i}" for i in range(6)}
    assert sum(row["duration"] for row in rows) == pytest.approx(46)
    for row in rows:
        assert len(row["token_ids"]) == len(row["token_logprobs"]) > 0
        assert row["avg_logprob"] == pytest.approx(sum(row["token_logprobs"]) / len(row["token_logprobs"]), rel=1e-3)
        assert row["config_hash"] == config.result_hash() and row["engine"] == "offline"
    files = sorted((tmp_path / "out" / "transcripts").iterdir())
    assert len(files) > 2
    assert pq.read_schema(files[0]).remove_metadata().equals(TRANSCRIPTS)
    record = json.loads(pq.read_metadata(files[0]).metadata[RECORD_KEY])
    assert record["engine"]["model_revision"] and record["versions"]["torch"] and record["config"]["engine"]
    assert len(pd.read_parquet(tmp_path / "out" / "transcripts")) == 12
    assert duckdb.sql(f"SELECT count(*) FROM '{tmp_path}/out/transcripts/*.parquet'").fetchall() == [(12,)]

    before = {file.name: file.stat().st_mtime_ns for file in files}
    assert run(config) == 0, "a second run has nothing to do"
    assert {file.name: file.stat().st_mtime_ns for file in files} == before


def test_folder_parquet_and_manifest(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.wav").write_bytes(wav_bytes(3, i))
    (folder / "0.txt").write_text("from a sidecar")
    audio = [{"bytes": wav_bytes(2, i), "path": f"p{i}.wav"} for i in range(3)]
    pq.write_table(pa.table({"audio": audio, "text": ["a", "b", "c"]}), tmp_path / "set.parquet")
    lines = [{"audio_filepath": "folder/1.wav", "offset": i, "duration": 1.0, "text": f"part {i}"} for i in range(2)]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    inputs = [str(folder), str(tmp_path / "set.parquet"), str(tmp_path / "set.jsonl")]
    config = make_config(inputs, tmp_path / "out", tiny_checkpoint)
    assert run(config) == 0
    rows = rows_of(config)
    assert len(rows) == 8
    by_reference = {row["text_ref"]: row for row in rows if row["text_ref"]}
    assert by_reference.keys() == {"from a sidecar", "a", "b", "c", "part 0", "part 1"}
    assert by_reference["part 1"]["offset"] == 1.0 and by_reference["part 1"]["duration"] == 1.0


def test_call_channels_are_recordings_of_their_own(tmp_path: Path, tiny_checkpoint: Path) -> None:
    stereo = [[int(a), int(b)] for a, b in zip(noise(2, 1), noise(2, 2), strict=True)]
    soundfile.write(tmp_path / "call.wav", pd.DataFrame(stereo).to_numpy("int16"), SAMPLE_RATE_HZ)
    config = make_config(str(tmp_path / "call.wav"), tmp_path / "out", tiny_checkpoint, audio={"channels": "split"})
    assert run(config) == 0
    rows = rows_of(config)
    assert [row["channel"] for row in rows] == [0, 1]
    assert len({row["recording_id"] for row in rows}) == 2 and len({row["audio_filepath"] for row in rows}) == 1


def test_a_recording_that_cannot_be_read_is_a_row_and_exit_code_3(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.wav").write_bytes(wav_bytes(2, 1))
    (folder / "bad.wav").write_bytes(b"this is no audio at all")
    config = make_config(str(folder), tmp_path / "out", tiny_checkpoint)
    assert run(config) == 3
    bad, good = rows_of(config)
    assert bad["status"] == "failed" and bad["error"].startswith("not_audio: ") and not bad["keep"]
    assert bad["filter_reasons"] == ["failed"] and good["status"] != "failed"
    summary = summarize(Output(config.output, {}))
    assert summary.errors == {"not_audio": 1} and summary.is_complete and summary.num_recordings == 2


def test_long_recording_is_cut_in_windows_and_units_without_a_gap(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "long.wav").write_bytes(wav_bytes(70, 3))
    config = make_config(
        str(tmp_path / "long.wav"), tmp_path / "out", tiny_checkpoint, segmentation={"min_s": 3, "max_s": 8}
    )
    assert run(config) == 0
    rows = sorted(rows_of(config), key=lambda row: row["offset"])
    assert len({row["unit_id"] for row in rows}) > 2, "more than twice the 10 s target takes several units"
    assert len({row["recording_id"] for row in rows}) == 1
    end = 0.0
    for row in rows:
        assert row["offset"] == pytest.approx(end, abs=1e-6) and row["duration"] <= 8.0
        end = row["offset"] + row["duration"]
    assert end == pytest.approx(70.0)
    assert summarize(Output(config.output, {})).num_recordings == 1, "counted once, not once a unit"


def test_read_runs_outside_the_engine_actors(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_tar(tmp_path / "a.tar", [2, 2])
    config = make_config(str(tmp_path / "a.tar"), tmp_path / "out", tiny_checkpoint)
    splits = list(plan(config.inputs, {}, config.units.target_s))
    operators = _operators(graph.dataset(splits, {}, config, "run", Ledger()))
    assert operators == ["InputDataBuffer", "TaskPoolMapOperator", "ActorPoolMapOperator"]


def test_an_engine_reads_audio_where_ray_holds_it(tmp_path: Path) -> None:
    """Not a copy of it: the samples lie in the object store's shared memory."""
    import ray.data

    write_tar(tmp_path / "a.tar", [4, 4])
    config = make_config(str(tmp_path / "a.tar"), tmp_path / "out", tmp_path)
    (split,) = plan(config.inputs, {}, config.units.target_s)
    (unit,) = read_units(split, Done(), config)

    def read(_: pa.Table) -> pa.Table:
        return units.to_table(unit)

    def find(table: pa.Table) -> pa.Table:
        found = []
        for recording in units.from_table(table).recordings:
            address = recording.pcm.__array_interface__["data"][0]
            for line in Path("/proc/self/maps").read_text().splitlines():
                begin, _, end = line.split()[0].partition("-")
                if int(begin, 16) <= address < int(end, 16):
                    found.append(line)
        return pa.table({"mapping": found})

    one = ray.data.from_items([{"id": 0}]).map_batches(read, batch_format="pyarrow", num_cpus=1)
    two = one.map_batches(find, batch_size=1, batch_format="pyarrow", num_cpus=0.5)
    mappings = [row["mapping"] for row in two.take_all()]
    assert len(mappings) == 2 and all("plasma" in mapping or "/dev/shm" in mapping for mapping in mappings), mappings


def test_a_unit_keeps_its_place_in_an_engine_until_it_is_committed(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_tar(tmp_path / "a.tar", [2, 2])
    config = make_config(str(tmp_path / "a.tar"), tmp_path / "out", tiny_checkpoint)
    (split,) = plan(config.inputs, {}, config.units.target_s)
    (unit,) = read_units(split, Done(), config)
    table = units.to_table(segment_unit(unit, config.segmentation))

    async def work() -> list[dict[str, Any]]:
        return [row async for row in graph._EngineActor(config, Ledger(), "run")(table)]

    (row,) = asyncio.run(work())
    (done,) = Output(config.output, {}).committed().values()
    assert [key.name for key in done.keys] == [pickle.loads(row["receipt"][0]).unit]


def _operators(dataset: Any) -> list[str]:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor  # noqa: F401
    from ray.data._internal.logical.optimizers import get_execution_plan

    operator = get_execution_plan(dataset._logical_plan)[0].dag
    names = []
    while True:
        names.append(type(operator).__name__)
        if not operator.input_dependencies:
            return names[::-1]
        (operator,) = operator.input_dependencies


def test_another_configuration_or_other_inputs_refuse_the_output(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_tar(tmp_path / "a.tar", [2, 2])
    config = make_config(str(tmp_path / "a.tar"), tmp_path / "out", tiny_checkpoint)
    assert run(config) == 0
    other = make_config(str(tmp_path / "a.tar"), tmp_path / "out", tiny_checkpoint, labels={"max_char_rate": 1.0})
    with pytest.raises(ConfigError, match=r"changed: labels\.max_char_rate"):
        run(other)
    write_tar(tmp_path / "a.tar", [2, 2, 2])
    with pytest.raises(ConfigError, match="inputs have changed"):
        run(config)
    faster = make_config(str(tmp_path / "b.tar"), tmp_path / "out", tiny_checkpoint, ray={"units_in_flight": 3})
    assert faster.result_hash() == config.result_hash()


def test_a_missing_unit_is_done_again_and_only_that(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_tar(tmp_path / "a.tar", [4, 4, 4, 4, 4, 4])
    config = make_config(str(tmp_path / "a.tar"), tmp_path / "out", tiny_checkpoint)
    assert run(config) == 0
    before = rows_of(config)
    files = sorted((tmp_path / "out" / "transcripts").iterdir())
    assert len(files) == 3
    files[1].unlink()
    summary = summarize(Output(config.output, {}))
    assert not summary.is_complete and summary.units_committed == 2 and summary.eta_s is not None
    assert run(config) == 0
    after = rows_of(config)
    assert [(row["segment_id"], row["text_raw"]) for row in after] == [(r["segment_id"], r["text_raw"]) for r in before]
    assert len({row["run_id"] for row in after}) == 2


def test_s3_in_and_out(tmp_path: Path, tiny_checkpoint: Path, s3_options: dict[str, dict[str, Any]]) -> None:
    options = s3_options["s3"]
    client = boto3.client(
        "s3",
        endpoint_url=options["endpoint_url"],
        aws_access_key_id=options["key"],
        aws_secret_access_key=options["secret"],
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="pipeline")
    for shard in range(2):
        path = write_tar(tmp_path / f"{shard}.tar", [3, 4, 5], prefix=f"s{shard}")
        client.upload_file(str(path), "pipeline", f"in/x-{shard:05d}.tar")
    config = make_config(
        "s3://pipeline/in/x-{00000..00001}.tar", "s3://pipeline/out", tiny_checkpoint, storage={"options": s3_options}
    )
    assert run(config) == 0
    keys = [item["Key"] for item in client.list_objects_v2(Bucket="pipeline", Prefix="out/")["Contents"]]
    objects = [key for key in keys if key.endswith(".parquet")]
    tables = [
        pq.read_table(io.BytesIO(client.get_object(Bucket="pipeline", Key=key)["Body"].read())) for key in objects
    ]
    rows = pa.concat_tables(tables).to_pylist()
    assert len(rows) == 6 and len({row["segment_id"] for row in rows}) == 6
    assert all(row["audio_filepath"].startswith("s3://pipeline/in/x-0000") for row in rows)
    written = client.get_object(Bucket="pipeline", Key="out/shardscribe.yaml")["Body"].read().decode()
    assert "secret" not in written, "storage options stay out of the output"
    assert run(config) == 0, "nothing left to do"
