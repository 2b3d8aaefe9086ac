"""What tests share: tiny checkpoints, shards of noise, a local Ray, and an S3 server in memory, all on loopback."""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import soundfile
from moto.server import ThreadedMotoServer

from pipeline.config import TranscribeConfig
from pipeline.schema import SAMPLE_RATE_HZ
from tests import radosgw
from tests.browser import Browser, browse
from tests.engine.tiny import build_checkpoint, noise
from tests.fault_proxy import FaultProxy

# Ray reads these when it is first imported. The token is private to this session; a token file that is not at Ray's
# default path has to exist.
_token = Path(tempfile.mkdtemp(prefix="shardscribe-ray-")) / "token"
_token.write_text(secrets.token_hex(16))
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(_token), "RAY_worker_niceness": "0"}
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the Hub


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only; copy it to change a file."""
    return build_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-qwen3-asr")


@pytest.fixture(scope="session")
def light_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that the workers of `local_ray` take for a light engine (tests/poison): nothing of a model is loaded."""
    folder = tmp_path_factory.mktemp("light") / "light"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "light").touch()
    return folder


@pytest.fixture(scope="session")
def s3_options() -> Iterator[dict[str, dict[str, Any]]]:
    """`storage.options` for a moto server that lives as long as the session. Make a bucket of your own in it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {"s3": {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"}}
    server.stop()


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[radosgw.Server]:
    """A radosgw that lives as long as the session. Make a bucket of your own in it."""
    missing = radosgw.missing_programs()
    if missing:
        pytest.skip(f"radosgw: no {', '.join(missing)} here; apt-get install {radosgw.PACKAGES}")
    with radosgw.serve(tmp_path_factory.mktemp("radosgw")) as server:
        yield server


@pytest.fixture
def fault_proxy(object_store: radosgw.Server) -> Iterator[FaultProxy]:
    """A proxy before the radosgw that passes everything on until it is given a plan."""
    with FaultProxy(object_store.port) as proxy:
        yield proxy


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    return browse(tmp_path)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray for the session, which jobs join; its workers know poison."""
    import ray

    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here / "poison")])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()


def write_tar(path: Path, durations_s: Sequence[float], prefix: str = "clip") -> Path:
    """A WebDataset shard of noise clips, each with a reference."""
    with tarfile.open(path, "w") as tar:
        for number, seconds in enumerate(durations_s):
            buffer = io.BytesIO()
            soundfile.write(buffer, noise(seconds, seed=number), SAMPLE_RATE_HZ, format="WAV")
            label = json.dumps({"text": f"reference {number}", "language": "en"}).encode()
            for name, data in (
                (f"{prefix}-{number:03d}.wav", buffer.getvalue()),
                (f"{prefix}-{number:03d}.json", label),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def make_config(inputs: str | Sequence[Any], output: Path | str, model: Path, **sections: Any) -> TranscribeConfig:
    """A configuration on a tiny checkpoint: short texts, small units; in float32, where no text turns with what is
    decoded beside it."""
    data: dict[str, Any] = {
        "inputs": [inputs] if isinstance(inputs, str) else list(inputs),
        "output": str(output),
        "units": {"target_s": 10},
        "engine": {"model": str(model), "dtype": "float32", "max_new_tokens": 6},
    }
    return TranscribeConfig.model_validate(data | sections)
