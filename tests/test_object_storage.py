"""A real object store (radosgw), and the same one behind a proxy that breaks requests and answers."""

from __future__ import annotations

import io
import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from rich.console import Console

from jobs import transcribe as job
from pipeline import listing, retry, storage
from pipeline.config import RetryConfig, StorageConfig, TranscribeConfig
from pipeline.output import Output
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.storage import FileUnavailableError, StorageError
from pipeline.summary import summarize
from tests.conftest import make_config, write_tar
from tests.engine.tiny import noise
from tests.fault_proxy import (
    BODY_FAULTS,
    FAULTS,
    HARMLESS,
    UPLOAD_FAULTS,
    Fault,
    FaultProxy,
    Request,
    in_order,
    no_faults,
    seeded_plan,
)
from tests.radosgw import Server

BLOCK = 8 << 20
QUICK = {"attempts": 4, "first_wait_s": 0.02, "max_wait_s": 1.0, "timeout_s": 30.0}
IMPATIENT = QUICK | {"timeout_s": 1.0}
STALLS: tuple[Fault, ...] = ("stall_before", "stall_middle")


@pytest.fixture(scope="module")
def bucket(object_store: Server) -> str:
    """`s3://...` of a bucket that the tests of this module share; each has a prefix of its own."""
    fs, _ = storage.filesystem("s3://shared", object_store.options)
    fs.mkdir("shared")
    return "s3://shared"


@pytest.fixture(scope="module")
def many(bucket: str, object_store: Server) -> list[str]:
    """The URLs of 2,500 objects of one byte, in order."""
    fs, _ = storage.filesystem(bucket, object_store.options)
    names = [f"{bucket}/many/{i:04d}.wav" for i in range(2500)]
    fs.pipe(dict.fromkeys(names, b"x"), batch_size=16)
    return names


@pytest.fixture(scope="module")
def big(bucket: str, object_store: Server) -> tuple[str, bytes]:
    """A URL and the 30 MB behind it, put there in six parts."""
    data = random.Random(1).randbytes(30_000_000)
    fs, path = storage.filesystem(f"{bucket}/big.tar", object_store.options)
    fs.pipe_file(path, data, chunksize=5 << 20)
    assert fs.info(path)["ETag"].strip('"').endswith("-6"), "six parts"
    return f"{bucket}/big.tar", data


@pytest.fixture
def options(object_store: Server, fault_proxy: FaultProxy, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Through the proxy, with short waits; a short timeout only where the test stalls, as a busy machine may, too."""
    fault = getattr(request.node, "callspec", None) and request.node.callspec.params.get("fault")
    return connected(object_store, fault_proxy, IMPATIENT if fault in STALLS else QUICK)


def connected(store: Server, proxy: FaultProxy, policy: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options whose client exists: making one takes a second on a busy machine, and an upload's deadline counts it."""
    options = store.options_at(proxy.url) | {"retry": policy}
    storage.filesystem("s3://shared", options)[0].connect()
    return options


@pytest.fixture
def retries() -> Iterator[Any]:
    """A function that says how many requests were made again since the test began."""
    before = retry.num_retries()
    yield lambda: retry.num_retries() - before


def test_more_than_a_thousand_keys_are_listed_page_by_page(
    bucket: str, many: list[str], options: storage.Options, fault_proxy: FaultProxy
) -> None:
    found = listing.iter_files(f"{bucket}/many/*.wav", options)
    assert next(found).url == many[0]
    assert fault_proxy.requests == {"GET": 1}, "lazily"
    assert [info.url for info in found] == many[1:]
    assert fault_proxy.requests == {"GET": 3}, "2,500 keys, 1,000 a page"
    assert [info.url for info in listing.iter_files(f"{bucket}/many", options)] == many
    assert listing.file_names(f"{bucket}/many", options) == [url.rsplit("/", 1)[1] for url in many]
    braces = listing.iter_files(f"{bucket}/many/{{0990..1010}}.wav", options)
    assert [info.url for info in braces] == many[990:1011]


def test_a_multipart_object_is_read_by_ranges(big: tuple[str, bytes], options: storage.Options) -> None:
    url, data = big
    part = 5 << 20
    with storage.open_read(url, options) as file:
        for start, end in (
            (part - 3, part + 3),
            (BLOCK - 1, BLOCK + 1),
            (0, 1),
            (29_999_990, 30_000_000),
            (7, 2 * BLOCK),
        ):
            file.seek(start)
            assert file.read(end - start) == data[start:end]
    with storage.fetch(url, options) as copy:
        assert copy.read() == data


def test_a_range_costs_no_more_than_its_blocks(
    big: tuple[str, bytes], options: storage.Options, fault_proxy: FaultProxy
) -> None:
    url, data = big
    with storage.open_read(url, options) as file:
        file.seek(20_000_000)
        assert file.read(100) == data[20_000_000:20_000_100]
        assert fault_proxy.num_body_bytes == BLOCK and fault_proxy.requests == {"HEAD": 1, "GET": 1}
        file.seek(29_000_000)
        file.read()
        assert fault_proxy.num_body_bytes == BLOCK + (30_000_000 - 3 * BLOCK), "the last block is a short one"
        file.seek(20_000_000)
        file.read(100)
        assert fault_proxy.requests == {"HEAD": 1, "GET": 2}, "a block that was just read is still there"


def test_of_sixteen_writers_one_wins(bucket: str, object_store: Server) -> None:
    url = f"{bucket}/race/unit.parquet"
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: storage.commit(url, b"%d" % i * 1000, object_store.options), range(16)))
    assert won.count(True) == 1 and won.count(False) == 15
    assert storage.read_bytes(url, object_store.options) == b"%d" % won.index(True) * 1000
    assert listing.file_names(f"{bucket}/race", object_store.options) == ["unit.parquet"]


@pytest.mark.parametrize("wrong", ["secret", "key"])
def test_wrong_credentials_are_refused_in_one_line_without_them(
    bucket: str, object_store: Server, wrong: str, retries: Any
) -> None:
    hidden = {"key": object_store.key, "secret": object_store.secret} | {wrong: "hush-hush-" * 3}
    options = {"s3": object_store.options["s3"] | hidden}
    url = f"{bucket}/any"
    for act in (
        lambda: storage.read_bytes(url, options),
        lambda: storage.open_read(url, options),
        lambda: storage.exists(url, options),
        lambda: storage.write_bytes(url, b"", options),
        lambda: storage.commit(url, b"", options),
        lambda: list(listing.iter_files(f"{bucket}/*", options)),
    ):
        # the answer to a HEAD has no body that could say why
        with pytest.raises(StorageError, match=r"(credentials refused|access denied) \(.+\).* Set AWS_") as caught:
            act()
        message = str(caught.value)
        assert message.startswith("s3://shared/") and "\n" not in message and "None" not in message
        assert not any(value in message for value in hidden.values())
        assert not isinstance(caught.value, FileUnavailableError), "the file may be fine"
    assert retries() == 0


def test_an_object_that_vanishes_while_it_is_read(bucket: str, options: storage.Options, retries: Any) -> None:
    url = f"{bucket}/vanishes"
    storage.write_bytes(url, b"x" * (BLOCK + 1), options)
    with storage.open_read(url, options) as file:
        assert file.read(1) == b"x"
        storage.filesystem(url, options)[0].rm_file("shared/vanishes")
        file.seek(BLOCK)
        with pytest.raises(FileUnavailableError, match="s3://shared/vanishes: no such file") as caught:
            file.read(1)
    assert caught.value.code == "missing_file"
    with pytest.raises(FileUnavailableError, match="s3://shared/vanishes: no such file"):
        storage.read_bytes(url, options)
    assert retries() == 0


def test_an_object_that_is_replaced_while_it_is_read_is_no_mixture(bucket: str, options: storage.Options) -> None:
    url = f"{bucket}/replaced"
    storage.write_bytes(url, b"a" * (BLOCK + 1), options)
    with storage.open_read(url, options) as file:
        file.read(1)
        storage.write_bytes(url, b"b" * (BLOCK + 1), options)
        file.seek(BLOCK)
        with pytest.raises(StorageError, match="s3://shared/replaced: PreconditionFailed") as caught:
            file.read(1)
    assert not isinstance(caught.value, FileUnavailableError)


def test_a_bucket_that_does_not_exist(options: storage.Options, retries: Any) -> None:
    url = "s3://no-such-bucket/run/a"
    for act in (
        lambda: storage.read_bytes(url, options),
        lambda: storage.commit(url, b"", options),
        lambda: listing.file_names("s3://no-such-bucket/run", options),
        lambda: list(listing.iter_files("s3://no-such-bucket/x-{0..30}.tar", options)),
    ):
        with pytest.raises(FileUnavailableError, match="s3://no-such-bucket.*: no such file or folder"):
            act()
    assert retries() == 0


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in UPLOAD_FAULTS])
def test_a_broken_read_is_made_whole(
    big: tuple[str, bytes], options: storage.Options, fault_proxy: FaultProxy, fault: Fault, retries: Any
) -> None:
    url, data = big
    fault_proxy.plan = in_order([None, fault], method="GET")
    with storage.fetch(url, options) as copy:
        assert copy.read() == data
    num_retries = 0 if fault in HARMLESS else 1
    assert fault_proxy.injected == {fault: 1} and retries() == num_retries
    assert fault_proxy.requests == {"HEAD": 1, "GET": 4 + num_retries}, "four blocks, and only the broken one again"


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in BODY_FAULTS + UPLOAD_FAULTS])
def test_a_broken_look_is_made_again(
    big: tuple[str, bytes], options: storage.Options, fault_proxy: FaultProxy, fault: Fault, retries: Any
) -> None:
    url, data = big
    fault_proxy.plan = in_order([fault], method="HEAD")
    assert storage.exists(url, options)
    fault_proxy.plan = in_order([fault], method="HEAD")
    with storage.open_read(url, options) as file:
        assert file.read(10) == data[:10]
    fault_proxy.plan = in_order([fault], method="HEAD")
    (info,) = listing.iter_files(url, options)
    assert info.num_bytes == len(data)
    assert retries() == 3 and fault_proxy.requests == {"HEAD": 6, "GET": 1}


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in BODY_FAULTS])
def test_a_broken_commit_counts_as_committed_once(
    bucket: str, options: storage.Options, fault_proxy: FaultProxy, fault: Fault, retries: Any
) -> None:
    url = f"{bucket}/commits/{fault}"
    body = fault.encode() * 100_000
    fault_proxy.plan = in_order([fault], method="PUT")
    assert storage.commit(url, body, options), "also where the answer was lost and the second try finds the first's"
    assert fault_proxy.injected == {fault: 1} and retries() == 1 and fault_proxy.requests["PUT"] == 2
    assert storage.read_bytes(url, options) == body
    assert not storage.commit(url, b"another's", options)
    assert storage.read_bytes(url, options) == body


def test_a_commit_made_again_does_not_claim_anothers_object(
    bucket: str, options: storage.Options, fault_proxy: FaultProxy
) -> None:
    url = f"{bucket}/commits/anothers"
    assert storage.commit(url, b"another's", options)
    fault_proxy.plan = in_order(["error_500", "lost"], method="PUT")
    assert not storage.commit(url, b"ours", options)
    assert storage.read_bytes(url, options) == b"another's"


def test_a_broken_page_of_a_listing_is_asked_for_again(
    bucket: str, many: list[str], object_store: Server, fault_proxy: FaultProxy, retries: Any
) -> None:
    options = connected(object_store, fault_proxy, IMPATIENT)
    faults = [fault for fault in FAULTS if fault not in UPLOAD_FAULTS]
    for first, second in zip(faults[::2], faults[1::2], strict=False):
        fault_proxy.plan = in_order([first, None, second], method="GET")
        assert [info.url for info in listing.iter_files(f"{bucket}/many/", options)] == many
    assert retries() >= fault_proxy.num_harmful > 5


@pytest.mark.parametrize("act", ["read", "open", "block", "exists", "write", "commit", "list"])
def test_tries_do_not_multiply(
    big: tuple[str, bytes], options: storage.Options, fault_proxy: FaultProxy, act: str
) -> None:
    """s3fs would try five times and botocore five times below each of them."""
    url, _ = big
    folder = url.rsplit("/", 1)[0]
    if act == "block":
        file = storage.open_read(url, options)
        fault_proxy.requests.clear()
    fault_proxy.plan = lambda request: "slow_down" if request.seen % 2 else "error_500"
    fault_proxy.retry_after_s = 0
    acts: dict[str, Any] = {
        "read": lambda: storage.read_bytes(url, options),
        "open": lambda: storage.open_read(url, options),
        "block": lambda: file.read(1),
        "exists": lambda: storage.exists(url, options),
        "write": lambda: storage.write_bytes(f"{folder}/never", b"x", options),
        "commit": lambda: storage.commit(f"{folder}/never", b"x", options),
        "list": lambda: list(listing.iter_files(f"{folder}/*", options)),
    }
    with pytest.raises(StorageError, match="s3://shared/.*, given up after 4 tries"):
        acts[act]()
    assert fault_proxy.requests.total() == QUICK["attempts"]


def test_a_throttled_request_waits_as_long_as_it_is_told(
    bucket: str, options: storage.Options, fault_proxy: FaultProxy
) -> None:
    storage.write_bytes(f"{bucket}/throttled", b"x", options)
    fault_proxy.plan = in_order(["slow_down", "too_many"], method="PUT")
    began = time.monotonic()
    storage.write_bytes(f"{bucket}/throttled", b"y", options)
    assert 2 <= time.monotonic() - began < 4, "Retry-After: 1, twice; the policy's own waits are below 0.1 s"


@pytest.mark.parametrize("fault", ["slow_down", "reset_middle", "partial", "stall_middle"])
def test_plain_http_is_read_by_the_same_policy(
    bucket: str, options: dict[str, Any], fault_proxy: FaultProxy, fault: Fault, retries: Any
) -> None:
    data = random.Random(2).randbytes(BLOCK + 1_000_000)
    storage.filesystem(bucket, options)[0].pipe_file("shared/public.wav", data, ACL="public-read")
    fault_proxy.plan = in_order([None, fault], method="GET")
    policy = options["retry"]
    with storage.fetch(f"{fault_proxy.url}/shared/public.wav", {"retry": policy}) as copy:
        assert copy.read() == data
    assert fault_proxy.injected == {fault: 1} and retries() == 1
    with pytest.raises(StorageError, match="/shared/none.wav: access denied"):  # who may not list is not told more
        storage.fetch(f"{fault_proxy.url}/shared/none.wav", {"retry": policy})
    assert retries() == 1


def test_a_pause_shorter_than_the_timeout_is_no_fault(
    big: tuple[str, bytes], object_store: Server, fault_proxy: FaultProxy, retries: Any
) -> None:
    options = connected(object_store, fault_proxy, QUICK | {"timeout_s": 2.0})
    fault_proxy.slow_s = 4.0
    fault_proxy.plan = in_order(["slow"], method="GET")
    with storage.open_read(big[0], options) as file:
        assert file.read(BLOCK) == big[1][:BLOCK]
    assert retries() == 0, "4 s in all, never 2 s without a byte"


def test_a_store_that_takes_no_byte_of_an_upload_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_SLOWEST_UPLOAD", 1e9)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        endpoint = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        options = {"s3": {"endpoint_url": endpoint, "key": "a", "secret": "b"}, "retry": IMPATIENT | {"attempts": 2}}
        began = time.monotonic()
        with pytest.raises(StorageError, match="s3://b/k: .*[Tt]ime.*, given up after 2 tries"):
            storage.commit("s3://b/k", b"x" * (32 << 20), options)
        assert time.monotonic() - began < 30


def test_thirty_seconds_of_silence_are_within_the_default_timeout(object_store: Server) -> None:
    fs, _ = storage.filesystem("s3://shared", object_store.options | {"retry": RetryConfig().model_dump()})
    fs.connect()
    timeout = fs.s3._endpoint.http_session._timeout
    assert timeout.sock_read == 60 and timeout.sock_connect == 10
    assert fs.s3.meta.config.retries["total_max_attempts"] == 1 == fs.retries


def test_secrets_stay_out_of_logs_and_errors(
    bucket: str, object_store: Server, fault_proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    options = object_store.options_at(fault_proxy.url) | {"retry": QUICK | {"attempts": 2, "timeout_s": 0.2}}
    texts = []
    fault_proxy.retry_after_s = 0
    with caplog.at_level("WARNING"):
        for fault in FAULTS:
            fault_proxy.plan = lambda request, fault=fault: fault  # type: ignore[misc]
            for act in (
                lambda: storage.read_bytes(f"{bucket}/none", options),
                lambda: storage.commit(f"{bucket}/none-{fault}", b"x", options),  # noqa: B023
            ):
                try:
                    act()
                except StorageError as error:
                    texts.append(str(error))
    texts += [record.getMessage() for record in caplog.records]
    assert len(texts) > 30 and all("s3://shared/none" in text for text in texts)
    for text in texts:
        assert object_store.secret not in text and object_store.key not in text and "\n" not in text


@pytest.fixture(scope="module")
def archive(
    bucket: str, object_store: Server, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path
) -> tuple[TranscribeConfig, list[dict[str, Any]]]:
    """Sixty recordings of noise in tars, a folder with sidecars, Parquet and a manifest; the configuration of a job on
    them, and the rows of an undisturbed run."""
    folder = tmp_path_factory.mktemp("archive")
    (folder / "loose").mkdir()
    for shard in range(4):
        write_tar(folder / f"x-{shard:05d}.tar", [2.0 + i % 3 for i in range(9)], prefix=f"s{shard}")
    for i in range(12):
        soundfile.write(folder / "loose" / f"{i:02d}.flac", noise(2.5, seed=i), SAMPLE_RATE_HZ)
        (folder / "loose" / f"{i:02d}.txt").write_text(f"loose {i}")
    audio = [(folder / "loose" / f"{i:02d}.flac").read_bytes() for i in range(6)]
    pq.write_table(pa.table({"audio": audio, "text": [f"row {i}" for i in range(6)]}), folder / "set.parquet")
    lines = [{"audio_filepath": f"loose/{i:02d}.flac", "offset": 0.5, "duration": 1.5} for i in range(6)]
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    fs, path = storage.filesystem(f"{bucket}/archive", object_store.options)
    fs.put(str(folder), path, recursive=True)
    inputs = [f"{bucket}/archive/{name}" for name in ("x-{00000..00003}.tar", "loose", "set.parquet", "set.jsonl")]
    config = make_config(
        inputs, f"{bucket}/undisturbed", tiny_checkpoint, storage={"options": object_store.options, "retry": QUICK}
    )
    assert job.run(config, Console(quiet=True)) == 0
    return config, rows_of(config, object_store)


def rows_of(config: TranscribeConfig, store: Server) -> list[dict[str, Any]]:
    """What any reader finds in an output, read past the proxy, in the order of segments."""
    client = fsspec.filesystem("s3", **store.options["s3"])
    client.invalidate_cache()
    files = client.glob(f"{config.output}/transcripts/*.parquet")
    rows = pa.concat_tables([pq.read_table(io.BytesIO(client.cat_file(file))) for file in files]).to_pylist()
    return sorted(rows, key=lambda row: str(row["segment_id"]))


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("seed", [1, 2])
def test_a_job_behind_faults_ends_exactly_once_and_says_how_many(
    archive: tuple[TranscribeConfig, list[dict[str, Any]]], object_store: Server, fault_proxy: FaultProxy, seed: int
) -> None:
    undisturbed, expected = archive
    # a request meets up to two faults in a row, and up to three requests make one (a look, a list, a read)
    policy = {"attempts": 8, "first_wait_s": 0.02, "max_wait_s": 1, "timeout_s": 4}
    config = undisturbed.model_copy(
        update={
            "output": f"s3://shared/disturbed-{seed}",
            "storage": StorageConfig.model_validate(
                {"options": object_store.options_at(fault_proxy.url), "retry": policy}
            ),
        }
    )
    fault_proxy.plan = seeded_plan(seed, share=0.2, most_in_a_row=2)
    screen = io.StringIO()
    began = time.monotonic()
    assert job.run(config, Console(file=screen, width=200)) == 0
    wall_s = time.monotonic() - began

    rows = rows_of(config, object_store)
    assert len({row["segment_id"] for row in rows}) == len(rows) == len(expected) == 60
    for row, other in zip(rows, expected, strict=True):
        for name in ("segment_id", "text", "token_ids", "text_ref", "offset", "duration", "status", "unit_id"):
            assert row[name] == other[name]
        assert row["avg_logprob"] == pytest.approx(other["avg_logprob"], abs=1e-4)
    assert config.result_hash() == undisturbed.result_hash()

    lines = screen.getvalue().splitlines()
    said = next(line for line in lines if line.endswith("requests made again in this run"))
    num_retries = int(said.split()[1])
    injected, requests = fault_proxy.injected, fault_proxy.requests
    assert fault_proxy.num_harmful > 10
    # each fault makes one request again; on a busy machine others may run into the timeout
    assert fault_proxy.num_harmful <= num_retries <= 2 * fault_proxy.num_harmful
    summary = summarize(Output(config.output, object_store.options))
    assert 0 < summary.num_retries < num_retries, "the records hold the part that reading took"
    written = storage.read_bytes(f"{config.output}/shardscribe.yaml", object_store.options).decode()
    for text in (screen.getvalue(), written):
        assert object_store.secret not in text and object_store.key not in text
    print(f"\nseed {seed}: {requests.total()} requests {dict(requests)}, {injected.total()} faults {dict(injected)}")
    print(f"{num_retries} retries, {summary.num_retries} of them while reading; {len(rows)} rows of {len(expected)}, "
          f"none lost, none doubled; {wall_s:.1f} s")  # fmt: skip


@pytest.mark.usefixtures("local_ray")
def test_a_store_that_stays_away_ends_the_job_and_the_same_command_goes_on_later(
    archive: tuple[TranscribeConfig, list[dict[str, Any]]], object_store: Server, fault_proxy: FaultProxy
) -> None:
    undisturbed, expected = archive
    policy = {"attempts": 2, "first_wait_s": 0.02}
    access = {"options": object_store.options_at(fault_proxy.url), "retry": policy}
    changed = {"output": "s3://shared/outage", "storage": StorageConfig.model_validate(access)}
    config = undisturbed.model_copy(update=changed)

    def outage(request: Request) -> Fault | None:
        return "error_500" if fault_proxy.requests["PUT"] > 6 else None

    fault_proxy.plan = outage
    with pytest.raises(Exception, match="s3://shared/.*InternalError: injected, given up after 2 tries"):
        job.run(config, Console(quiet=True))
    fault_proxy.plan = no_faults
    before = rows_of(config, object_store)
    assert 0 < len(before) < len(expected)
    assert job.run(config, Console(quiet=True)) == 0
    after = rows_of(config, object_store)
    assert [row["segment_id"] for row in after] == [row["segment_id"] for row in expected]
    assert len({row["run_id"] for row in after}) == 2


def test_a_seeded_plan_does_not_depend_on_the_order_and_spares_every_request_in_the_end() -> None:
    asked = [Request("GET", f"/b/{i}", "", False, seen) for i in range(200) for seen in range(12)]
    drawn = {request: seeded_plan(7, 0.5, most_in_a_row=2)(request) for request in asked}
    plan = seeded_plan(7, 0.5, most_in_a_row=2)
    assert {request: plan(request) for request in reversed(asked)} == drawn
    share = sum(fault is not None for fault in drawn.values()) / len(drawn)
    assert 0.3 < share < 0.5, "half, less what most_in_a_row forbids"
    for i in range(200):
        row = [drawn[Request("GET", f"/b/{i}", "", False, seen)] for seen in range(12)]
        assert all(None in row[start : start + 3] for start in range(10))
    assert not set(drawn.values()) & set(UPLOAD_FAULTS), "a GET has no body to break"
