"""Each format read back by the library that it is for."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config import InputConfig
from pipeline.output import Output
from pipeline.schema import SAMPLE_RATE_HZ, TRANSCRIPTS
from pipeline.sources.plan import plan, samples
from tests.export.inputs import export, make, samples_of, segments_of


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return make(tmp_path)


@pytest.fixture
def long(tmp_path: Path) -> Path:
    return tmp_path / "in" / "long.wav"


def pcm_of(flac: bytes) -> np.ndarray:
    pcm, rate = soundfile.read(io.BytesIO(flac), dtype="int16")
    assert rate == SAMPLE_RATE_HZ
    return pcm


def test_hf_loads_in_datasets(output: Output, tmp_path: Path, long: Path) -> None:
    datasets = pytest.importorskip(
        "datasets", reason="datasets: pip install --no-deps datasets multiprocess dill xxhash"
    )
    assert export(output, "hf", tmp_path / "hf").exit_code == 0
    loaded = datasets.load_dataset(str(tmp_path / "hf"), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded.features["audio"], datasets.Audio) and loaded.features["audio"].sampling_rate == 16_000
    rows = list(loaded.cast_column("audio", datasets.Audio(decode=False)))
    assert sorted(row["segment_id"] for row in rows) == segments_of(output) and len(rows) == 4
    by_text = {row["text"]: row for row in rows}
    np.testing.assert_array_equal(pcm_of(by_text["Part 3.25."]["audio"]["bytes"]), samples_of(long, 3.25, 2.5))
    assert by_text["xin chào"]["language"] == "Vietnamese" and by_text["Part 0."]["filter_reasons"] == []
    assert by_text["Part 0."]["model_id"] == "embedded/student" and by_text["Part 0."]["offset"] == 0.0


def test_lhotse_cuts_load_in_lhotse(output: Output, tmp_path: Path, long: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    assert export(output, "lhotse", tmp_path / "lhotse", "--all").exit_code == 0
    cuts = list(lhotse.CutSet.from_shar(in_dir=str(tmp_path / "lhotse" / "shar")))
    assert sorted(cut.supervisions[0].custom["segment_id"] for cut in cuts) == segments_of(output, only_kept=False)
    (cut,) = [cut for cut in cuts if cut.supervisions[0].text == "Part 3.25."]
    audio = cut.load_audio()
    assert audio.shape == (1, 40_000) and cut.duration == 2.5 and cut.sampling_rate == SAMPLE_RATE_HZ
    np.testing.assert_array_equal(np.rint(audio[0] * 32768), samples_of(long, 3.25, 2.5))
    assert cut.supervisions[0].language == "English" and cut.supervisions[0].custom["offset"] == 3.25
    lhotse.CutSet.from_cuts(cuts).describe()


def test_webdataset_loads_in_webdataset(output: Output, tmp_path: Path, long: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    assert export(output, "webdataset", tmp_path / "wds").exit_code == 0
    shards = [str(path) for path in sorted((tmp_path / "wds").glob("*.tar"))]
    rows = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert sorted(json.loads(row["json"])["segment_id"] for row in rows) == segments_of(output)
    by_text = {row["txt"].decode(): row for row in rows}
    np.testing.assert_array_equal(pcm_of(by_text["Part 5.75."]["flac"]), samples_of(long, 5.75))
    assert json.loads(by_text["xin chào"]["json"])["avg_logprob"] is None, "what is not finite is no JSON"


def test_webdataset_is_an_input_of_ours(output: Output, tmp_path: Path) -> None:
    export(output, "webdataset", tmp_path / "wds")
    (split,) = plan([InputConfig(path=str(tmp_path / "wds/*.tar"))], {}, 1800)
    assert {sample.text_ref for sample in samples(split, {})} == {"xin chào", "Part 0.", "Part 3.25.", "Part 5.75."}


def test_nemo_lines_of_files_point_at_them(output: Output, tmp_path: Path, long: Path) -> None:
    refused = export(output, "nemo", tmp_path / "nemo")
    assert refused.exit_code == 2 and "lies inside another file; export with --audio copy" in refused.output
    assert export(output, "nemo", tmp_path / "en", "--language", "en").exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "en" / "manifest_0.json").read_text().splitlines()]
    assert [(line["offset"], line["duration"], line["text"], line["lang"]) for line in lines] == [
        (0.0, 3.25, "Part 0.", "English"), (3.25, 2.5, "Part 3.25.", "English"), (5.75, 3.25, "Part 5.75.", "English"),
    ]  # fmt: skip
    assert {line["audio_filepath"] for line in lines} == {str(long)}
    (split,) = plan([InputConfig(path=str(tmp_path / "en/manifest_0.json"), kind="manifest")], {}, 1800)
    read = [(sample.offset_s, sample.duration_s, sample.text_ref) for sample in samples(split, {})]
    assert read == [(line["offset"], line["duration"], line["text"]) for line in lines], "our own reader of manifests"


def test_nemo_copies_are_a_tarred_data_set(output: Output, tmp_path: Path, long: Path) -> None:
    assert export(output, "nemo", tmp_path / "nemo", "--audio", "copy").exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "nemo" / "manifest_0.json").read_text().splitlines()]
    with tarfile.open(tmp_path / "nemo" / "audio_0.tar") as tar:
        audio = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert list(audio) == [line["audio_filepath"] for line in lines], "in the same order"
    (line,) = [line for line in lines if line["text"] == "Part 0."]
    assert (line["offset"], line["duration"]) == (0.0, 3.25)
    np.testing.assert_array_equal(pcm_of(audio[line["audio_filepath"]]), samples_of(long, 0.0, 3.25))


def test_jsonl_has_every_column_of_every_row(output: Output, tmp_path: Path) -> None:
    assert export(output, "jsonl", tmp_path / "jsonl").exit_code == 0
    rows = pd.read_json(tmp_path / "jsonl" / "transcripts-00000.jsonl", lines=True)
    assert list(rows.columns) == TRANSCRIPTS.names and len(rows) == 7
    assert sorted(rows["status"]) == ["empty", "failed", *["ok"] * 5]
    assert export(output, "jsonl", tmp_path / "kept", "--keep-only").exit_code == 0
    assert len(pd.read_json(tmp_path / "kept" / "transcripts-00000.jsonl", lines=True)) == 4


def test_the_record_says_what_was_exported(output: Output, tmp_path: Path) -> None:
    result = export(output, "webdataset", tmp_path / "wds", "--language", "vi")
    assert "1 segments, 2 s" in result.output
    record: dict[str, Any] = json.loads((tmp_path / "wds" / "export.json").read_text())
    assert record["num_rows"] == 1 and record["audio_s"] == 2.0 and record["is_complete"] and record["only_kept"]


@pytest.mark.parametrize(
    ("to", "arguments", "message"),
    [
        ("kaldi", [], "--to kaldi: known are nemo, hf, lhotse, webdataset, srt, vtt, jsonl"),
        ("hf", ["--audio", "reference"], "--audio reference: hf knows copy"),
        ("jsonl", ["--language", "Klingon"], "--language Klingon: known are Arabic"),
    ],
)
def test_mistakes(output: Output, tmp_path: Path, to: str, arguments: list[str], message: str) -> None:
    result = export(output, to, tmp_path / "x", *arguments)
    assert result.exit_code == 2 and message in result.output and not (tmp_path / "x").exists()


def test_a_folder_with_files_is_refused(output: Output, tmp_path: Path) -> None:
    assert export(output, "jsonl", tmp_path / "x").exit_code == 0
    again = export(output, "jsonl", tmp_path / "x")
    assert again.exit_code == 2 and "holds files already" in again.output


def test_export_to_object_storage(output: Output, tmp_path: Path, s3_options: dict[str, dict[str, Any]]) -> None:
    import boto3
    import yaml

    options = s3_options["s3"]
    keys = {"aws_access_key_id": options["key"], "aws_secret_access_key": options["secret"]}
    client = boto3.client("s3", endpoint_url=options["endpoint_url"], region_name="us-east-1", **keys)
    client.create_bucket(Bucket="exports")
    conf = tmp_path / "conf.yaml"
    conf.write_text(yaml.safe_dump({"inputs": ["a"], "output": "b", "storage": {"options": s3_options}}))
    arguments = ["export", output.url, "--to", "hf", "--out", "s3://exports/hf", "--conf", str(conf)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    names = [item["Key"] for item in client.list_objects_v2(Bucket="exports")["Contents"]]
    assert names == ["hf/README.md", "hf/data/train-00000.parquet", "hf/export.json"]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "holds files already" in again.output
