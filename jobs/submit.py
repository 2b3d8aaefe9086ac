"""A job on a cluster elsewhere, through Ray's Job API: send it, follow its log, end with its exit code.

What is sent, as the job's runtime environment: the packages `pipeline` and `jobs` as they are here, and the resolved
configuration in a file. What those packages import is the matter of the cluster's image (infra/Dockerfile).

Storage options may hold credentials, so they travel in that file alone and never in the entrypoint or metadata, which
`ray job list` shows. The file lies in the cluster's GCS and on the disk of its nodes, and whoever may submit a job
there can read it; the way there is only as private as the address (https, or a forwarded port).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shlex
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import requests
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console

from pipeline import storage
from pipeline.config import ConfigError, PseudolabelConfig, TranscribeConfig
from pipeline.distill.config import DistillConfig, QuantizeConfig, TowerConfig
from pipeline.engine.checkpoint import EMBEDDED_FOLDER

EXIT_UNFINISHED, EXIT_INTERRUPTED = 1, 130
CONFIG_NAME = "job.yaml"
_PACKAGES = [Path(__file__).parent, Path(__file__).parents[1] / "pipeline"]
_REQUEST_S = 30.0  # of no answer; Ray's client would wait for ever
_QUIET_S = 60.0  # a log without a line for so long may be a connection that died silently
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0  # between attempts to reach the cluster again
_LOST_S = 600.0  # a head node restarts in minutes; after this the job's log is given up
_RAY_LOGGERS = (  # they tell of uploads and closed connections in the format of a server's log
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)

Config = TranscribeConfig | QuantizeConfig | DistillConfig | TowerConfig
_COMMANDS: dict[type[Config], str] = {
    TranscribeConfig: "transcribe",
    PseudolabelConfig: "pseudolabel",
    QuantizeConfig: "quantize",
    DistillConfig: "distill",
    TowerConfig: "distill-tower",
}

Write = Callable[[str], object]
Answer = TypeVar("Answer")


class ClusterError(RuntimeError):
    """The cluster cannot be reached, refuses, or did not run the job; the message is all that a user needs."""


class Client(JobSubmissionClient):
    """Ray's client with a limit to how long a request may go unanswered."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        answer: requests.Response = super()._do_request(method, endpoint, timeout=_REQUEST_S, **options)
        return answer


def run(config: Config, conf: Path, address: str, detach: bool, console: Console) -> int:
    """Send the job to the cluster whose dashboard is at `address` and return the job's exit code.

    The job's log goes to stdout, what this command has to say to `console`. With `detach` the job's id goes to stdout
    and the code is 0. Ctrl-C leaves the job running and gives 130. `conf` is the file that `config` was read from.
    Raises ConfigError for a mistake in the command and ClusterError for all that comes from the cluster.
    """
    url = dashboard_url(address)
    local = local_paths(config)
    if local:
        _say(console, f"note: these are local paths, which every node of the cluster must see: {', '.join(local)}")
    client = connect(url)
    job_id = send(client, config, url)
    status = ["shardscribe", "status", config.output, *(["--conf", str(conf)] if config.storage.options else [])]
    how_far = f"how far it is: {shlex.join(status)}\n" if isinstance(config, TranscribeConfig) else ""
    where = (
        f"{how_far}its log:       ray job logs {job_id} --follow --address {url}\n"
        f"stop it:       ray job stop {job_id} --address {url}"
    )
    _say(console, f"job {job_id} sent to {url}")
    if detach:
        print(job_id)
        _say(console, where)
        return 0
    try:
        details = asyncio.run(follow(client, job_id, lambda text: print(text, end="", flush=True)))
    except KeyboardInterrupt:
        _say(console, f"the job goes on without this command\n{where}")
        return EXIT_INTERRUPTED
    except ClusterError as error:
        raise ClusterError(f"{error}\n{where}") from error
    return exit_code(details)


def dashboard_url(address: str) -> str:
    """`address` as Ray's client wants it. Raises ConfigError when it is no http URL."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--address {address}: give the URL of the cluster's dashboard, such as http://HOST:8265")
    return address.rstrip("/")


def entrypoint(config: Config) -> str:
    """What the cluster runs."""
    # Ray's C++ core logs warnings about Ray Data's own actors as errors, into this job's log
    return f"RAY_BACKEND_LOG_LEVEL=fatal python -m jobs.cli {_COMMANDS[type(config)]} {CONFIG_NAME}"


def local_paths(config: Config) -> list[str]:
    """What the configuration reads and writes on local disk, models aside."""
    return [place[key] for place, key in _paths(config.model_dump(mode="json")) if storage.is_local(place[key])]


def _paths(data: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Where in a configuration a path or a URL stands: `place[key]`."""
    for source in data.get("inputs", []):
        yield source, "path"
    for section in filter(None, (data.get(name) for name in ("labels", "speech", "calibration", "heldout"))):
        sources = section.get("sources", [])
        yield from ((sources, i) for i in range(len(sources)))
    yield data, "output"
    calibrate = data.get("labels", {}).get("calibrate") or {}
    if calibrate.get("output") is not None:
        yield calibrate, "output"


def _models(data: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Where in a configuration a model stands: `place[key]`."""
    for place in filter(None, (data.get("engine"), data.get("agree_with"), data)):
        for key in ("model", "student", "teacher"):
            if place.get(key) is not None:
                yield place, key


def connect(url: str) -> Client:
    """A client of the cluster at `url`, which has answered and accepted the token. Raises ClusterError."""
    for name in _RAY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray lets this variable and then RAY_ADDRESS win over the address that a program gives
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    return _asked(url, lambda: Client(url))


def send(client: Client, config: Config, url: str) -> str:
    """Submit the job and return its id. Raises ConfigError when one that writes the same output is running there."""
    output = hashlib.blake2b(storage.resolve(config.output).encode(), digest_size=4).hexdigest()
    for job in _asked(url, client.list_jobs):
        if (job.submission_id or "").startswith(f"shardscribe-{output}-") and not job.status.is_terminal():
            raise ConfigError(
                f"{job.submission_id} is writing to {config.output} there already; its log: "
                f"ray job logs {job.submission_id} --follow --address {url}"
            )
    job_id = f"shardscribe-{output}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:4]}"
    with tempfile.TemporaryDirectory() as folder:
        environment = runtime_env(config, Path(folder))
        _asked(
            url, lambda: client.submit_job(entrypoint=entrypoint(config), submission_id=job_id, runtime_env=environment)
        )
    return job_id


def runtime_env(config: Config, folder: Path) -> dict[str, Any]:
    """Ray's runtime environment of the job, with its configuration in `folder`.

    The job joins the cluster that it runs on, and a path relative to here is made absolute, for over there it would
    lie in a folder that goes with the job.
    """
    data = config.model_dump(mode="json")
    for place, key in _paths(data):
        if storage.is_local(place[key]):
            place[key] = storage.resolve(place[key])
    for place, key in _models(data):
        model = Path(place[key]).expanduser()
        if model.is_dir():
            place[key] = str(model.absolute())
    data["ray"]["address"] = "auto"
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    # of 40 MB in all, the job needs at most the checkpoint that it names; packages that did not change (the code, as a
    # rule) are in the cluster from the job before and not sent again
    unused = [
        f"/embedded/{data_folder.name}"
        for data_folder in sorted(EMBEDDED_FOLDER.iterdir())
        if data_folder.is_dir() and f"embedded/{data_folder.name}" not in text
    ]
    return {
        "working_dir": str(folder),
        "py_modules": [str(package) for package in _PACKAGES],
        "excludes": ["__pycache__", *unused],
    }


async def follow(client: Client, job_id: str, write: Write) -> JobDetails:
    """Pass the job's log to `write` while it grows, until the job has ended; returns how.

    A broken connection is made again, and no text is written twice. Raises ClusterError when the cluster does not
    answer for ten minutes, or has forgotten the job.
    """
    written = 0  # characters of the log; every connection sends it from the start
    wait_s, heard = _FIRST_WAIT_S, time.monotonic()
    while True:
        position = 0
        lines = client.tail_job_logs(job_id)
        while (text := await _next(lines)) is not None:
            write(text[max(written - position, 0) :])
            position += len(text)
            written = max(written, position)
            wait_s, heard = _FIRST_WAIT_S, time.monotonic()
        try:
            details = client.get_job_info(job_id)
            log = client.get_job_logs(job_id)  # the rest after a break, or all of it through a proxy without websockets
        except AuthenticationError as error:
            raise ClusterError(_first_line(error)) from error
        except (RuntimeError, requests.RequestException) as error:
            if "status code 404" in str(error):
                raise ClusterError(f"the cluster no longer knows job {job_id}; was its head replaced?") from error
            if time.monotonic() - heard > _LOST_S:
                raise ClusterError(f"no answer for {_LOST_S / 60:.0f} minutes: {_first_line(error)}") from error
        else:
            write(log[written:])
            written = max(written, len(log))
            if details.status.is_terminal():
                return details
            heard = time.monotonic()
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


async def _next(lines: AsyncIterator[str]) -> str | None:
    """The next lines of a log; None when it has ended, broke off, or was quiet for a minute."""
    try:
        return await asyncio.wait_for(anext(lines, None), _QUIET_S)
    except (TimeoutError, aiohttp.ClientError, OSError):
        return None
    except RuntimeError:  # what Ray's client makes of a connection that broke
        return None


def exit_code(details: JobDetails) -> int:
    """The job's own exit code. Raises ClusterError, with Ray's reason, for a job that was ended from outside."""
    code = details.driver_exit_code
    if code is not None and code >= 0:
        return int(code)
    if details.status == JobStatus.STOPPED:
        raise ClusterError(f"job {details.submission_id} was stopped; what is committed stays")
    if code is not None:
        reason = f"its process was killed by signal {-code}"
    else:
        reason = (details.message or "no reason given").strip().rpartition("\n")[2]
    raise ClusterError(f"job {details.submission_id} was ended by the cluster: {reason}; what is committed stays")


def _asked(url: str, question: Callable[[], Answer]) -> Answer:
    """The cluster's answer. Raises ClusterError that says what to do about a refusal or silence."""
    try:
        return question()
    except AuthenticationError as error:
        raise ClusterError(
            f"{url}: {_first_line(error)}. Set RAY_AUTH_MODE=token and the cluster's token in RAY_AUTH_TOKEN, or in a "
            "file that RAY_AUTH_TOKEN_PATH names"
        ) from error
    except (ConnectionError, requests.RequestException) as error:
        raise ClusterError(
            f"no Ray dashboard answers at {url} ({type(error).__name__}); is the head up, and its port 8265 forwarded?"
        ) from error
    except RuntimeError as error:
        raise ClusterError(f"{url}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
