"""How long `shardscribe submit` takes beside the same job run directly, on a real Ray head on this machine.

    python -m tests.bench_submit

The job is the embedded sample shards without the long one (42 recordings, 2 min), its output in a temporary folder.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tests.conftest import make_config  # isort: skip  # before Ray: it gives it a token
from jobs import submit
from tests.ray_head import Head, start_head

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "pipeline" / "embedded" / "samples"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, start_head({}) as head:
        through = ["submit", "transcribe"], ["--address", head.dashboard_url]
        for name, (before, after) in {
            "directly": (["transcribe"], ["--set", f"ray.address={head.address}"]),
            "submitted, the first": through,
            "submitted, the second": through,
            "submitted and detached": (through[0], [*through[1], "--detach"]),
        }.items():
            conf = configuration(Path(folder) / name.replace(" ", "-"))
            began = time.monotonic()
            said = run(head, [*before, str(conf), *after])
            print(f"{name:<24} {time.monotonic() - began:5.1f} s", flush=True)
        asyncio.run(submit.follow(submit.connect(head.dashboard_url), said.strip(), lambda text: None))
        print(f"{'  done after':<24} {time.monotonic() - began:5.1f} s")


def configuration(output: Path) -> Path:
    """The file that configures a job which writes to `output`, beside it."""
    units, engine = {"target_s": 60}, {"model": "embedded/student"}
    config = make_config(str(SAMPLES / "mixed-*.tar"), output, SAMPLES, units=units, engine=engine)
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def run(head: Head, arguments: list[str]) -> str:
    """What the command prints to stdout."""
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=head.environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(arguments)}: exit code {ended.returncode}\n{ended.stdout}{ended.stderr}")
    return ended.stdout


if __name__ == "__main__":
    main()
