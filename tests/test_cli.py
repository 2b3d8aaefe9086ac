"""The command line: help, mistakes in one line without a traceback, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from jobs.cli import app
from pipeline.config import TranscribeConfig, load_config
from pipeline.distill.config import DistillConfig, QuantizeConfig, SamplesConfig, TowerConfig, TrainingConfig
from pipeline.follow.config import FollowConfig
from tests.conftest import make_config, write_tar

ROOT = Path(__file__).parent.parent


def shardscribe(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def conf(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    write_tar(tmp_path / "a.tar", [2, 3])
    config = make_config(str(tmp_path / "a.tar"), tmp_path / "out", tiny_checkpoint)
    path = tmp_path / "conf.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@pytest.mark.parametrize("command", ["transcribe", "status", "evaluate", "demo", "models", "family"])
def test_help_has_examples(command: str) -> None:
    result = shardscribe(command, "--help")
    assert result.exit_code == 0 and f"shardscribe {command}" in result.output and "Examples" in result.output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.modle=x", "unknown key `engine.modle`; did you mean `model`?"),
        ("engine.dtype=fp8", "`engine.dtype` should be 'auto', 'float32', 'bfloat16' or 'float16', not 'fp8'"),
        ("segmentation.min_s=31", "min_s (31.0) must be below max_s (30.0)"),
        ("nonsense", "write it as path.to.key=value"),
        ("inputs=[/nowhere/x.tar]", "/nowhere/x.tar"),
        ("engine.model=embedded/giant", "embedded models: embedded/student, embedded/teacher"),
        ("engine.model=/nowhere/model", "no folder on this machine and no Hub id"),
    ],
)
def test_a_mistake_is_one_message_without_a_traceback(conf: Path, override: str, message: str) -> None:
    result = shardscribe("transcribe", conf, "--set", override)
    assert result.exit_code in (1, 2)
    assert message in result.output and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) <= 2


def test_missing_configuration_and_output(tmp_path: Path) -> None:
    assert "no configuration file" in shardscribe("transcribe", tmp_path / "none.yaml").output
    result = shardscribe("status", tmp_path)
    assert result.exit_code == 2 and "no plan.json" in result.output


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = shardscribe("transcribe", tmp_path / "none.yaml", "--debug")
    assert result.exit_code == 2 and "Traceback" in result.output


def test_dry_run_prints_the_plan_and_writes_nothing(conf: Path, tmp_path: Path) -> None:
    result = shardscribe("transcribe", conf, "--dry-run")
    assert result.exit_code == 0
    assert "1 splits" in result.output and "0 units committed" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("local_ray")
def test_a_model_that_the_engine_cannot_get_is_one_message(conf: Path) -> None:
    """A Hub id is resolved where the engine runs: the cache of that machine counts."""
    result = shardscribe("transcribe", conf, "--set", "engine.model=nobody/none")
    assert result.exit_code == 1
    begun, message = result.output.strip().splitlines()
    assert "audio to do" in begun
    assert message.startswith("error: nobody/none is not in this machine's cache") and message.endswith("DIR")


@pytest.mark.usefixtures("local_ray")
def test_transcribe_then_status(conf: Path, tmp_path: Path) -> None:
    result = shardscribe("transcribe", conf)
    assert result.exit_code == 0, result.output
    status = shardscribe("status", tmp_path / "out")
    assert status.exit_code == 0
    assert "1 committed of 1 planned (1 of 1 splits complete)" in status.output and "x real time" in status.output
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert len(plan["splits"]) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    models: dict[str, Any] = {"quantize": QuantizeConfig, "distill": DistillConfig, "distill-tower": TowerConfig}
    models["follow"] = FollowConfig
    load_config(models.get(path.stem, TranscribeConfig), path)


def test_the_complete_configuration_names_every_key_with_its_default() -> None:
    path = ROOT / "conf" / "transcribe.yaml"
    written = yaml.safe_load(path.read_text())
    defaults = TranscribeConfig(inputs=written["inputs"], output=written["output"]).model_dump(mode="json")
    defaults["inputs"] = written["inputs"]
    assert written == defaults


def test_the_complete_configuration_of_quantize_names_every_key_with_its_default() -> None:
    written = yaml.safe_load((ROOT / "conf" / "quantize.yaml").read_text())
    named = {key: written[key] for key in ("output", "calibration")}
    default = QuantizeConfig.model_validate(named).model_dump(mode="json")
    assert written == default and written["calibration"].keys() == SamplesConfig.model_fields.keys()


@pytest.mark.parametrize(("name", "model"), [("distill", DistillConfig), ("distill-tower", TowerConfig)])
def test_the_complete_configurations_of_training_name_every_key(name: str, model: type[TrainingConfig]) -> None:
    written = yaml.safe_load((ROOT / "conf" / f"{name}.yaml").read_text())
    assert model.model_validate(written).model_dump(mode="json") == written


def test_models_lists_the_family_with_its_card() -> None:
    result = shardscribe("models")
    assert result.exit_code == 0
    assert (
        "embedded/student" in result.output and "embedded/teacher" in result.output and "CC BY-SA 4.0" in result.output
    )
