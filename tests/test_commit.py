"""A unit's one object: its rows, its record, and that it is there whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline.commit import VERSIONED, Receipt, commit_unit
from pipeline.config import TranscribeConfig
from pipeline.output import RECORD_KEY, Output
from pipeline.schema import LOGITS, TRANSCRIPTS
from pipeline.units import TranscribedUnit, UnitKey
from tests import rows

KEY = UnitKey("a" * 16, 2, 1, "g")
CONFIG = TranscribeConfig.model_validate({"inputs": ["a.tar"], "output": "out", "engine": {"context": "hotword"}})


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(str(tmp_path), {})


def example() -> TranscribedUnit:
    return rows.unit(
        KEY,
        rows.segment("one", 0.0, "hello there"),
        rows.segment("one", 2.0, "", language=""),
        rows.segment("two", 0.0, "chào", language="Vietnamese", duration=3.0),
        rows.failed("two", "truncated: WAV breaks: near 3 s", offset=3.0),
        rows.failed("three", "not_audio: no"),
    )


def commit(output: Output, unit: TranscribedUnit, run_id: str = "run-1") -> Receipt:
    return commit_unit(output, unit, rows.labels_of(unit), CONFIG, run_id)


def with_likeliest(unit: TranscribedUnit, num_top: int) -> TranscribedUnit:
    """Every hypothesis with `num_top` tokens at every place: ids from the place on, a tenth less likely each."""
    segments = []
    for segment in unit.segments:
        hypothesis = segment.hypothesis
        if hypothesis is not None:
            places, rank = np.arange(len(hypothesis.token_ids), dtype=np.int32)[:, None], np.arange(num_top)
            ids, logprobs = (places + rank).astype(np.int32), np.float32(-0.1 * (1 + rank + 0 * places))
            hypothesis = replace(hypothesis, top_ids=ids, top_logprobs=logprobs)
        segments.append(replace(segment, hypothesis=hypothesis))
    return replace(unit, segments=segments)


def test_the_likeliest_tokens_are_there_before_the_unit(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TranscribeConfig.model_validate({"inputs": ["a.tar"], "output": "out", "engine": {"top_logprobs": 8}})
    unit = with_likeliest(example(), 8)
    labels = rows.labels_of(unit)
    with monkeypatch.context() as patch:
        patch.setattr(Output, "commit_unit", lambda *_: pytest.fail("the store is away"))
        with pytest.raises(pytest.fail.Exception):
            commit_unit(output, unit, labels, config, "run")
    (file,) = Path(output.logits_url).iterdir()
    assert file.name == f"{KEY.name}.parquet" and not output.committed()
    before = file.read_bytes()
    commit_unit(output, unit, labels, config, "run")
    assert file.read_bytes() == before and output.committed()
    table = pq.read_table(file)
    assert table.schema.equals(LOGITS)
    heard = [segment for segment in unit.segments if segment.hypothesis is not None]
    for row, segment in zip(table.to_pylist(), heard, strict=True):
        hypothesis = segment.hypothesis
        assert hypothesis is not None and hypothesis.top_ids is not None
        assert (row["segment_id"], row["token_ids"]) == (segment.segment_id, hypothesis.token_ids)
        assert np.reshape(row["top_ids"], (-1, row["num_top"])).tolist() == hypothesis.top_ids.tolist()
        np.testing.assert_allclose(np.reshape(row["top_logprobs"], (-1, 8)), hypothesis.top_logprobs, atol=1e-3)


def test_without_being_asked_for_there_are_none(output: Output) -> None:
    commit(output, with_likeliest(example(), 8))
    assert not Path(output.logits_url).exists()


def test_rows_are_in_the_schema_and_in_order(output: Output) -> None:
    unit = example()
    assert commit(output, unit) == Receipt(KEY.name, True, 10.0, 5, 2, 0, {"truncated": 1, "not_audio": 1})
    (file,) = Path(output.transcripts_url).iterdir()
    assert file.name == f"{KEY.name}.parquet"
    table = pq.read_table(file)
    assert table.schema.remove_metadata().equals(TRANSCRIPTS)
    found = table.to_pylist()
    assert [row["segment_id"] for row in found] == [segment.segment_id for segment in unit.segments]
    assert [row["status"] for row in found] == ["ok", "empty", "ok", "failed", "failed"]
    assert {row["unit_id"] for row in found} == {KEY.name} and {row["run_id"] for row in found} == {"run-1"}
    assert {row["config_hash"] for row in found} == {CONFIG.result_hash()}
    assert {(row["engine"], row["model_id"], row["model_revision"], row["quantization"]) for row in found} == {
        ("reference", "tiny", "sha256:12", "none")
    }


def test_a_good_row_holds_all_that_the_engine_said(output: Output) -> None:
    commit(output, rows.unit(KEY, rows.segment("one", 4.0, "hello there")))
    (row,) = ds.dataset(output.transcripts_url).to_table().to_pylist()
    assert (row["recording_id"], row["audio_filepath"], row["channel"]) == ("one", "in/one.wav", None)
    assert (row["offset"], row["duration"], row["speech_ratio"]) == (4.0, 2.0, 0.75)
    assert (row["text"], row["text_ref"], row["language"]) == ("hello there", "ref", "English")
    assert row["language_ref"] == "Vietnamese"
    assert row["text_raw"] == "language English<asr_text>hello there"
    assert (row["token_ids"], row["token_logprobs"], row["finish_reason"]) == ([7, 8], [-0.25, -0.5], "stop")
    assert row["words"] == [{"word": "w", "start": 0.5, "end": 1.0, "score": 0.75}]
    assert row["avg_logprob"] == -0.375 and row["char_rate"] == 5.0 and row["compression_ratio"] > 0
    assert row["keep"] and row["filter_reasons"] == [] and row["error"] is None


def test_a_failed_row_has_its_reason_and_no_text(output: Output) -> None:
    commit(output, rows.unit(KEY, rows.failed("bad", "not_audio: neither can read it", offset=3.5)))
    (row,) = ds.dataset(output.transcripts_url).to_table().to_pylist()
    assert row["error"] == "not_audio: neither can read it" and row["status"] == "failed"
    assert (row["offset"], row["duration"], row["channel"]) == (3.5, 0.0, 1)
    assert not row["keep"] and row["filter_reasons"] == ["failed"]
    assert row["text"] == "" == row["text_raw"]
    for name in ("language", "words", "token_ids", "token_logprobs", "avg_logprob", "char_rate", "finish_reason"):
        assert row[name] is None, name


def test_the_record_says_where_every_figure_comes_from(output: Output) -> None:
    commit(output, example())
    (record,) = output.records([KEY])
    assert record["unit"] == KEY.name and record["run_id"] == "run-1" and record["busy_s"] == 1.5
    assert record["config_hash"] == CONFIG.result_hash() and record["config"]["engine"]["context"] == "hotword"
    assert record["num_recordings"] == 3 and record["num_segments"] == 5 and record["audio_s"] == 10.0
    assert record["status"] == {"ok": 2, "empty": 1, "failed": 2}
    assert record["errors"] == {"truncated": 1, "not_audio": 1} and record["num_retries"] == 0
    assert record["audio_s_by_language"] == {"English": 2.0, "none": 2.0, "Vietnamese": 3.0}
    assert record["engine"]["num_parameters"] == 72_000 and record["engine"]["attention"] == "windowed"
    assert record["versions"] == {name: version(name) for name in VERSIONED}


def test_a_unit_without_rows_is_an_object_too(output: Output) -> None:
    assert commit(output, rows.unit(KEY, audio_s=0.0)) == Receipt(KEY.name, True, 0.0, 0, 0)
    table = pq.read_table(Path(output.transcripts_url) / f"{KEY.name}.parquet")
    assert table.num_rows == 0 and table.schema.remove_metadata().equals(TRANSCRIPTS)
    assert json.loads(table.schema.metadata[RECORD_KEY])["num_recordings"] == 0


def test_the_second_writer_changes_nothing(output: Output) -> None:
    commit(output, example())
    (file,) = Path(output.transcripts_url).iterdir()
    before = file.read_bytes()
    receipt = commit(output, rows.unit(KEY, rows.segment("other")), "run-2")
    assert receipt == Receipt(KEY.name, False, 10.0, 1, 0)
    assert file.read_bytes() == before and list(Path(output.transcripts_url).iterdir()) == [file]


def test_labels_must_be_one_a_segment(output: Output) -> None:
    with pytest.raises(ValueError):
        commit_unit(output, example(), [], CONFIG, "run")
    assert output.committed() == {}


DIES = """
import os
from pipeline.units import UnitKey
from tests import rows
from tests.test_commit import KEY, commit
from pipeline.output import Output
os.link = lambda *_: os._exit(9)  # killed when the bytes are on disk and their name is not
commit(Output({url!r}, {{}}), rows.unit(KEY, rows.segment("half")))
"""


def test_a_killed_writer_leaves_nothing_that_a_reader_sees(output: Output) -> None:
    first = UnitKey(KEY.split_id, 0, 0, "g")
    commit(output, rows.unit(first, rows.segment("whole")))
    root = Path(__file__).parent.parent
    killed = subprocess.run([sys.executable, "-c", DIES.format(url=output.url)], cwd=root, env=dict(os.environ))
    assert killed.returncode == 9
    names = {path.name for path in Path(output.transcripts_url).iterdir()}
    assert len(names) == 2 and any(name.endswith(".partial") for name in names), "it died in between"
    seen = ds.dataset(output.transcripts_url).to_table().to_pylist()
    assert [row["recording_id"] for row in seen] == ["whole"]
    assert output.committed().keys() == {KEY.split_id} and len(output.committed()[KEY.split_id].keys) == 1
    assert commit(output, rows.unit(KEY, rows.segment("half"))).new, "and the next run writes it"
    assert ds.dataset(output.transcripts_url).count_rows() == 2
