"""A Ray head of its own on loopback, as `ray start` makes it, with its dashboard, in a temporary folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Head:
    """`address` is for ray.init, `environment` what a process needs to speak with it, `folder` Ray's temporary one."""

    address: str
    dashboard_url: str
    environment: dict[str, str]
    folder: Path


@contextmanager
def start_head(environment: Mapping[str, str]) -> Iterator[Head]:
    """A head with 2 CPUs whose processes, and those of its jobs, get `environment` too."""
    address, url = (f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{(dashboard_port := free_port())}")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    inherited |= {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    inherited |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    # unix sockets lie below the folder, whose name has to be short
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        options = {
            "port": address.rpartition(":")[2],
            "node-ip-address": "127.0.0.1",
            "ray-client-server-port": free_port(),
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard_port,
            "include-dashboard": "true",
            "dashboard-agent-listen-port": 0,
            "num-cpus": 2,
            "object-store-memory": 200 << 20,
            "temp-dir": folder,
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += [f"--{name}={value}" for name, value in options.items()]
        with (Path(folder) / "head.log").open("w") as log:
            process = subprocess.Popen(
                command, env=inherited, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
            try:
                _wait_until_listening(dashboard_port, process, Path(log.name))
                yield Head(address, url, inherited, Path(folder))
            finally:
                # what workers it has started see that it is gone; told to end, it takes more than 20 s after a job
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_listening(port: int, process: subprocess.Popen[bytes], log: Path, limit_s: float = 60) -> None:
    began = time.monotonic()
    while True:
        assert process.poll() is None, f"the head ended early: {log.read_text()}"
        assert time.monotonic() - began < limit_s, f"no head in time: {log.read_text()}"
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
