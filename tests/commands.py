"""`shardscribe transcribe` as a user runs it: in a process of its own, or in this one with the Ray that is there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml
from typer.testing import CliRunner, Result

from jobs.cli import app
from pipeline.config import TranscribeConfig

ROOT = Path(__file__).parent.parent


def run(config: TranscribeConfig, conf: Path, *arguments: str) -> Result:
    """To its end, in this process; `conf` is where the configuration is written."""
    conf.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return CliRunner().invoke(app, ["transcribe", str(conf), *arguments])


def start(
    config: TranscribeConfig, conf: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """In a process of its own with a Ray of its own."""
    conf.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-c", "from jobs.cli import app; app()", "transcribe", str(conf), *arguments]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=inherited | dict(env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
