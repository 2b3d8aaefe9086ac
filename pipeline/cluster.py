"""The Ray cluster that a job runs on."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def connected(address: str | None, object_store_bytes: int | None = None) -> Iterator[None]:
    """Within it this process is connected to the cluster at `address`; None: to a local Ray of its own. One that it is
    connected to already stays."""
    if address is None:
        # Ray reads these when it is first imported. Token authentication is what a local Ray has anyway; its C++ core
        # logs warnings about Ray Data's own actors as errors, and so only speaks when it dies.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray  # not above: see there

    if ray.is_initialized():
        yield
        return
    local = address is None
    # workers import this package from where the driver has it; a cluster's nodes have it installed
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    with _stderr_without(b"RAY_BACKEND_LOG_LEVEL"):  # Ray's core says that it heeds it
        ray.init(
            address=address,
            runtime_env={"env_vars": {"PYTHONPATH": path}} if local else None,
            object_store_memory=object_store_bytes if local else None,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()


def on_cluster(work: Callable[[], T], num_cpus: float, num_gpus: float) -> T:
    """What `work` gives as a task of the connected cluster. Raises what it raises."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        task: Any = ray.remote(_call).options(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=0)
        found: T = ray.get(task.remote(work))
    except RayTaskError as error:
        raise error.cause from None
    return found


def _call(work: Callable[[], T]) -> T:
    return work()


@contextmanager
def _stderr_without(text: bytes) -> Iterator[None]:
    """Hold back what this process writes to stderr, C++ included; at the end write it, less the lines with `text`."""
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if text not in line:
                    os.write(2, line)
