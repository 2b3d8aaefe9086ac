"""Outputs as items: segments joined, references counted once, languages and sets found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.evaluate.items import UNKNOWN, System
from pipeline.evaluate.recordings import read_output
from pipeline.evaluate.scores import evaluate
from pipeline.units import UnitKey
from tests.outputs import config, failed, put, row, start

A, B = "a" * 16, "b" * 16


def system_of(
    folder: Path, *rows: dict[str, Any], inputs: str = "nowhere/*.tar", language: str | None = None
) -> System:
    """What is read of an output of these rows."""
    output = start(str(folder), {A: 10.0}, config(str(folder), [inputs]))
    put(output, UnitKey(A, 0, 0, "z"), list(rows))
    return read_output(str(folder), {}, language)


def test_segments_of_a_long_recording_are_joined_in_order_and_its_reference_counts_once(tmp_path: Path) -> None:
    output = start(str(tmp_path), {A: 10.0})
    shared = {"text_ref": "red tan blue pink gray gold", "language_ref": "English"}
    late = row("in/long.wav", offset=20.0, duration=10.0, text="gray gold", token_ids=[1], avg_logprob=-1.0, **shared)
    early = row("in/long.wav", text="red tan", duration=10.0, token_ids=[1] * 3, avg_logprob=-0.2, **shared)
    middle = row("in/long.wav", text=" blue  pink", offset=10.0, duration=10.0, token_ids=[1, 2], **shared)
    put(output, UnitKey(A, 0, 0, "p"), [middle, early])
    put(output, UnitKey(A, 0, 1, "z"), [late])
    system = read_output(str(tmp_path), {})
    (item,) = system.items
    assert (item.item_id, item.text, item.duration_s) == ("in/long.wav", "red tan blue  pink gray gold", 30.0)
    assert item.avg_logprob == pytest.approx((3 * -0.2 + 2 * -0.25 - 1.0) / 6), "the mean over all tokens"
    (group,) = evaluate(system).overall
    assert (group.counts.num_errors, group.counts.num_reference, group.num_items) == (0, 6, 1)
    assert len(system.rows) == 3 and system.made_by["model_id"] == "embedded/student" and system.rtfx


def test_channels_of_a_recording_share_its_reference(tmp_path: Path) -> None:
    shared = {"text_ref": "hello who is there me", "language_ref": "English", "audio_filepath": "in/call.wav"}
    (item,) = system_of(
        tmp_path,
        row("in/call.wav#ch1", channel=1, offset=2.0, text="who is there", **shared),
        row("in/call.wav#ch0", channel=0, offset=4.0, text="me", **shared),
        row("in/call.wav#ch0", channel=0, offset=0.0, text="hello", **shared),
    ).items
    assert (item.item_id, item.text) == ("in/call.wav", "hello who is there me")


def test_what_failed_or_is_empty_counts_as_deleted(tmp_path: Path) -> None:
    system = system_of(
        tmp_path,
        failed("in/gone.wav", text_ref="red tan blue"),
        row("in/cut.wav", text="red", text_ref="red tan"),
        failed("in/cut.wav", text_ref="red tan", offset=2.0),
        row("in/still.wav", text="", status="empty", text_ref="a b", keep=False, filter_reasons=["empty"], language=""),
        language="en",
    )
    by_id = {item.item_id: item for item in system.items}
    assert by_id["in/gone.wav"].hypothesis is None and by_id["in/gone.wav"].detected is None
    assert {name: item.status for name, item in by_id.items()} == {
        "in/gone.wav": "failed",
        "in/cut.wav": "failed",
        "in/still.wav": "empty",
    }
    (group,) = evaluate(system).overall
    assert (group.counts.deletions, group.counts.num_reference, group.num_failed, group.num_empty) == (6, 7, 2, 1)


def test_the_references_language_is_the_inputs_else_the_one_heard_longest(tmp_path: Path) -> None:
    system = system_of(
        tmp_path,
        row("in/a.wav", text="你好", text_ref="你好吗", language_ref="Chinese", language="English"),
        row("in/b.wav", text_ref="red", language="English", duration=1.0),
        row("in/b.wav", text_ref="red", language="Vietnamese", duration=9.0, offset=1.0),
        row("in/b.wav", text_ref="red", language="", duration=90.0, offset=10.0),
        row("in/c.wav", text="", text_ref="red", language="", status="empty"),
    )
    assert [(item.language, item.detected) for item in system.items] == [
        ("Chinese", "English"),
        ("Vietnamese", "Vietnamese"),
        (UNKNOWN, None),
    ]
    misheard = {group.name: (group.num_misheard, group.num_heard) for group in evaluate(system).languages}
    assert misheard == {"Chinese": (1, 1), "Vietnamese": (0, 1), UNKNOWN: (0, 0)}


def test_languages_without_spaces_are_joined_without(tmp_path: Path) -> None:
    shared = {"text_ref": "你好吗", "language_ref": "Chinese"}
    (item,) = system_of(
        tmp_path, row("in/a.wav", text="你好", **shared), row("in/a.wav", text="吗", offset=2.0, **shared)
    ).items
    assert item.text == "你好吗"


def test_a_language_that_nobody_knows_is_named_with_its_recording(tmp_path: Path) -> None:
    given = row("in/a.wav", text_ref="nuqneH", language_ref="Klingon")
    with pytest.raises(ConfigError, match="in/a.wav: language 'Klingon' is none .* override it with --language"):
        system_of(tmp_path / "1", given)
    assert [item.language for item in system_of(tmp_path / "2", given, language="en").items] == ["English"]


@pytest.mark.parametrize(
    ("paths", "inputs", "names"),
    [
        (["s3://b/test-clean-00003.tar/k/1.wav", "/d/english.tar/1.wav"], "x", ["test-clean", "english"]),
        (["/d/test-00000-of-00004.parquet#17", "/d/set-2.parquet#1/a.wav"], "x", ["test", "set-2"]),
        (["/d/test-other/12/a.flac", "/d/test-other/13/b.flac"], "/d/test-other", ["test-other", "test-other"]),
        (["/d/12/a.flac", "/e/13/b.flac"], "/m/dev.jsonl.gz", ["dev", "dev"]),
        (["/d/0001.tar/a.wav"], "x", ["0001"]),
    ],
)
def test_sets_are_named_after_what_recordings_come_in(
    tmp_path: Path, paths: list[str], inputs: str, names: list[str]
) -> None:
    rows = [row(path, segment_id=path, text_ref="a") for path in paths]
    found = {item.item_id: item.set_name for item in system_of(tmp_path, *rows, inputs=inputs).items}
    assert [found[path] for path in paths] == names


def test_recordings_without_a_reference_are_counted_and_their_rows_stay_in_the_funnel(tmp_path: Path) -> None:
    low = {"keep": False, "filter_reasons": ["low_logprob"]}
    system = system_of(tmp_path, row("in/a.wav", text_ref="some words"), row("in/b.wav", **low), row("in/b.wav"))
    assert (len(system.items), system.num_without_reference) == (1, 1)
    everything, left = evaluate(system).funnel
    assert (everything.num_rows, left.reason, left.num_rows, left.audio_s) == (3, "low_logprob", 2, 4.0)


def test_an_output_without_references(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no references: text_ref is null in all of its 2 rows"):
        system_of(tmp_path, row(), failed())


def test_an_unfinished_output(tmp_path: Path) -> None:
    output = start(str(tmp_path), {A: 10.0, B: 10.0})
    put(output, UnitKey(A, 0, 0, "z"), [row(text_ref="some words")])
    with pytest.raises(ConfigError, match=r"is unfinished \(1 of 2 splits are complete\)"):
        read_output(str(tmp_path), {})


def test_no_output(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no plan.json"):
        read_output(str(tmp_path), {})


def test_confidence_of_a_recording_without_tokens(tmp_path: Path) -> None:
    (item,) = system_of(tmp_path, row("in/a.wav", text_ref="a", token_ids=[], avg_logprob=None)).items
    assert item.avg_logprob is None and not math.isnan(item.duration_s or math.nan)
