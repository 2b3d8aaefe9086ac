"""A private one-node Ceph with its S3 gateway on loopback: one monitor, one memory OSD, one radosgw.

    with radosgw.serve(folder) as server:
        storage.read_bytes("s3://bucket/key", server.options)

Each daemon is a process of its own in the foreground, its files and log in `folder`, stopped by its id. Up in 15 s on
two idle cores; 900 MB of memory in all. `server.gateway.kill()` and `.start()` are an outage; the objects
lie in the OSD and stay.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
PACKAGES = "ceph-mon ceph-osd radosgw ceph-common"
_START_S = 120.0  # of each command
_STOP_S = 10.0

_CONF = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}/0
ms bind msgr2 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
keyring = /dev/null
admin socket =
pid file =
run dir = {folder}
log file = {folder}/$name.log
crash dir = {folder}
mon data = {folder}/mon
mon cluster log file = {folder}/cluster.log
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
mon data avail crit = 1
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 1073741824
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


class Gateway:
    """The radosgw process, which can be killed and started again."""

    def __init__(self, folder: Path, conf: Path, port: int) -> None:
        self._folder, self._conf, self._port = folder, conf, port
        self._running = ExitStack()

    def start(self) -> None:
        daemon = _daemon(self._folder, "radosgw", "-c", str(self._conf), "-n", "client.rgw")
        self._process = self._running.enter_context(daemon)
        _await_http(self._port, self._process)

    def kill(self) -> int:
        """SIGKILL; the id that the process had."""
        self._process.kill()
        self._process.wait()
        return self._process.pid

    def stop(self) -> None:
        self._running.close()


@dataclass(frozen=True, slots=True)
class Server:
    port: int
    key: str
    secret: str
    gateway: Gateway

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """`storage.options` that reach it."""
        return self.options_at(f"http://127.0.0.1:{self.port}")

    def options_at(self, endpoint_url: str) -> dict[str, dict[str, Any]]:
        """`storage.options` that reach it through a proxy."""
        return {"s3": {"endpoint_url": endpoint_url, "key": self.key, "secret": self.secret}}


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Starts the daemons in `folder`, which has to exist, and stops them at the end; their logs stay in it.

    Raises RuntimeError with the ends of the logs when they do not come up.
    """
    mon_port, port = _free_ports(2)
    conf = folder / "ceph.conf"
    fsid = str(uuid.uuid4())
    conf.write_text(_CONF.format(folder=folder, fsid=fsid, mon_port=mon_port, port=port))
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    osd_id = str(uuid.uuid4())

    def do(program: str, *arguments: str) -> None:
        command = [program, "-c", str(conf), *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_START_S, check=False)
        if done.returncode:
            raise RuntimeError(f"{program} ended with {done.returncode}: {done.stdout.decode()[-2000:]}")

    with ExitStack() as stack:
        try:
            monmap = str(folder / "monmap")
            do("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"v1:127.0.0.1:{mon_port}/0", monmap)
            do("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
            stack.enter_context(_daemon(folder, "ceph-mon", "-c", str(conf), "-i", "a"))
            do("ceph", "--connect-timeout", "30", "osd", "new", osd_id, "0")
            do("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd_id)
            _start_osd(stack, folder, conf)
            key, secret = uuid.uuid4().hex, uuid.uuid4().hex
            do("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test",
               "--access-key", key, "--secret-key", secret)  # fmt: skip
            gateway = Gateway(folder, conf, port)
            stack.callback(gateway.stop)
            gateway.start()
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            raise RuntimeError(f"radosgw did not come up: {error}\n{_log_ends(folder)}") from error
        yield Server(port, key, secret, gateway)


def _start_osd(stack: ExitStack, folder: Path, conf: Path) -> None:
    """One that is up. An OSD that sends its first command before it knows the cluster's id is refused and ends."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        process = stack.enter_context(_daemon(folder, "ceph-osd", "-c", str(conf), "-i", "0"))
        while process.poll() is None and time.monotonic() < deadline:
            command = ["ceph", "-c", str(conf), "--connect-timeout", "30", "osd", "stat", "--format", "json"]
            done = subprocess.run(command, capture_output=True, timeout=_START_S, check=False)
            if done.returncode == 0 and json.loads(done.stdout)["num_up_osds"]:
                return
    raise RuntimeError("no OSD is up")


@contextmanager
def _daemon(folder: Path, program: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The program in the foreground (`-f`), with a log of its output."""
    with (folder / f"{program}.out").open("ab") as output:
        process = subprocess.Popen(
            [program, *arguments, "-f"], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await_http(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
                return
        except urllib.error.HTTPError:
            return  # a refusal is an answer
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("no answer on its port") from None
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; all held at once, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _log_ends(folder: Path) -> str:
    files = [*folder.glob("*.log"), *folder.glob("*.out")]
    return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)
