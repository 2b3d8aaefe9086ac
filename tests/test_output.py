"""The output folder: whose it is, what it holds, what it was to hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import output as outputs
from pipeline.commit import to_parquet
from pipeline.config import ConfigError, TranscribeConfig
from pipeline.output import Output, PlannedSplit, RunPlan, planned
from pipeline.units import Done, Split, UnitKey

A, B = "a" * 16, "b" * 16


def config(**sections: Any) -> TranscribeConfig:
    return TranscribeConfig.model_validate({"inputs": ["a.tar"], "output": "out"} | sections)


def test_the_first_claim_writes_the_configuration_and_the_next_leaves_it(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"), {})
    output.claim(config(engine={"context": "Đà Nẵng"}))
    file = tmp_path / "out" / "shardscribe.yaml"
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    mine = config(engine={"context": "Đà Nẵng"})
    assert document["config_hash"] == mine.result_hash()
    assert TranscribeConfig.model_validate(document["config"]) == mine
    assert "Đà Nẵng" in file.read_text(encoding="utf-8")

    before = file.read_bytes()
    output.claim(config(engine={"context": "Đà Nẵng", "batch_size": 1}, inputs=["b.tar"], ray={"engines": 2}))
    assert file.read_bytes() == before


def test_storage_options_are_not_written(tmp_path: Path) -> None:
    Output(str(tmp_path), {}).claim(config(storage={"options": {"s3": {"key": "AKIA0", "secret": "hush-hush"}}}))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"config_hash" in written and b"hush-hush" not in written and b"AKIA0" not in written


def test_another_configuration_is_refused_by_the_names_of_its_keys(tmp_path: Path) -> None:
    output = Output(str(tmp_path), {})
    output.claim(config())
    other = config(
        engine={"language": "English", "batch_size": 3, "device": "cpu"},
        labels={"max_char_rate": 1.0},
        inputs=["b.tar"],
        output="elsewhere",
        ray={"engines": 3},
    )
    with pytest.raises(ConfigError) as caught:
        output.claim(other)
    assert f"{tmp_path} holds results of another configuration" in str(caught.value)
    named = set(re.findall(r"\b[a-z]+\.[a-z_]+\b", str(caught.value).removeprefix(str(tmp_path))))
    assert named == {"engine.language", "labels.max_char_rate"}, "and none that changes no row"
    output.claim(config())


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path) -> None:
    output = Output(str(tmp_path), {})
    output.claim(config(), "sha256:1")
    output.claim(config(), "sha256:1")
    with pytest.raises(ConfigError, match="changed: the weights in embedded/student"):
        output.claim(config(engine={"batch_size": 1}), "sha256:2")


def test_committed_is_what_the_names_say(tmp_path: Path) -> None:
    output = Output(str(tmp_path), {})
    assert output.committed() == {}
    keys = [UnitKey(A, 0, 0, "p"), UnitKey(A, 0, 1, "z"), UnitKey(B, 0, 0, "g")]
    assert all(output.commit_unit(key, b"one") for key in keys)
    assert not output.commit_unit(keys[0], b"two"), "already there"
    transcripts = tmp_path / "transcripts"
    assert (transcripts / f"{keys[0].name}.parquet").read_bytes() == b"one"
    for name in ("notes.txt", f".{A}-00001-000z.parquet.0.partial", f"{A}-00001-000z.tmp"):
        (transcripts / name).write_bytes(b"")
    assert output.committed() == {A: Done.of(keys[:2]), B: Done.of(keys[2:])}
    assert output.committed()[A].complete() and not output.committed()[B].complete()


def test_a_plan_comes_back_and_a_new_one_replaces_it(tmp_path: Path) -> None:
    output = Output(str(tmp_path), {})
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no plan.json"):
        output.read_plan()
    splits = [Split("files", ["a"], 1, 12.5, 0), Split("files", ["b"], 1, 99.0, 0)]
    plan = RunPlan("first", 1234.5, 60.0, planned(splits))
    assert plan.splits == [PlannedSplit(splits[0].split_id, 12.5), PlannedSplit(splits[1].split_id, 99.0)]
    output.write_plan(plan)
    assert output.read_plan() == plan
    output.write_plan(RunPlan("second", 2.0, 60.0, []))
    assert output.read_plan() == RunPlan("second", 2.0, 60.0, [])


def test_records_come_in_the_order_asked_for(tmp_path: Path) -> None:
    output = Output(str(tmp_path), {})
    keys = [UnitKey(A, group, 0, "g") for group in range(40)]
    for key in keys:
        output.commit_unit(key, to_parquet([], {"unit": key.name, "note": "ü"}))
    assert [record["unit"] for record in output.records(reversed(keys))] == [key.name for key in reversed(keys)]
    assert list(output.records([])) == []


def test_units_are_read_ahead_by_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[UnitKey] = []
    monkeypatch.setattr(Output, "_table", lambda output, key, columns: started.append(key) or (key, {}, None))
    tables = Output("nowhere", {}).tables((UnitKey("a" * 16, group, 0, "g") for group in range(1000)), [])
    first = next(tables)
    assert first[0].group == 0 and len(started) <= outputs._READ_AHEAD
    assert [key.group for key, _, _ in tables] == list(range(1, 1000)), "in order"


def test_other_weights_of_the_second_model_refuse_the_output(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"), {})
    config = TranscribeConfig.model_validate(
        {"inputs": ["a.tar"], "output": str(tmp_path / "out"), "agree_with": {"model": "models/second"}}
    )
    output.claim(config, "one", "two")
    output.claim(config, "one", "two")
    with pytest.raises(ConfigError, match=r"changed: the weights in models/second\)"):
        output.claim(config, "one", "three")
    with pytest.raises(ConfigError, match=r"changed: agree_with\)"):
        output.claim(config.model_copy(update={"agree_with": None}), "one", None)
