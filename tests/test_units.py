"""Names of units, what a set of them proves, and how their audio travels."""

from __future__ import annotations

import gc
import string
import weakref
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.units import (
    UNIT_ROW,
    Done,
    Recording,
    Span,
    Split,
    Unit,
    UnitKey,
    estimated_seconds,
    from_table,
    to_table,
)

SPLIT_ID = "0123456789abcdef"
split_ids = st.text("0123456789abcdef", min_size=16, max_size=16)
numbers = st.integers(0, 10**7)


@given(split_ids, numbers, numbers, st.sampled_from("pgz"))
def test_a_name_says_the_key_and_the_key_says_the_name(split_id: str, group: int, part: int, end: str) -> None:
    key = UnitKey(split_id, group, part, end)  # type: ignore[arg-type]
    assert UnitKey.parse(key.name) == key == UnitKey.parse(f"{key.name}.parquet")


@given(st.text(string.hexdigits + "-pgz.parquet", max_size=40))
def test_a_name_that_parses_is_the_one_that_its_key_writes_but_for_zeros(name: str) -> None:
    key = UnitKey.parse(name)
    if key is not None:
        written = key.name.split("-")
        given_parts = name.removesuffix(".parquet").split("-")
        assert written[0] == given_parts[0] and int(written[1]) == int(given_parts[1])


@pytest.mark.parametrize(
    "name",
    [
        "",
        "shardscribe.yaml",
        f"{SPLIT_ID}-00000-000",
        f"{SPLIT_ID}-00000-000x",
        f"{SPLIT_ID}-0000-000z",
        f"{SPLIT_ID.upper()}-00000-000z",
        f".{SPLIT_ID}-00000-000z.parquet",
        f"{SPLIT_ID}-00000-000z.parquet.partial",
        f"{SPLIT_ID}-00000-000z\n",
    ],
)
def test_other_names_are_no_units(name: str) -> None:
    assert UnitKey.parse(name) is None


def test_names_sort_in_the_order_of_a_split() -> None:
    keys = [UnitKey(SPLIT_ID, group, part, "p") for group in (0, 1, 12) for part in (0, 3, 11)]
    assert sorted(key.name for key in keys) == [key.name for key in keys]


@st.composite
def split_and_subset(draw: st.DrawFn) -> tuple[list[int], set[UnitKey]]:
    """Parts of each group of a split, and any part of the split's units."""
    parts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    return parts, draw(st.sets(st.sampled_from(units_of(parts))))


def units_of(parts: list[int]) -> list[UnitKey]:
    """The units that a split of groups with so many parts gives."""
    keys = []
    for group, num_parts in enumerate(parts):
        last = "z" if group == len(parts) - 1 else "g"
        keys += [UnitKey(SPLIT_ID, group, part, "p") for part in range(num_parts - 1)]
        keys.append(UnitKey(SPLIT_ID, group, num_parts - 1, last))  # type: ignore[arg-type]
    return keys


@given(split_and_subset())
def test_names_prove_what_is_complete(case: tuple[list[int], set[UnitKey]]) -> None:
    parts, there = case
    all_units = units_of(parts)
    done = Done.of(there)
    assert done.complete() == (there == set(all_units))
    for group in range(len(parts)):
        assert done.parts(group).all_from(0) == all(unit in there for unit in all_units if unit.group == group)
    assert not done.parts(len(parts)).all_from(0)


def test_nothing_is_not_complete() -> None:
    assert not Done().complete() and not Done().parts(0).all_from(0)


def test_a_split_is_named_by_what_it_reads_alone() -> None:
    split = Split("webdataset", [["s3://b/a.tar", 12]], 100, 3.0, 0)
    assert split.split_id == "0c0c28769cdf12d2", "a new name would orphan every output that is already written"
    assert replace(split, num_bytes=7, estimated_s=1.0, input_index=4).split_id == split.split_id
    others = [
        replace(split, kind="files"),
        replace(split, items=[["s3://b/b.tar", 12]]),
        replace(split, items=[["s3://b/a.tar", 13]]),
        replace(split, items=[["s3://b/a.tar"], [12]]),
    ]
    assert len({split.split_id, *(other.split_id for other in others)}) == 5


items = st.lists(st.recursive(st.text() | st.integers(-(2**53), 2**53), lambda inner: st.lists(inner, max_size=3)))


@given(items)
def test_a_split_travels_as_json_and_keeps_its_name(items: list[object]) -> None:
    split = Split("files", items, 1, 2.5, 3)
    assert Split.from_json(split.to_json()) == split
    assert Split.from_json(split.to_json()).split_id == split.split_id


texts = st.none() | st.text(max_size=8)
recordings = st.builds(
    Recording,
    recording_id=st.text(max_size=8),
    audio_filepath=st.text(max_size=8),
    pcm=st.lists(st.integers(-32768, 32767), max_size=50).map(lambda values: np.array(values, np.int16)),
    channel=st.none() | st.integers(0, 31),
    offset_s=st.floats(0, 1e6, allow_subnormal=False),
    language=texts,
    text_ref=texts,
    error=texts,
)
ratios = st.floats(0, 1, width=32, allow_subnormal=False)
spans = st.builds(Span, st.integers(0, 9), st.integers(0, 10**10), st.integers(0, 10**9))


@given(
    st.lists(
        st.builds(
            Unit, st.just(UnitKey(SPLIT_ID, 3, 1, "g")), st.lists(recordings), st.lists(spans), st.integers(0, 10**6)
        ),
        min_size=1,
    )
)
def test_units_come_back_from_rows_as_they_were(units: list[Unit]) -> None:
    """Ray may hand on a row as a slice of a larger block."""
    block = pa.concat_tables([to_table(unit) for unit in units])
    for table in (block, block.combine_chunks()):
        for index, unit in enumerate(units):
            back = from_table(table.slice(index, 1))
            assert back.key == unit.key and back.spans == unit.spans and len(back.recordings) == len(unit.recordings)
            assert back.num_retries == unit.num_retries
            for there, here in zip(back.recordings, unit.recordings, strict=True):
                np.testing.assert_array_equal(there.pcm, here.pcm)
                assert there.pcm.dtype == np.int16
                assert replace(there, pcm=None) == replace(here, pcm=None)  # type: ignore[arg-type]


def test_audio_is_a_read_only_view_of_the_tables_own_buffer() -> None:
    audio = [np.arange(size, dtype=np.int16) for size in (1000, 0, 16_000)]
    unit = Unit(UnitKey(SPLIT_ID, 0, 0, "z"), [Recording(str(i), "a.wav", pcm) for i, pcm in enumerate(audio)])
    alone = to_table(unit)
    assert alone.schema.equals(UNIT_ROW) and alone.num_rows == 1
    block = pa.concat_tables([alone, alone, alone]).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, alone.schema) as stream:
        stream.write_table(alone)
    sent = pa.ipc.open_stream(sink.getvalue()).read_all()  # as Ray hands it on
    for table in (alone, block.slice(1, 1), sent):
        data = table["recordings"].chunk(0).values.field("pcm").buffers()[2]
        before = pa.total_allocated_bytes()
        views = [recording.pcm for recording in from_table(table).recordings]
        assert pa.total_allocated_bytes() - before < 1000
        for pcm, original in zip(views, audio, strict=True):
            np.testing.assert_array_equal(pcm, original)
            address = pcm.__array_interface__["data"][0]
            assert data.address <= address and address + pcm.nbytes <= data.address + data.size
            with pytest.raises(ValueError, match="read-only"):
                pcm[:] = 1


def test_durations_add_up() -> None:
    unit = Unit(UnitKey(SPLIT_ID, 0, 0, "z"), [Recording("a", "a", np.zeros(size, np.int16)) for size in (8000, 24000)])
    assert [recording.duration_s for recording in unit.recordings] == [0.5, 1.5] and unit.audio_s == 2.0


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("a.wav", 10), ("A.WAV", 10), ("dir.wav/a.flac", 20), ("a.opus", 80), ("a.unknown", 26.7), ("noname", 26.7)],
)
def test_seconds_are_guessed_from_name_and_size(name: str, seconds: float) -> None:
    assert estimated_seconds(name, 320_000) == pytest.approx(seconds, rel=0.01)


@pytest.mark.parametrize("num_recordings", [1, 3])
def test_to_table_lets_go_of_the_audio(num_recordings: int) -> None:
    recordings = [Recording(f"r{i}", f"r{i}.wav", np.ones(1000, np.int16)) for i in range(num_recordings)]
    alive = [weakref.ref(recording.pcm) for recording in recordings]
    table = to_table(Unit(UnitKey("0" * 16, 0, 0, "z"), recordings))
    del recordings, table
    gc.collect()
    assert [reference() for reference in alive] == [None] * num_recordings
