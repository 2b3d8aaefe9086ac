"""Secrets never reach logs, outputs or tracebacks: jobs that go well and jobs that fail in every way, with marked
secrets, and then a search for the marks in all that they left."""

from __future__ import annotations

import io
import json
import threading
import traceback
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from jobs.cli import app
from pipeline import redact, storage
from pipeline.config import TranscribeConfig
from pipeline.storage import StorageError
from tests import commands
from tests.conftest import make_config, write_tar
from tests.fault_proxy import FaultProxy, Request
from tests.test_hostile import GOOD
from tests.test_refused import Quiet

KEY, SECRET, TOKEN = "AKIDMARK0MARK0MARK01", "mark/Secret+mark02==", "mark-token-mark03"
HEADER, PASSWORD, SIGNATURE = "mark-header-mark04", "mark-password-mark05", "5160mark5160mark06"
MARKS = (KEY, SECRET, TOKEN, HEADER, PASSWORD, SIGNATURE)
SIGNED = f"X-Amz-Credential={KEY}%2F20300101&X-Amz-Date=20300101T000000Z&X-Amz-Expires=60&X-Amz-Signature={SIGNATURE}"


def holds_a_mark(text: str) -> list[str]:
    return [mark for mark in MARKS if mark in text]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://me:hush@host/a.wav", "https://REDACTED@host/a.wav"),
        ("cannot open ftp://me:p@ss@host:21/a", "cannot open ftp://REDACTED@host:21/a"),
        ("https://h/a.wav?id=7&X-Amz-Date=1&X-Amz-Signature=ff", "https://h/a.wav?id=7&X-Amz-Date=REDACTED&X-Amz-Signature=REDACTED"),
        ("https://h/a?sv=2022&sig=a%2Bb, given up", "https://h/a?sv=2022&sig=REDACTED, given up"),
        ("https://h/a?token=t#x", "https://h/a?token=REDACTED#x"),
        ("s3://bucket/what@where/a.wav", "s3://bucket/what@where/a.wav"),
        ("/data/me@home/token=5.wav", "/data/me@home/token=5.wav"),
    ],
)  # fmt: skip
def test_a_secret_is_known_by_its_place(text: str, clean: str) -> None:
    assert redact.names(text) == clean == redact.text(text)


def test_a_secret_is_known_by_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redact, "_given", set())
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    redact.remember({"key": KEY, "client_kwargs": {"headers": {"X": [HEADER]}}, "endpoint_url": "http://store", "n": 5})
    said = redact.text(f"{KEY} said {HEADER} and {TOKEN} to http://store")
    assert said == "REDACTED said REDACTED and REDACTED to http://store"
    redact.remember({"password": "data"})
    assert redact.text("data in database is data") == "REDACTED in database is REDACTED", "whole words"
    assert redact.names(f"/in/{KEY}.wav") == f"/in/{KEY}.wav", "a row keeps its name"


def test_a_chain_of_causes_shows_none() -> None:
    """As a task's traceback is written by Ray, which does not ask us."""
    url = f"http://me:{PASSWORD}@host/a.wav"
    with pytest.raises(StorageError) as caught, storage.explained(url):
        raise FileNotFoundError(url)
    assert not holds_a_mark("".join(traceback.format_exception(caught.value)))
    with pytest.raises(StorageError) as told, storage.explained("http://host/a.wav"):
        raise FileNotFoundError("http://host/a.wav")
    assert isinstance(told.value.__cause__, FileNotFoundError), "where there is no secret the cause is told"


@pytest.mark.parametrize(
    ("text", "override"),
    [
        (f"inputs: [a]\noutput: o\nstorage: {{options: {{s3: {{secret: *{SECRET}}}}}}}", None),
        (f"inputs: [a]\noutput: o\nstorage: {{options: {{s3: {{secret: '{SECRET}}}}}}}", None),
        (f"inputs: [a]\noutput: o\nstorage: {{options: {{s3: {SECRET}}}}}", None),
        ("inputs: [a]\noutput: o", f"storage.options.s3.secret=[{SECRET}"),
        ("inputs: [a]\noutput: o", f"inputs.5.path=https://me:{PASSWORD}@h/"),
    ],
)
def test_a_mistake_in_the_configuration_shows_none(tmp_path: Path, text: str, override: str | None) -> None:
    (tmp_path / "conf.yaml").write_text(text)
    arguments = ["transcribe", str(tmp_path / "conf.yaml"), "--debug", *(["--set", override] if override else [])]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "error:" in result.output and not holds_a_mark(result.output)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    """Serves `good.wav`, whoever asks; `denied` is denied, `away` answers 500."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "good.wav").write_bytes(GOOD)

    def plan(request: Request) -> Any:
        return "denied" if "denied" in request.target else "error_500" if "away" in request.target else None

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with FaultProxy(server.server_address[1], plan) as proxy:
            yield proxy
        server.shutdown()


@pytest.mark.usefixtures("local_ray")
def test_no_job_leaves_a_secret_anywhere(
    web: FaultProxy,
    s3_options: dict[str, dict[str, Any]],
    light_checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    import ray

    endpoint = s3_options["s3"]["endpoint_url"]
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=endpoint, **keys)
    client.create_bucket(Bucket="discreet")
    known = web.url.replace("://", f"://me:{PASSWORD}@")
    names = ["good", "denied", "none", "away"]
    lines = [f"{root}/{name}.wav{query}" for name in names for root, query in ((known, ""), (web.url, f"?{SIGNED}"))]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps({"audio_filepath": line}) + "\n" for line in lines))
    tar = str(write_tar(tmp_path / "a.tar", [1.0]))
    s3 = {"endpoint_url": endpoint, "key": KEY, "secret": SECRET, "token": TOKEN}
    retry = {"attempts": 2, "first_wait_s": 0.01, "timeout_s": 20.0}

    def job(*inputs: str, output: str = "s3://discreet/out", **more: Any) -> TranscribeConfig:
        options = {"s3": s3 | more, "http": {"headers": {"X-Known": HEADER}}}
        return make_config(inputs, output, light_checkpoint, storage={"options": options, "retry": retry})

    def run(config: TranscribeConfig, *arguments: str) -> Result:
        return commands.run(config, tmp_path / "conf.yaml", "--debug", *arguments)

    jobs = {
        "well": (3, run(job(str(manifest), tar, f"{known}/good.wav", f"{web.url}/good.wav?{SIGNED}"))),
        "dry run": (0, run(job(str(manifest), f"{known}/good.wav", output="s3://discreet/dry"), "--dry-run")),
        "input denied": (1, run(job(f"{known}/denied.tar"))),
        "signed input denied": (1, run(job(f"{web.url}/denied.tar?{SIGNED}"))),
        "input away": (1, run(job(f"{known}/away.tar"))),
        "other inputs": (2, run(job(tar, f"{known}/good.wav"))),
        "store away": (1, run(job(tar, output="s3://discreet/away", endpoint_url="http://127.0.0.1:9"))),
        "no bucket": (1, run(job(tar, output="s3://none/out"))),
    }
    assert {name: result.exit_code for name, (_, result) in jobs.items()} == {
        name: code for name, (code, _) in jobs.items()
    }, {name: result.output for name, (_, result) in jobs.items()}
    found: dict[str, str] = {name: result.output for name, (_, result) in jobs.items()}
    shown = capfd.readouterr()
    found |= {"stdout": shown.out, "stderr": shown.err, "logged": caplog.text}
    assert "Traceback" in found["input denied"] and "REDACTED" in found["input denied"]
    rows = []
    for item in client.list_objects_v2(Bucket="discreet")["Contents"]:
        data = client.get_object(Bucket="discreet", Key=item["Key"])["Body"].read()
        found[item["Key"]] = data.decode("latin-1")
        if item["Key"].endswith(".parquet"):
            table = pq.read_table(io.BytesIO(data))
            rows += table.to_pylist()
            found[item["Key"]] += f"{table.to_pylist()} {table.schema.metadata}"
    assert sorted((row["error"] or "ok").partition(":")[0] for row in rows) == sorted(
        ["ok", "permission_denied", "missing_file", "unreachable"] * 2 + ["ok"] * 3
    )
    logs = Path(ray._private.worker.global_worker.node.get_session_dir_path())  # type: ignore[attr-defined]
    found |= {str(file): file.read_text(errors="replace") for file in logs.rglob("*") if file.is_file()}
    assert any(name.endswith(".err") and "good" not in name for name in found)
    assert not {name: holds_a_mark(text) for name, text in found.items() if holds_a_mark(text)}
