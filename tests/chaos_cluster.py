"""A Ray cluster on one machine whose processes can be found and killed, and only they.

Whatever Ray starts is a descendant of this process: it adopts what loses its parent, so that nothing gets out of sight.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from typing import Any

import psutil
from ray._private import ray_constants
from ray.cluster_utils import Cluster

ENGINE, READ, LEDGER = "MapBatches(_EngineActor)", "MapBatches(read_and_segment)", "Ledger"  # in processes' titles
NUM_NODES, NUM_CPUS = 2, 3  # beside the head, which works nothing off; one node has room for the whole job
_OBJECT_STORE_BYTES = 100 << 20
_PR_SET_CHILD_SUBREAPER = 36
_OF_RAY = ("DashboardAgent", "RuntimeEnvAgent")  # of every node
_OF_RAY_DATA = ("ActorLocationTracker", "_AutoscalingCoordinatorActor", "_StatsActor", "_UsageCollectionActor")
"""Actors that Ray Data starts detached, one of each a cluster, and never ends."""


class ChaosCluster:
    """`with ChaosCluster() as cluster`: a head and two nodes; drivers connect to the head."""

    def __enter__(self) -> ChaosCluster:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        store = {"object_store_memory": _OBJECT_STORE_BYTES}
        self._cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
        self._node_args = {"num_cpus": NUM_CPUS, **store}
        self.add_missing_nodes()
        return self

    def __exit__(self, *error: object) -> None:
        self._cluster.shutdown()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add_missing_nodes(self) -> None:
        while len(self._cluster.worker_nodes) < NUM_NODES:
            self._cluster.add_node(**self._node_args)

    def workers(self, name: str, can_be_lost: bool = False) -> list[psutil.Process]:
        """The processes with a name, `ENGINE`, `READ` or `LEDGER`, in their title at this moment; with `can_be_lost`
        only those on a node that `kill_node` may choose."""
        found = [process for process, title in _ray_processes() if name in title]
        lost = {_raylet(node).pid for node in self._cluster.worker_nodes}
        return [process for process in found if not can_be_lost or process.ppid() in lost]

    def kill_node(self, rng: random.Random) -> list[int]:
        """SIGKILL for a raylet, which is a node's object store too, and all below it; their process ids."""
        node = rng.choice(sorted(self._cluster.worker_nodes, key=lambda node: str(node.node_id)))
        raylet = _raylet(node)
        doomed = [raylet, *raylet.children(recursive=True)]
        for process in doomed:
            kill(process)
        self._cluster.remove_node(node, allow_graceful=False)
        return [process.pid for process in doomed]

    def leftovers(self) -> list[str]:
        """Actors and processes that a job should not leave behind, in words."""
        actors: dict[str, dict[str, Any]] = self._cluster.global_state.actor_table(None)
        alive = [actor for actor in actors.values() if actor["State"] != "DEAD"]
        found = [f"actor {actor['ActorClassName']} is {actor['State']}" for actor in alive if not actor["IsDetached"]]
        detached = [actor["ActorClassName"] for actor in alive if actor["IsDetached"]]
        found += [f"detached actor {name}" for name in detached if name not in _OF_RAY_DATA or detached.count(name) > 1]
        found += [
            f"process {process.pid} {title}"
            for process, title in _ray_processes()
            if title.removeprefix("ray::").partition(".")[0] not in _OF_RAY + _OF_RAY_DATA
        ]
        return found


def kill(process: psutil.Process) -> bool:
    """SIGKILL; False when it was no more. A number that another process has by now is not touched (psutil looks)."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process.pid)


def _ray_processes() -> Iterator[tuple[psutil.Process, str]]:
    for process in psutil.Process().children(recursive=True):
        try:
            title = (process.cmdline() or [""])[0]
        except psutil.NoSuchProcess:
            continue
        if title.startswith("ray::"):
            yield process, title
