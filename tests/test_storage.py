"""Storage and listing on local disk, in fsspec's memory filesystem, and against moto's S3 server."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from botocore.exceptions import ClientError
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import listing, retry, storage
from pipeline.storage import FileUnavailableError, StorageError


@pytest.fixture(params=["local", "s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, storage.Options]:
    """An empty folder on each kind of store, and the options to reach it."""
    if request.param == "local":
        return str(tmp_path), {}
    name = f"bucket-{abs(hash(request.node.nodeid))}"
    if request.param == "memory":
        return f"memory:///{name}", {}
    options = request.getfixturevalue("s3_options")
    fsspec.filesystem("s3", **options["s3"]).mkdir(name)
    return f"s3://{name}/run", options


def put(folder: str, options: storage.Options, *names: str) -> None:
    for name in names:
        storage.write_bytes(f"{folder}/{name}", name.encode(), options)


def urls(path: str, options: storage.Options) -> list[str]:
    return [info.url for info in listing.iter_files(path, options)]


def test_one_writer_wins(store: tuple[str, storage.Options]) -> None:
    folder, options = store
    url = f"{folder}/units/a.parquet"
    assert storage.commit(url, b"first", options)
    assert not storage.commit(url, b"second", options)
    assert storage.read_bytes(url, options) == b"first"
    assert storage.exists(url, options)
    assert not storage.exists(f"{folder}/units/b.parquet", options)
    assert listing.file_names(f"{folder}/units", options) == ["a.parquet"]


def test_a_local_file_is_committed(store: tuple[str, storage.Options], tmp_path: Path) -> None:
    folder, options = store
    source = tmp_path / "elsewhere"
    source.write_bytes(b"x" * 3_000_000)
    assert storage.commit(f"{folder}/big", source, options)
    assert not storage.commit(f"{folder}/big", source, options)
    assert storage.read_bytes(f"{folder}/big", options) == source.read_bytes()


def test_write_replaces(store: tuple[str, storage.Options]) -> None:
    folder, options = store
    storage.write_bytes(f"{folder}/run.json", b"old", options)
    storage.write_bytes(f"{folder}/run.json", b"new", options)
    assert storage.read_bytes(f"{folder}/run.json", options) == b"new"
    assert listing.file_names(folder, options) == ["run.json"]


@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
def test_sixteen_writers_one_commit(store: tuple[str, storage.Options]) -> None:
    folder, options = store
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: storage.commit(f"{folder}/unit", b"%d" % i, options), range(16)))
    assert sum(won) == 1
    assert storage.read_bytes(f"{folder}/unit", options) == b"%d" % won.index(True)
    assert listing.file_names(folder, options) == ["unit"]


def test_reading_and_seeking(store: tuple[str, storage.Options]) -> None:
    folder, options = store
    storage.write_bytes(f"{folder}/a", bytes(range(256)) * 1000, options)
    with storage.open_read(f"{folder}/a", options) as file:
        assert file.seekable()
        file.seek(255_000)
        assert file.read(3) == bytes([24, 25, 26])
    with storage.fetch(f"{folder}/a", options) as copy:
        assert copy.read() == bytes(range(256)) * 1000


def test_listing(store: tuple[str, storage.Options]) -> None:
    folder, options = store
    put(folder, options, "b.wav", "a.wav", "sub/c.wav", "sub/deep/d.flac", "a1.tar", "a2.tar")
    top = [f"{folder}/{name}" for name in ("a.wav", "a1.tar", "a2.tar", "b.wav")]
    every = [*top, f"{folder}/sub/c.wav", f"{folder}/sub/deep/d.flac"]
    assert urls(folder, options) == every
    assert urls(f"{folder}/", options) == every
    assert [info.num_bytes for info in listing.iter_files(folder, options)] == [5, 6, 6, 5, 9, 15]
    assert urls(f"{folder}/*.wav", options) == [f"{folder}/a.wav", f"{folder}/b.wav"]
    assert urls(f"{folder}/a?.tar", options) == [f"{folder}/a1.tar", f"{folder}/a2.tar"]
    assert urls(f"{folder}/*/*.wav", options) == [f"{folder}/sub/c.wav"]
    assert urls(f"{folder}/**/*.wav", options) == [f"{folder}/a.wav", f"{folder}/b.wav", f"{folder}/sub/c.wav"]
    assert urls(f"{folder}/a{{2..1}}.tar", options) == [f"{folder}/a2.tar", f"{folder}/a1.tar"]
    assert urls(f"{folder}/{{b,a}}.wav", options) == [f"{folder}/b.wav", f"{folder}/a.wav"]
    assert urls(f"{folder}/sub", options) == [f"{folder}/sub/c.wav", f"{folder}/sub/deep/d.flac"]
    assert urls(f"{folder}/*.ogg", options) == []
    assert listing.file_names(folder, options) == ["a.wav", "a1.tar", "a2.tar", "b.wav"]
    assert listing.file_names(f"{folder}/none", options) == []


def test_what_is_missing_is_named(store: tuple[str, storage.Options]) -> None:
    folder, options = store
    put(folder, options, *(f"{i:03d}.tar" for i in range(20)))
    names = [f"{folder}/{i:03d}.tar" for i in range(20)]
    assert urls(f"{folder}/{{000..019}}.tar", options) == names
    with pytest.raises(FileUnavailableError, match=r"020\.tar: no such file") as failure:
        urls(f"{folder}/{{000..020}}.tar", options)
    assert failure.value.code == "missing_file"
    for read in (storage.read_bytes, storage.fetch):
        with pytest.raises(FileUnavailableError, match=r"gone\.wav: no such file"):
            read(f"{folder}/gone.wav", options)


def test_a_listing_is_never_stale(store: tuple[str, storage.Options]) -> None:
    folder, options = store
    for i in range(3):
        assert len(listing.file_names(folder, options)) == i
        storage.commit(f"{folder}/{i}", b"", options)


def test_s3_pages(s3_options: storage.Options, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, _ = storage.filesystem("s3://pages", s3_options)
    fs.mkdir("pages")
    for i in range(7):
        fs.pipe_file(f"pages/{i}", b"")
    pages, real = [], fs.call_s3

    def two_a_page(method: str, **kwargs: Any) -> dict[str, Any]:
        pages.append(real(method, MaxKeys=2, **kwargs))
        return dict(pages[-1])

    monkeypatch.setattr(fs, "call_s3", two_a_page)
    files = listing.iter_files("s3://pages/", s3_options)
    assert next(files).url == "s3://pages/0"
    assert len(pages) == 1  # lazily
    assert [info.url for info in files] == [f"s3://pages/{i}" for i in range(1, 7)]
    assert len(pages) == 4


def test_a_store_without_conditional_put(s3_options: storage.Options, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, _ = storage.filesystem("s3://plain", s3_options)
    fs.mkdir("plain")
    modes, real = [], fs.pipe_file

    def refusing(path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        modes.append(mode)
        if mode == "create":
            cause = ClientError({"Error": {"Code": "NotImplemented", "Message": "header"}}, "PutObject")
            raise OSError("header not implemented") from cause
        real(path, value, **kwargs)

    monkeypatch.setattr(fs, "pipe_file", refusing)
    assert storage.commit("s3://plain/a", b"1", s3_options)
    assert not storage.commit("s3://plain/a", b"2", s3_options)
    assert modes == ["create", "overwrite", "create"]
    assert storage.read_bytes("s3://plain/a", s3_options) == b"1"


def test_errors_say_what_would_be_right(s3_options: storage.Options) -> None:
    with pytest.raises(StorageError, match=r"nosuch://b/a: Protocol not known.*storage\.options\.nosuch"):
        storage.read_bytes("nosuch://b/a", {})
    with pytest.raises(StorageError, match="brace"):
        urls("/data/{1..3.tar", {})
    with pytest.raises(FileUnavailableError, match="no-such-bucket"):
        listing.file_names("s3://no-such-bucket/run", s3_options)
    with pytest.raises(FileUnavailableError, match="no-such-bucket"):
        storage.commit("s3://no-such-bucket/run/a", b"", s3_options)


def test_no_credentials(s3_options: storage.Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    options = {"s3": {"endpoint_url": s3_options["s3"]["endpoint_url"], "skip_instance_cache": True}}
    before = retry.num_retries()
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID.*anon: true"):
        storage.read_bytes("s3://private/a", options)
    assert retry.num_retries() == before


def test_an_unreachable_store_is_no_missing_file() -> None:
    options = {
        "s3": {
            "endpoint_url": "http://127.0.0.1:9",
            "key": "a",
            "secret": "b",
        },
        "retry": {"attempts": 2, "first_wait_s": 0.01},
    }
    with pytest.raises(StorageError, match="s3://b/a: .*127.0.0.1:9.*, given up after 2 tries") as failure:
        storage.read_bytes("s3://b/a", options)
    assert not isinstance(failure.value, FileUnavailableError)


def test_local_names_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("a/b.tar") == storage.resolve(f"file://{tmp_path}/a/b.tar") == f"{tmp_path}/a/b.tar"
    assert storage.resolve("s3://b/k/") == "s3://b/k"
    assert storage.join("s3://b/k", "x.wav") == "s3://b/k/x.wav"
    assert storage.join("s3://b/k", "/x.wav") == "/x.wav"
    assert storage.join("/k", "s3://b/x.wav") == "s3://b/x.wav"


def test_a_name_with_magic_characters_is_taken_as_written(tmp_path: Path) -> None:
    put(str(tmp_path), {}, "a[1].wav", "a1.wav", "{x,y}.wav")
    assert urls(f"{tmp_path}/a[1].wav", {}) == [f"{tmp_path}/a[1].wav"]
    assert urls(f"{tmp_path}/{{x,y}}.wav", {}) == [f"{tmp_path}/{{x,y}}.wav"]


def test_links(tmp_path: Path) -> None:
    put(str(tmp_path), {}, "real/a.wav")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real/up").symlink_to(tmp_path)
    (tmp_path / "dangling.wav").symlink_to(tmp_path / "gone.wav")
    assert urls(str(tmp_path), {}) == [f"{tmp_path}/{name}" for name in ("dangling.wav", "link/a.wav", "real/a.wav")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_local_file_that_may_not_be_read(tmp_path: Path) -> None:
    put(str(tmp_path), {}, "a.wav")
    (tmp_path / "a.wav").chmod(0)
    with pytest.raises(FileUnavailableError, match="may not read") as failure:
        storage.fetch(f"{tmp_path}/a.wav", {})
    assert failure.value.code == "permission_denied"


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(KeyboardInterrupt):
        storage.commit(f"{tmp_path}/unit", b"x", {})
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 4), st.lists(st.sampled_from("abc"), min_size=2))
def test_braces(first: int, last: int, width: int, letters: list[str]) -> None:
    path = f"/d/{{{first:0{width}d}..{last:0{width}d}}}-{{{','.join(letters)}}}.tar"
    numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
    padded = max(len(f"{first:0{width}d}"), len(f"{last:0{width}d}")) if width > 1 else 1
    found = list(listing.expand(path))
    assert len(found) == len(numbers) * len(letters)
    assert [int(name[3:].split("-")[0]) for name in found] == [n for n in numbers for _ in letters]
    if f"{first:0{width}d}".startswith("0") and width > 1:
        assert all(len(name[3:].split("-")[0]) == padded for name in found)
