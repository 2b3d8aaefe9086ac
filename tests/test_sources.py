"""Sources: what each makes of real tars, folders, Parquet files and manifests, and that nothing is lost on the way."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from s3fs.core import S3File

from pipeline import storage
from pipeline.config import ConfigError, InputConfig
from pipeline.sources.plan import plan, samples
from pipeline.sources.sample import Filler, Sample, UniqueIds, read_sentences, read_sidecars
from pipeline.storage import FileUnavailableError, StorageError
from pipeline.units import Split


def wav(seconds: float = 0.1) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(round(seconds * 16_000), np.int16), 16_000, format="WAV")
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def planned(
    path: object, target_s: float = 1800.0, options: storage.Options | None = None, **kwargs: Any
) -> list[Split]:
    return list(plan([InputConfig(path=str(path), **kwargs)], options or {}, target_s))


def read(path: object, target_s: float = 1800.0, options: storage.Options | None = None, **kwargs: Any) -> list[Sample]:
    splits = planned(path, target_s, options, **kwargs)
    return [sample for split in splits for sample in samples(Split.from_json(split.to_json()), options or {})]


def content(sample: Sample) -> bytes:
    assert sample.open is not None
    with sample.open() as file:
        return file.read()


MEMBERS = [
    ("a/1.json", b'{"text": "one", "language": "English"}'),
    ("a/1.wav", wav(0.1)),
    ("a/2.flac", b"two"),
    ("a/2.txt", b" zwei \n"),
    ("a/2.lang", b"German"),
    ("a/3.txt", b"no sound"),
    ("._a/4.mp3", b"four"),
    ("a/._4.mp3", b"a file of macOS"),
    ("a/1.wav", wav(0.2)),
]


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz", "s.tgz", "gzipped.tar"])
def test_tar(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / name, MEMBERS, "w" if name == "s.tar" else "w:gz")
    found = read(path)
    assert [sample.audio_filepath for sample in found] == [
        f"{path}/{name}" for name in ("a/1.wav", "a/2.flac", "a/3", "._a/4.mp3", "a/1.wav")
    ]
    assert [sample.recording_id.removeprefix(sample.audio_filepath) for sample in found] == ["", "", "", "", "~2"]
    assert [(sample.text_ref, sample.language) for sample in found[:2]] == [("one", "English"), ("zwei", "German")]
    assert found[2].error == "no_audio: the key has no audio member, only .txt"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_payloads(tmp_path: Path, mode: str) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS, mode)
    (split,) = planned(path)
    payloads = [content(sample) for sample in samples(split, {}) if sample.open]
    assert payloads == [MEMBERS[1][1], b"two", b"four", MEMBERS[8][1]]


@pytest.mark.parametrize(("codec", "mode", "bytes_per_second"), [("opus", "w", 4_000), ("wav", "w:gz", 32_000)])
def test_the_length_of_shards_is_estimated_by_the_first_ones_codec(
    tmp_path: Path, codec: str, mode: str, bytes_per_second: int
) -> None:
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", [("1.json", b"{}"), ("._1.flac", b"hidden"), (f"1.{codec}", b"audio")], mode)
    for split in planned(tmp_path):
        assert split.estimated_s == split.num_bytes / bytes_per_second


def test_an_unreadable_first_shard_does_not_fail_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "broken.tar"
    path.write_bytes(b"no tar at all" * 100)
    (split,) = planned(path)
    assert split.estimated_s == 1300 / 16_000


def test_a_tar_on_s3(s3_options: storage.Options, tmp_path: Path) -> None:
    fs = fsspec.filesystem("s3", **s3_options["s3"])
    fs.mkdir("tars")
    for i in range(3):
        fs.put_file(str(write_tar(tmp_path / f"{i}.tar", MEMBERS)), f"tars/{i}.tar")
    splits = planned("s3://tars/{0..2}.tar", options=s3_options)
    assert [split.items[0][0] for split in splits] == [f"s3://tars/{i}.tar" for i in range(3)]
    assert splits[0].items == [["s3://tars/0.tar", (tmp_path / "0.tar").stat().st_size]]
    payloads = [content(sample) for sample in samples(splits[1], s3_options) if sample.open]
    assert payloads == [MEMBERS[1][1], b"two", b"four", MEMBERS[8][1]]


def test_a_remote_tar_is_fetched_once(
    s3_options: storage.Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("s3", **s3_options["s3"])
    fs.mkdir("once")
    path = write_tar(tmp_path / "t.tar", [(f"{i}.{s}", bytes(300_000)) for i in range(60) for s in ("flac", "xyz")])
    fs.put_file(str(path), "once/t.tar")
    (split,) = planned("s3://once/t.tar", options=s3_options)
    starts, real = [], S3File._fetch_range

    def counted(self: Any, start: int, end: int) -> bytes:
        starts.append(start)
        return bytes(real(self, start, end))

    monkeypatch.setattr(S3File, "_fetch_range", counted)
    assert sum(len(content(sample)) for sample in samples(split, s3_options)) == 60 * 300_000
    assert len(starts) > 1
    assert starts == sorted(set(starts))  # block after block, none twice


def test_names_with_dots_lose_no_recording(tmp_path: Path) -> None:
    members = [(f"talk.v1.{i}.{suffix}", f"{i}".encode()) for i in range(3) for suffix in ("wav", "txt")]
    found = read(write_tar(tmp_path / "t.tar", members))
    assert [(sample.audio_filepath[-5:], sample.text_ref) for sample in found] == [
        ("0.wav", "0"),
        ("1.wav", "1"),
        ("2.wav", "2"),
    ]


def test_a_damaged_tar_says_so(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [(f"{i}.wav", wav(2.0)) for i in range(4)])
    whole = path.read_bytes()
    header_of_third = whole.index(b"2.wav")
    damaged = {
        "header": whole[:header_of_third] + b"\xff" * 512 + whole[header_of_third + 512 :],
        "payload": whole[: header_of_third + 600],
        "cut header": whole[: header_of_third + 100],
        "gzip": gzip.compress(whole, 0)[: header_of_third + 60_000],
        "text": b"this is no tar at all" * 100,
    }
    for name, data in damaged.items():
        path.write_bytes(data)
        found = read(path)
        assert found[-1].error is not None, name
        assert found[-1].error.startswith(f"damaged_tar: {path} breaks here"), name
        names = [sample.audio_filepath[-5:] for sample in found[:-1]]
        assert names == ([] if name == "text" else ["0.wav", "1.wav"]), name


def test_links_in_a_tar_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "b.wav"
        tar.addfile(link)
    (sample,) = read(path)
    assert sample.error == "no_audio: a link or a device, not a file"


def test_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, data in {
        "a.wav": bytes(32_000 * 10),
        "a.txt": b"text of a",
        "a-1.wav": bytes(32_000 * 10),
        "b.wav": bytes(32_000 * 100),
        "c.WAV": bytes(32_000 * 10),
        "empty.wav": b"",
        ".hidden.wav": b"x",
        "notes.md": b"x",
        "sub/d.flac": bytes(16_000 * 30),
        "sub/d.json": b'{"sentence": "text of d", "lang": "en"}',
    }.items():
        (tmp_path / name).write_bytes(data)
    splits = planned(tmp_path, target_s=60)
    names = [[Path(item[0]).name for item in split.items] for split in splits]
    assert names == [["a-1.wav", "a.wav"], ["b.wav"], ["c.WAV", "empty.wav", "d.flac"]]
    assert [split.estimated_s for split in splits] == [20, 100, 40]
    found = {Path(sample.recording_id).name: sample for split in splits for sample in samples(split, {})}
    assert found["a.wav"].text_ref == "text of a"
    assert found["a-1.wav"].text_ref is None
    assert (found["d.flac"].text_ref, found["d.flac"].language) == ("text of d", "en")
    assert len(content(found["a.wav"])) == 320_000


def test_a_plan_is_lazy(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i:02d}").mkdir()
        (tmp_path / f"{i:02d}/a.wav").write_bytes(bytes(32_000))
    splits = plan([InputConfig(path=str(tmp_path))], {}, 2.0)
    first = next(splits)
    assert [item[0] for item in first.items] == [f"{tmp_path}/00/a.wav", f"{tmp_path}/01/a.wav"]
    for i in range(10, 50):
        (tmp_path / f"{i:02d}/a.wav").unlink()
    assert 4 <= len(list(splits)) < 10


def parquet(path: Path, columns: dict[str, Any], rows_a_group: int = 2) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows_a_group)
    return path


@pytest.mark.parametrize("target_s", [1800.0, 1.0])
def test_parquet_bytes(tmp_path: Path, target_s: float) -> None:
    rng = np.random.default_rng(0)
    audio = [rng.bytes(12_000) for _ in range(5)] + [None]
    path = parquet(
        tmp_path / "p.parquet",
        {"audio": audio, "text": ["a", None, "c", "d", "e", "f"], "language": ["English"] * 6, "other": range(6)},
    )
    assert len(planned(path, target_s)) == (1 if target_s > 1 else 3)
    found = read(path, target_s)
    assert [sample.recording_id for sample in found] == [f"{path}#{row}" for row in range(6)]
    assert [content(sample) for sample in found[:5]] == audio[:5]
    assert [sample.text_ref for sample in found] == ["a", None, "c", "d", "e", "f"]
    assert found[0].language == "English"
    assert found[0].estimated_s == 1.0
    assert found[5].error == f"no_audio: row 5 of {path} is null in column 'audio'"


def test_parquet_structs_and_paths(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/x.wav").write_bytes(b"beside")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        {"bytes": b"inside", "path": "y.flac"},
        {"bytes": None, "path": "clips/x.wav"},
        {"bytes": None, "path": None},
    ]
    path = parquet(tmp_path / "hf.parquet", {"audio": pa.array([*rows, None], kind)})
    found = read(path)
    assert [sample.recording_id for sample in found] == [
        f"{path}#0/y.flac",
        f"{path}#1/x.wav",
        f"{path}#2",
        f"{path}#3",
    ]
    assert [content(sample) for sample in found[:2]] == [b"inside", b"beside"]
    assert all(sample.error and sample.error.startswith("no_audio") for sample in found[2:])
    strings = parquet(tmp_path / "s.parquet", {"file": ["clips/x.wav", "gone.wav", str(tmp_path / "clips/x.wav")]})
    found = read(strings, audio_column="file")
    assert content(found[0]) == content(found[2]) == b"beside"
    with pytest.raises(FileUnavailableError, match="gone"):
        content(found[1])


def test_parquet_columns_that_are_not_there(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", {"wave": [b"x"], "text": ["x"], "number": [1]})
    with pytest.raises(ConfigError, match=r"p\.parquet has no column 'audio'; it has wave, text, number"):
        planned(path)
    with pytest.raises(ConfigError, match="no column 'sentence'"):
        planned(path, audio_column="wave", text_column="sentence")
    with pytest.raises(ConfigError, match="column 'number' is int64; audio is binary"):
        planned(path, audio_column="number")
    path.write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=r"p\.parquet is no Parquet file"):
        planned(path)


MANIFEST = [
    '{"audio_filepath": "x.wav", "duration": 20, "text": "one", "lang": "en"}',
    '{"audio_filepath": "x.wav", "offset": 1.25, "duration": 0.1, "text": "two"}',
    "",
    '{"audio_filepath": "x.wav", "offset": 1.25, "duration": 0.1}',
    '{"audio_filepath": "/abs/y.wav", "offset": 0.5}',
    "no json",
    "[1]",
    '{"path": "x.wav"}',
    '{"audio_filepath": "x.wav", "duration": "long"}',
    '{"audio_filepath": "s3://b/z.wav", "language": "German"}',
]


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz", "m.json", "m.json.gz"])
@pytest.mark.parametrize("target_s", [1800.0, 40.0])
def test_manifest(tmp_path: Path, name: str, target_s: float) -> None:
    path = tmp_path / name
    data = "\n".join(MANIFEST).encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (tmp_path / "x.wav").write_bytes(b"x")
    assert len(planned(path, target_s)) == (1 if target_s > 100 else 7)
    found = read(path, target_s)
    x = f"{tmp_path}/x.wav"
    assert target_s < 100 or [sample.recording_id for sample in found] == [
        f"{x}#t=0-20",
        f"{x}#t=1.25-1.35",
        f"{x}#t=1.25-1.35~2",
        "/abs/y.wav#t=0.5-",
        f"{path}#6",
        f"{path}#7",
        f"{path}#8",
        f"{path}#9",
        "s3://b/z.wav",
    ]
    assert [(sample.offset_s, sample.duration_s) for sample in found[:4]] == [
        (0, 20),
        (1.25, 0.1),
        (1.25, 0.1),
        (0.5, None),
    ]
    assert (found[0].text_ref, found[0].language, found[8].language) == ("one", "en", "German")
    assert content(found[0]) == b"x"
    errors = [sample.error or "" for sample in found[4:8]]
    for error, number, what in zip(
        errors, (6, 7, 8, 9), ("is no JSON", "is a JSON list", "its keys are path", "has duration 'long'"), strict=True
    ):
        assert error.startswith(f"bad_manifest_line: {path}:{number} ") and what in error


def test_a_manifest_that_changed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"audio_filepath": "a.wav"}\n')
    (split,) = planned(path)
    path.write_text('{"audio_filepath": "b.wav"}\n')
    with pytest.raises(StorageError, match="changed since the job was planned"):
        list(samples(split, {}))


def test_stretches_of_one_remote_file_fetch_it_once(
    s3_options: storage.Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("s3", **s3_options["s3"])
    fs.mkdir("long")
    fs.pipe_file("long/a.wav", b"audio")
    lines = [json.dumps({"audio_filepath": "a.wav", "offset": i, "duration": 1}) for i in range(5)]
    fs.pipe_file("long/m.jsonl", "\n".join(lines).encode())
    calls = []
    real = storage.fetch

    def counted(url: str, options: storage.Options) -> BinaryIO:
        calls.append(url)
        return real(url, options)

    monkeypatch.setattr(storage, "fetch", counted)
    assert [content(sample) for sample in read("s3://long/m.jsonl", options=s3_options)] == [b"audio"] * 5
    assert calls == ["s3://long/a.wav"]


def test_a_folder_is_what_it_holds(tmp_path: Path) -> None:
    for name in ("tars", "pq", "nothing"):
        (tmp_path / name).mkdir()
    write_tar(tmp_path / "tars/b.tar", MEMBERS)
    write_tar(tmp_path / "tars/a.tar.gz", MEMBERS, "w:gz")
    (tmp_path / "tars/README.txt").write_text("hello")
    parquet(tmp_path / "pq/x.parquet", {"audio": [b"x"]})
    assert [split.items[0][0][-8:] for split in planned(tmp_path / "tars")] == ["a.tar.gz", "rs/b.tar"]
    assert [split.kind for split in planned(tmp_path / "pq")] == ["parquet"]
    (tmp_path / "tars/c.wav").write_bytes(wav())
    with pytest.raises(ConfigError, match=r"tars: holds webdataset \(.*a\.tar\.gz\) and files \(.*c\.wav\)"):
        planned(tmp_path / "tars")
    assert [split.kind for split in planned(tmp_path / "tars", kind="files")] == ["files"]
    assert len(planned(tmp_path / "tars", kind="webdataset")) == 2
    assert len(planned(tmp_path / "tars/*.tar")) == 1
    for path in (tmp_path / "nothing", tmp_path / "*.ogg"):
        with pytest.raises(ConfigError, match=r"inputs\[0\] .*: nothing to read there; looked for \.tar"):
            planned(path)
    with pytest.raises(ConfigError, match=r"looked for \.jsonl"):
        planned(tmp_path / "pq", kind="manifest")
    with pytest.raises(FileUnavailableError, match="gone"):
        planned(tmp_path / "gone")


def test_a_literal_file_of_any_name_is_read_as_its_kind(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "shard-0001", MEMBERS)
    with pytest.raises(ConfigError, match="nothing to read"):
        planned(path)
    assert len(planned(path, kind="webdataset")) == 1
    (tmp_path / "talk.unknown").write_bytes(wav())
    assert len(planned(tmp_path / "talk.unknown", kind="files")) == 1


def test_an_input_named_twice_is_planned_once(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", MEMBERS)
    inputs = [InputConfig(path=str(path)), InputConfig(path=f"{tmp_path}/*.tar")]
    assert len(list(plan(inputs, {}, 1800))) == 1


def test_sidecars() -> None:
    assert read_sidecars([("a.json", b"\xff{"), ("a.txt", b"x")]) == ("x", None)
    assert read_sidecars([("a.json", b'{"transcript": "t", "language": 3}')]) == ("t", None)
    assert read_sidecars([("a.txt", b"later"), ("a.json", b'{"text": "first", "lang": "de"}')]) == ("later", "de")
    assert read_sidecars([]) == (None, None)


def test_sentences_of_a_sidecar_are_whole_or_none() -> None:
    said = {"text": "One.", "offset": 0.5, "duration": 1}
    assert read_sentences([("a.txt", b"x"), ("a.json", json.dumps({"sentences": [said]}).encode())]) == [said]
    for wrong in ({"offset": -1}, {"duration": "1"}, {"text": None}, {"offset": float("nan")}):
        assert read_sentences([("a.json", json.dumps({"sentences": [said, said | wrong]}).encode())]) == []
    assert read_sentences([("a.json", b'{"sentences": 3}'), ("b.json", b'"sentences"')]) == []


@given(st.lists(st.sampled_from(["a", "a~2", "a~3", "b"])))
def test_ids_are_unique_and_depend_on_the_order_alone(names: list[str]) -> None:
    first, second = UniqueIds(), UniqueIds()
    ids = [first.claim(name) for name in names]
    assert len(set(ids)) == len(ids)
    assert ids == [second.claim(name) for name in names]


@settings(deadline=None)
@given(st.lists(st.floats(0, 100, allow_subnormal=False)), st.floats(1, 100), st.none() | st.integers(1, 5))
def test_runs_partition_the_items(seconds: list[float], target_s: float, max_items: int | None) -> None:
    filler = Filler(target_s, max_items)
    runs = [filler.run_of(item) for item in seconds]
    assert all(after - before in (0, 1) for before, after in pairwise([0, *runs]))
    for run in set(runs):
        members = [item for item, number in zip(seconds, runs, strict=True) if number == run]
        assert len(members) == 1 or sum(members) <= target_s * (1 + 1e-9)
        assert max_items is None or len(members) <= max_items
