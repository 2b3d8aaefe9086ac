"""What a report says of an output made by hand: sums, runs, shards, and which rows it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigError
from pipeline.output import Output
from pipeline.report.gather import gather, shard_name
from pipeline.report.tally import KINDS, TALLIED, Histogram
from pipeline.storage import StorageError
from pipeline.summary import summarize
from pipeline.units import UnitKey
from tests.outputs import START, archive, failed, put, row, start

A, B, C = "a" * 16, "b" * 16, "c" * 16


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return start(str(tmp_path), {A: 100.0, B: 100.0})


def test_nothing_of_ours_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no plan.json"):
        gather(Output(str(tmp_path), {}), {}, 24)


def test_sums_over_rows_of_all_units(output: Output) -> None:
    low = {"keep": False, "filter_reasons": ["low_logprob", "repetitive"], "avg_logprob": -1.5}
    put(output, UnitKey(A, 0, 0, "g"), [row(duration=10.0), row(language="Arabic", duration=4.0, avg_logprob=-0.5)])
    put(output, UnitKey(A, 1, 0, "z"), [row(duration=30.0, **low), failed(error="truncated: it ends")])
    put(
        output, UnitKey(B, 0, 0, "z"), [row(text="", language="", status="empty", keep=False, filter_reasons=["empty"])]
    )
    report = gather(output, {}, 24)
    assert report.kinds == {"kept": 2, "filtered": 1, "empty": 1, "failed": 1}
    assert [(each.name, each.audio_s, each.num_segments, each.num_kept) for each in report.languages] == [
        ("English", 40.0, 2, 1),
        ("Arabic", 4.0, 1, 1),
        ("none", 2.0, 1, 0),
    ]
    assert report.languages[1].median_logprob == pytest.approx(-0.5, abs=0.01)
    assert report.filters == {"low_logprob": 1, "repetitive": 1, "failed": 1, "empty": 1}
    assert report.durations.largest == 30.0 and report.durations.counts.sum() == 4, "the failed row has no audio"
    assert report.confidence.counts.sum(axis=1).tolist() == [2, 1, 1, 0]
    assert report.commits[:, 2].sum() == report.summary.audio_s == 46.0
    assert report.engine["model_id"] == "embedded/student" and report.versions["torch"] == "2.13.0"


def test_totals_are_those_of_status(tmp_path: Path) -> None:
    output = archive(str(tmp_path), num_shards=4, num_groups=2, missing=1)
    report, summary = gather(output, {}, 0), summarize(output)
    assert report.summary.status == summary.status and report.summary.errors == summary.errors
    assert report.summary.audio_s_by_language == pytest.approx({each.name: each.audio_s for each in report.languages})
    assert sum(report.kinds.values()) == summary.num_segments == 3 * 2 * 60


def test_before_the_first_commit(output: Output) -> None:
    report = gather(output, {}, 24)
    assert report.commits.shape == (0, 3) and report.runs == [] and report.samples == [] and report.slowest == []
    assert report.engine == {} and report.median_busy_ratio is None and not report.summary.is_complete


def test_failures_come_with_examples_of_each_reason(output: Output) -> None:
    rows = [failed(f"in/{i}.wav", f"truncated: number {i}") for i in range(20)] + [
        failed("in/x.wav", "not_audio: no: no")
    ]
    put(output, UnitKey(A, 0, 0, "z"), rows)
    truncated, other = gather(output, {}, 0).failures
    assert (truncated.reason, truncated.count, other.reason, other.count) == ("truncated", 20, "not_audio", 1)
    assert len({example.recording_id for example in truncated.examples}) == 3
    assert all(example.error and example.error.startswith("truncated: number") for example in truncated.examples)
    assert [example.error for example in other.examples] == ["not_audio: no: no"]


def test_the_newest_run_began_with_its_plan_and_others_with_their_first_unit(output: Output) -> None:
    put(output, UnitKey(A, 0, 0, "g"), [row(duration=50.0)], run_id="old", committed_at=START - 500, busy_s=20.0)
    put(output, UnitKey(A, 1, 0, "z"), [row(duration=50.0)], run_id="old", committed_at=START - 400, busy_s=10.0)
    put(output, UnitKey(B, 0, 0, "z"), [row(duration=60.0)], run_id="run", committed_at=START + 30, busy_s=10.0)
    old, new = gather(output, {}, 0).runs
    assert (old.started_at, old.ended_at, old.num_units) == (START - 520, START - 400, 2)
    assert (new.started_at, new.ended_at) == (START, START + 30)
    assert new.rtfx == pytest.approx(2.0) and old.rtfx == pytest.approx(100 / 120)


def test_slowest_shards_by_busy_time_a_second_of_audio(tmp_path: Path) -> None:
    output = start(str(tmp_path), {A: 1.0, B: 1.0, C: 1.0})
    put(output, UnitKey(A, 0, 0, "g"), [row("s3://in/a.tar/x.wav", duration=100.0)], busy_s=1.0)
    put(output, UnitKey(A, 1, 0, "z"), [row("s3://in/a.tar/y.wav", duration=100.0)], busy_s=3.0)
    put(output, UnitKey(B, 0, 0, "z"), [row("s3://in/b.tar/z.wav", duration=10.0), failed()], busy_s=1.0)
    put(output, UnitKey(C, 0, 0, "z"), [failed("s3://in/c.tar/(damaged)")])
    report = gather(output, {}, 0)
    assert [(each.name, each.busy_ratio, each.num_units, each.num_failed) for each in report.slowest] == [
        ("s3://in/b.tar", pytest.approx(0.1), 1, 1),
        ("s3://in/a.tar", pytest.approx(0.02), 2, 0),
    ], "a shard without audio has no speed"
    assert report.median_busy_ratio == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("filepaths", "name"),
    [
        (["s3://b/x-00001.tar/talk/1.wav", "s3://b/x-00001.tar/talk/2.wav"], "s3://b/x-00001.tar"),
        (["/in/X.TAR.GZ/1.wav"], "/in/X.TAR.GZ"),
        (["/in/set.parquet#17", "/in/set.parquet#18"], "/in/set.parquet"),
        (["/in/set.parquet#17/a.mp3"], "/in/set.parquet"),
        (["/in/a.wav"], "/in/a.wav"),
        (["/in/a.wav", "/in/b.wav"], "/in/a.wav and others"),
        ([], "(no recordings)"),
    ],
)
def test_name_of_a_shard(filepaths: list[str], name: str) -> None:
    assert shard_name(filepaths) == name


def test_samples_are_of_every_sort_and_the_same_each_time(tmp_path: Path) -> None:
    output = archive(str(tmp_path), num_shards=6, num_groups=4)
    report = gather(output, {}, 24)
    sorts = [drawn_as for drawn_as, _ in report.samples]
    assert {name: sorts.count(name) for name in set(sorts)} == {
        "random": 8,
        "lowest confidence": 4,
        "filtered": 4,
        "empty": 4,
        "failed": 4,
    }
    kinds = {"random": {"kept"}, "lowest confidence": {"kept", "filtered"}}
    assert all(each.kind in kinds.get(drawn_as, {drawn_as}) for drawn_as, each in report.samples)
    assert len({(each.unit, each.row) for _, each in report.samples}) == 24
    assert gather(output, {}, 24).samples == report.samples
    assert len({each.unit for drawn_as, each in report.samples if drawn_as == "random"}) > 4, "from all over"


def test_lowest_confidence_is_the_lowest_of_all_rows_with_text(tmp_path: Path) -> None:
    output = start(str(tmp_path), {A: 1.0})
    for group in range(5):
        rows = [row(f"in/{group}-{i}.wav", avg_logprob=-0.1 - 0.01 * (10 * i + group)) for i in range(10)]
        put(
            output,
            UnitKey(A, group, 0, "z" if group == 4 else "g"),
            rows + [row(text="", status="empty", avg_logprob=-9.0)],
        )
    lowest = [each.recording_id for drawn_as, each in gather(output, {}, 18).samples if drawn_as == "lowest confidence"]
    assert sorted(lowest) == ["in/2-9.wav", "in/3-9.wav", "in/4-9.wav"]


@pytest.mark.parametrize(("num_samples", "shown"), [(0, 0), (1, 1), (5, 5), (30, 30), (1000, 40)])
def test_as_many_samples_as_asked_for_or_there_are(output: Output, num_samples: int, shown: int) -> None:
    put(output, UnitKey(A, 0, 0, "z"), [row(f"in/{i}.wav") for i in range(38)] + [failed(), failed("in/y.wav")])
    assert len(gather(output, {}, num_samples).samples) == shown


def test_an_all_failed_job_fills_its_samples_with_failures(output: Output) -> None:
    put(output, UnitKey(A, 0, 0, "z"), [failed(f"in/{i}.wav") for i in range(50)])
    report = gather(output, {}, 12)
    assert [drawn_as for drawn_as, _ in report.samples] == ["failed"] * 12 and report.languages == []


def test_texts_and_tokens_are_read_of_the_units_shown_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = archive(str(tmp_path), num_shards=10, num_groups=3)
    reads: list[set[str]] = []
    read = pq.ParquetFile.read

    def spy(file: pq.ParquetFile, columns: list[str], **kwargs: Any) -> Any:
        reads.append(set(columns))
        return read(file, columns, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read", spy)
    gather(output, {}, 2)
    assert reads[:30] == [set(TALLIED)] * 30
    assert len(reads[30:]) <= 2 + 3 * 3 + 10, "samples, examples of three reasons, names of ten shards"
    assert not set().union(*reads) & {"words", "token_ids", "token_logprobs", "text_raw"}


def test_a_damaged_unit_is_named(output: Output) -> None:
    put(output, UnitKey(A, 0, 0, "z"), [row()])
    path = Path(output.transcripts_url) / f"{UnitKey(A, 0, 0, 'z').name}.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StorageError, match=f"{path} is no readable unit"):
        gather(output, {}, 24)


def test_what_a_newer_configuration_file_holds_is_refused_by_its_key(output: Output) -> None:
    path = Path(output.url) / "shardscribe.yaml"
    path.write_text(path.read_text().replace("  units:", "  parts:"))
    with pytest.raises(ConfigError, match="shardscribe.yaml: unknown key `parts`"):
        gather(output, {}, 24)


def test_histogram_bins_quantiles_and_what_lies_outside() -> None:
    histogram = Histogram(0.1, 10)
    kept, caught = KINDS.index("kept"), KINDS.index("filtered")
    histogram.add(np.array([0.0, 0.1, 0.11, 1.0, 5.0, np.inf, np.nan]), np.array([kept] * 6 + [caught]))
    assert histogram.counts[kept].tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 3] and histogram.counts.sum() == 6
    assert histogram.quantile(0.5) == pytest.approx(0.15) and histogram.quantile(1.0) == pytest.approx(0.95)
    assert histogram.largest == np.inf and Histogram(1.0, 3).quantile(0.5) is None


def test_the_record_of_the_newest_unit_says_which_engine(output: Output) -> None:
    for group, (model, at) in enumerate([("late", 50.0), ("early", 20.0)]):
        put(output, UnitKey(A, group, 0, "g"), [row()], committed_at=START + at, engine={"model_id": model})
    assert gather(output, {}, 0).engine == {"model_id": "late"}
    assert json.loads((Path(output.url) / "plan.json").read_text())["run_id"] == gather(output, {}, 0).plan.run_id
