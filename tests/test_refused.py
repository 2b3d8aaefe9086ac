"""Stores that refuse, fail or stay silent: a row for the recording that it is about, else one clear error."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest

from pipeline import storage
from pipeline.config import TranscribeConfig
from pipeline.read import read_units
from pipeline.sources import fetch
from pipeline.sources.plan import plan
from pipeline.storage import AccessDeniedError, CredentialsError, FileUnavailableError, StorageError, UnreachableError
from pipeline.units import Done
from tests.conftest import write_tar
from tests.fault_proxy import Fault, FaultProxy, Refusal, Request, no_faults
from tests.test_hostile import GOOD

POLICY = {"attempts": 2, "first_wait_s": 0.01, "max_wait_s": 0.02, "timeout_s": 20.0}
IMPATIENT = POLICY | {"timeout_s": 1.0}  # only where a store stays silent, as a busy machine may, too
Fails = Fault | Refusal

CASES: list[tuple[Fails, str]] = [
    ("gone", "missing_file"),
    ("denied", "permission_denied"),
    ("error_500", "unreachable"),
    ("too_many", "unreachable"),
    ("reset_before", "unreachable"),
    ("stall_before", "unreachable"),
]
"""How a store answers for one recording of a manifest, every time, and the reason code of its row."""

INPUT_CASES: list[tuple[Fails, type[StorageError], str]] = [
    ("gone", FileUnavailableError, "no such file"),
    ("denied", AccessDeniedError, "access denied .*(AccessDenied|403)"),
    ("error_500", UnreachableError, "500.*given up after 2 tries|InternalError.*given up after 2 tries"),
    ("stall_before", UnreachableError, "[Tt]ime.*given up after 2 tries"),
    ("reset_before", UnreachableError, "given up after 2 tries"),
]
"""The same about a whole input."""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for name in ("good", "bad", "other"):
        (folder / f"{name}.wav").write_bytes(GOOD)
    write_tar(folder / "a.tar", [0.5])
    return folder


@pytest.fixture(scope="module")
def web(folder: Path) -> Iterator[FaultProxy]:
    """Before a server of `folder`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with FaultProxy(server.server_address[1]) as proxy:
            yield proxy
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def bucket(folder: Path, s3_options: dict[str, dict[str, Any]]) -> Iterator[FaultProxy]:
    """Before an S3 server that has `folder` in the bucket `served`. One for all tests: a client takes long to make."""
    endpoint = s3_options["s3"]["endpoint_url"]
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=endpoint, **keys)
    client.create_bucket(Bucket="served")
    for file in folder.iterdir():
        client.put_object(Bucket="served", Key=file.name, Body=file.read_bytes())
    with FaultProxy(int(endpoint.rpartition(":")[2])) as proxy:
        yield proxy


class Store:
    """A server behind a proxy; `root` is the URL that its files are at."""

    def __init__(self, proxy: FaultProxy, is_s3: bool) -> None:
        self.proxy, self.is_s3 = proxy, is_s3
        self.root = "s3://served" if is_s3 else proxy.url
        self.policy: dict[str, Any] = POLICY
        proxy.plan = no_faults

    def config(self, *inputs: Any) -> TranscribeConfig:
        s3 = {"endpoint_url": self.proxy.url, "key": "refused-key", "secret": "refused-secret"}
        access = {"retry": self.policy, "options": {"s3": s3} if self.is_s3 else {}}
        return TranscribeConfig.model_validate({"inputs": list(inputs), "output": "o", "storage": access})

    def fails(self, fault: Fails | None, *names: str) -> None:
        """This is what it does from now on, for these names or for all."""
        self.policy = IMPATIENT if fault == "stall_before" else POLICY
        self.proxy.plan = lambda request: fault if not names or named(request, names) else None


def named(request: Request, names: Sequence[str]) -> bool:
    return any(f"/{name}" in request.target for name in names)


@pytest.fixture
def s3(bucket: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(fetch, "_stores", {})
    return Store(bucket, is_s3=True)


@pytest.fixture
def http(web: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(fetch, "_stores", {})
    return Store(web, is_s3=False)


@pytest.fixture(params=["http", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def manifest(folder: Path, store: Store, *names: str) -> str:
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps({"audio_filepath": f"{store.root}/{name}"}) + "\n" for name in names))
    return str(path)


def outcomes(config: TranscribeConfig) -> list[str]:
    options = config.storage.access
    units = (u for s in plan(config.inputs, options, 1800.0) for u in read_units(s, Done(), config))
    errors = [recording.error for unit in units for recording in unit.recordings]
    return ["ok" if error is None else error.partition(":")[0] for error in errors]


@pytest.mark.parametrize(("fault", "code"), CASES, ids=[case[0] for case in CASES])
def test_one_recording_of_a_manifest(store: Store, tmp_path: Path, fault: Fails, code: str) -> None:
    store.fails(fault, "bad.wav")
    began = time.monotonic()
    path = manifest(tmp_path, store, "good.wav", "bad.wav", "other.wav", "bad.wav")
    assert outcomes(store.config(path)) == ["ok", code, "ok", code]
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(("fault", "kind", "message"), INPUT_CASES, ids=[case[0] for case in INPUT_CASES])
@pytest.mark.parametrize("name", ["a.tar", "good.wav"])
def test_a_whole_input(store: Store, fault: Fails, kind: type[StorageError], message: str, name: str) -> None:
    store.fails(fault)
    with pytest.raises(kind, match=f"{store.root}.*({message})") as caught:
        outcomes(store.config(f"{store.root}/{name}"))
    assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_a_store_that_is_away_is_no_matter_of_one_recording(store: Store, tmp_path: Path) -> None:
    path = manifest(tmp_path, store, "good.wav", "bad.wav", "other.wav", "bad.wav")
    store.fails("error_500")
    with pytest.raises(
        UnreachableError, match="Nor could the 2 recordings before be read .* run the same command again"
    ):
        outcomes(store.config(path))
    store.fails(None)
    assert outcomes(store.config(path)) == ["ok"] * 4

    def after_the_first(request: Request) -> Fails | None:
        nonlocal away
        away = away or named(request, ["bad.wav"])
        return "error_500" if away else None

    away, store.proxy.plan = False, after_the_first
    with pytest.raises(UnreachableError, match="Nor could what it gave before be read"):
        outcomes(store.config(path))


def test_a_dead_host_ends_the_job_and_does_not_hold_it(http: Store, tmp_path: Path) -> None:
    lines = [json.dumps({"audio_filepath": f"http://127.0.0.1:9/{i}.wav"}) for i in range(200)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    began = time.monotonic()
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9/2\.wav: .*given up after 2 tries"):
        outcomes(http.config(str(tmp_path / "m.jsonl")))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("fault", ["expired", "unknown_key"])
@pytest.mark.parametrize("act", ["manifest", "folder", "tar", "commit", "list"])
def test_credentials_that_expire_are_no_matter_of_a_recording(
    s3: Store, tmp_path: Path, fault: Refusal, act: str
) -> None:
    inputs = {"manifest": manifest(tmp_path, s3, "good.wav", "bad.wav"), "tar": "s3://served/a.tar"}
    config = s3.config(inputs.get(act, "s3://served/*.wav" if act == "folder" else "s3://served"))
    options = config.storage.access
    splits = [] if act in ("commit", "list") else list(plan(config.inputs, options, 1800.0))
    s3.fails(fault)
    acts: dict[str, Callable[[], Any]] = {
        "commit": lambda: storage.commit("s3://served/unit", b"x", options),
        "list": lambda: list(plan(config.inputs, options, 1800.0)),
    }
    with pytest.raises(CredentialsError, match="s3://served.*(ExpiredToken|InvalidAccessKeyId).*have expired.*again"):
        acts.get(act, lambda: [list(read_units(split, Done(), config)) for split in splits])()


def test_a_presigned_url_that_has_expired_is_no_matter_of_a_recording(http: Store, tmp_path: Path) -> None:
    http.fails("denied")
    signature = "X-Amz-Date=20200101T000000Z&X-Amz-Expires=3600&X-Amz-Signature=c0ffee"
    path = manifest(tmp_path, http, f"good.wav?{signature}")
    with pytest.raises(CredentialsError, match="have expired") as caught:
        outcomes(http.config(path))
    assert "c0ffee" not in str(caught.value) and "X-Amz-Signature=REDACTED" in str(caught.value)
