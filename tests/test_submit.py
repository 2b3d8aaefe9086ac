"""`shardscribe submit` against a real Ray head on loopback; and what it makes of broken connections."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.dataset as ds
import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobDetails, JobStatus
from typer.testing import CliRunner, Result

from jobs import submit
from jobs.cli import app
from pipeline.config import PseudolabelConfig
from pipeline.distill.config import DistillConfig, QuantizeConfig
from tests.conftest import make_config, write_tar
from tests.distill.sources import write_manifest
from tests.ray_head import free_port, start_head

ROOT = Path(__file__).parent.parent
SECRET = "not-for-anyone-to-see"

pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")  # in Ray's client


def shardscribe(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _address_of_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says must not win over --address; and what `connect` sets goes with the test."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard's URL of a cluster whose image holds a Shardscribe that does not work: what is sent has to win."""
    image = tmp_path_factory.mktemp("image")
    for package in ("pipeline", "jobs"):
        (image / package).mkdir()
        (image / package / "__init__.py").write_text("raise ImportError('the one in the image, not the one sent')")
    with start_head({"PYTHONPATH": str(image)}) as head:
        yield head.dashboard_url


@pytest.fixture
def conf(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """Two recordings, with storage options that hold a secret."""
    write_tar(tmp_path / "a.tar", [2, 3])
    config = make_config(
        str(tmp_path / "a.tar"), tmp_path / "out", tiny_checkpoint, storage={"options": {"s3": {"secret": SECRET}}}
    )
    path = tmp_path / "conf.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def test_help_says_what_the_cluster_must_have() -> None:
    result = shardscribe("submit", "transcribe", "--help")
    assert result.exit_code == 0 and "shardscribe submit transcribe" in result.output and "Examples" in result.output
    assert "infra/Dockerfile" in result.output and "RAY_AUTH_TOKEN" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "engine.modle=x"], 2, "did you mean `model`?"),
        (["--address", "head:8265"], 2, "such as http://HOST:8265"),
        (["--address", "ray://head:10001"], 2, "such as http://HOST:8265"),
        ([], 1, "no Ray dashboard answers at http://127.0.0.1:"),
    ],
)
def test_a_mistake_is_one_line(conf: Path, arguments: list[str], code: int, message: str) -> None:
    address = [] if "--address" in arguments else ["--address", f"http://127.0.0.1:{free_port()}"]
    result = shardscribe("submit", "transcribe", conf, *address, *arguments)
    assert result.exit_code == code, result.output
    lines = [line for line in result.output.strip().splitlines() if not line.startswith("note: these are local")]
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    "token", [{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong" * 8}, {"RAY_AUTH_MODE": "disabled"}], ids=str
)
def test_a_wrong_or_missing_token_is_one_line(head: str, conf: Path, token: dict[str, str]) -> None:
    command = [sys.executable, "-m", "jobs.cli", "submit", "transcribe", str(conf), "--address", head]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | token, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("note: these are local")]
    assert len(lines) == 1 and "RAY_AUTH_TOKEN_PATH" in lines[0] and "oken" in lines[0]


def test_some_recordings_failed_is_the_exit_code_here_too(head: str, conf: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.add(tmp_path / "broken.wav", "broken.wav")
    result = shardscribe("submit", "transcribe", conf, "--address", head)
    assert result.exit_code == 3, result.output
    assert f"every node of the cluster must see: {tmp_path / 'a.tar'}, {tmp_path / 'out'}" in result.output
    assert "python -m jobs.cli transcribe job.yaml" in result.stdout and "1 units" in result.stdout, "the job's log"
    rows = ds.dataset(tmp_path / "out" / "transcripts").to_table(columns=["status"])["status"].to_pylist()
    assert sorted(rows) == ["failed", "ok", "ok"]


def test_ctrl_c_leaves_the_job_running_and_a_second_one_out_until_it_has_ended(
    head: str, conf: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "jobs.cli", "submit", "transcribe", str(conf), "--address", head]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdout is not None
    assert any("Running entrypoint" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "the job goes on without this command" in errors and f"shardscribe status {tmp_path / 'out'}" in errors
    [job_id] = {word for word in errors.split() if word.startswith("shardscribe-")}
    assert f"ray job stop {job_id} --address {head}" in errors

    again = shardscribe("submit", "transcribe", conf, "--address", head)
    assert again.exit_code == 2 and f"{job_id} is writing to" in again.output

    log: list[str] = []
    client = submit.connect(head)
    details = asyncio.run(submit.follow(client, job_id, log.append))
    assert details.status == JobStatus.SUCCEEDED and submit.exit_code(details) == 0, "".join(log)
    assert SECRET not in json.dumps([job.model_dump(mode="json") for job in client.list_jobs()]) + "".join(log)


def test_detach_then_status(head: str, conf: Path, tmp_path: Path) -> None:
    result = shardscribe("submit", "transcribe", conf, "--address", head, "--detach")
    assert result.exit_code == 0
    job_id = result.stdout.strip()
    asyncio.run(submit.follow(submit.connect(head), job_id, lambda text: None))
    status = shardscribe("status", tmp_path / "out")
    assert status.exit_code == 0 and "1 committed of 1 planned (1 of 1 splits complete)" in status.output


def test_code_is_sent_and_of_the_data_only_the_checkpoint_that_the_job_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config("calls/*.tar", "out", Path("embedded/student"), ray={"address": "ray://elsewhere:10001"})
    environment = submit.runtime_env(config, tmp_path)
    names: set[str] = set()
    for number, package in enumerate(environment["py_modules"]):
        archive = tmp_path / f"{number}.zip"
        create_package(package, archive, True, include_parent_dir=True, excludes=environment["excludes"])
        names |= set(zipfile.ZipFile(archive).namelist())
    code = {str(path.relative_to(ROOT)) for package in ("pipeline", "jobs") for path in (ROOT / package).rglob("*.py")}
    assert code <= names
    data = {name for name in names if name.startswith("pipeline/embedded/") and not name.endswith((".py", "/"))}
    assert "pipeline/embedded/student/model.safetensors" in data
    assert not [name for name in names if "teacher/" in name or "heldout/" in name or "__pycache__" in name]

    sent = yaml.safe_load((tmp_path / submit.CONFIG_NAME).read_text())
    assert sent["ray"]["address"] == "auto"
    assert sent["inputs"][0]["path"] == str(tmp_path / "calls/*.tar") and sent["output"] == str(tmp_path / "out")


class FlakyClient:
    """A cluster whose log connection breaks after every second piece, and whose head is away now and then."""

    def __init__(self, pieces: list[str], answers: list[JobStatus | Exception]) -> None:
        self.pieces, self.answers = pieces, answers
        self.connections = 0

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.connections += 1
        for piece in self.pieces[: 2 * self.connections]:
            yield piece
        raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, job_id: str) -> Any:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(status=answer)

    def get_job_logs(self, job_id: str) -> str:
        known = len(self.pieces) if self.answers == [JobStatus.SUCCEEDED] else 2 * self.connections
        return "".join(self.pieces[:known])


def followed(client: Any, written: list[str]) -> JobDetails:
    return asyncio.run(submit.follow(client, "job", written.append))


@pytest.fixture
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(submit, "_LONGEST_WAIT_S", 0.002)


@pytest.mark.usefixtures("_no_waits")
def test_a_log_that_breaks_off_is_written_once_and_to_its_end() -> None:
    pieces = [f"line {number}\n" for number in range(9)]
    away = ConnectionError("Failed to connect")
    client = FlakyClient(pieces, [JobStatus.RUNNING, submit.requests.ConnectionError(away), JobStatus.SUCCEEDED])
    written: list[str] = []
    assert followed(client, written).status == JobStatus.SUCCEEDED
    assert "".join(written) == "".join(pieces) and client.connections == 3


@pytest.mark.usefixtures("_no_waits")
def test_a_cluster_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_LOST_S", 0.05)
    client = FlakyClient([], [submit.requests.ConnectionError("Failed to connect")])
    with pytest.raises(submit.ClusterError, match="no answer for .* minutes: Failed to connect"):
        followed(client, [])
    assert client.connections > 3


def test_a_head_that_was_replaced_has_forgotten_the_job() -> None:
    client = FlakyClient([], [RuntimeError("Request failed with status code 404: Job job does not exist.")])
    with pytest.raises(submit.ClusterError, match="no longer knows job job"):
        followed(client, [])


def test_a_log_that_stays_silent_is_asked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_QUIET_S", 0.01)

    class SilentClient(FlakyClient):
        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            yield "begun\n"
            await asyncio.sleep(60)

    written: list[str] = []
    assert followed(SilentClient(["begun\n"], [JobStatus.SUCCEEDED]), written).status == JobStatus.SUCCEEDED
    assert "".join(written) == "begun\n"


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (JobStatus.FAILED, -9, "its process was killed by signal 9"),
        (JobStatus.FAILED, None, "the node died"),
        (JobStatus.STOPPED, None, "was stopped; what is committed stays"),
    ],
)
def test_a_job_that_was_ended_from_outside_says_so(status: JobStatus, code: int | None, message: str) -> None:
    details = JobDetails(
        type="SUBMISSION", status=status, entrypoint="", message="a\nthe node died", driver_exit_code=code
    )
    with pytest.raises(submit.ClusterError, match=message):
        submit.exit_code(details)


def test_a_pseudolabel_job_travels_with_its_second_model_and_its_sample(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = PseudolabelConfig.model_validate(
        {
            "inputs": ["s3://b/a.tar"],
            "output": "s3://b/out",
            "agree_with": {"model": os.path.relpath(tiny_checkpoint)},
            "labels": {"calibrate": {"output": "sample"}, "languages": {"vi": {"max_char_rate": 20}}},
        }
    )
    assert submit.entrypoint(config).endswith("python -m jobs.cli pseudolabel job.yaml")
    assert submit.local_paths(config) == ["sample"]
    environment = submit.runtime_env(config, tmp_path)
    sent = yaml.safe_load((tmp_path / "job.yaml").read_text())
    assert sent["labels"]["calibrate"]["output"] == str(Path.cwd() / "sample")
    assert Path(sent["agree_with"]["model"]).is_absolute() and Path(sent["agree_with"]["model"]).samefile(
        tiny_checkpoint
    )
    assert "/embedded/teacher" not in environment["excludes"] and "/embedded/student" in environment["excludes"]
    there = PseudolabelConfig.model_validate(sent)
    assert there.labels.languages == config.labels.languages


def test_quantizing_and_distilling_travel_with_their_folders(tmp_path: Path, tiny_checkpoint: Path) -> None:
    here = os.path.relpath(tiny_checkpoint)
    samples = {"sources": ["labels", "s3://b/m.jsonl"]}
    quantize = QuantizeConfig.model_validate({"model": here, "output": "int4", "calibration": samples})
    distill = DistillConfig.model_validate(
        {"student": here, "teacher": "embedded/teacher", "output": "out", "labels": samples, "heldout": samples}
    )
    for config, command, local in (
        (quantize, "quantize", ["labels", "int4"]),
        (distill, "distill", ["labels", "labels", "out"]),
    ):
        assert submit.entrypoint(config).endswith(f"python -m jobs.cli {command} job.yaml")
        assert submit.local_paths(config) == local
        submit.runtime_env(config, tmp_path)
        sent = type(config).model_validate(yaml.safe_load((tmp_path / "job.yaml").read_text()))
        assert sent.ray.address == "auto" and sent.output == str(Path.cwd() / config.output)
    assert isinstance(sent, DistillConfig) and Path(sent.student).samefile(tiny_checkpoint)
    assert sent.labels.sources == [str(Path.cwd() / "labels"), "s3://b/m.jsonl"] and sent.teacher == "embedded/teacher"


def test_quantizing_runs_as_a_task_there(head: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    samples = {"sources": [str(write_manifest(tmp_path / "m.jsonl", 1))], "samples_per_language": 1}
    conf = tmp_path / "q.yaml"
    options = {"model": str(tiny_checkpoint), "output": str(tmp_path / "int4"), "calibration": samples}
    conf.write_text(yaml.safe_dump(options | {"group_size": 32, "algorithm": "rtn"}))
    sent = shardscribe("submit", "quantize", conf, "--address", head)
    assert sent.exit_code == 0 and "14 layers in int4" in sent.output, sent.output
    assert (tmp_path / "int4" / "packed" / "model.safetensors").exists()
    again = shardscribe("submit", "quantize", conf, "--address", head)
    assert again.exit_code == 2 and f"output: {tmp_path / 'int4'} exists; name a new folder" in again.output
