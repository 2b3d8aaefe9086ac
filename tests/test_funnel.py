"""The funnel: rows and hours that each filter leaves, by language."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config import ConfigError
from pipeline.funnel import read_funnel
from pipeline.output import Output
from pipeline.schema import REASONS
from pipeline.units import UnitKey
from tests.outputs import failed, put, row, start

SPLIT = "a" * 16


@pytest.fixture
def output(tmp_path: Path) -> Output:
    """Two units: 4 English rows of an hour, 2 Vietnamese of two, one that failed."""
    output = start(str(tmp_path / "out"), {SPLIT: 100.0})
    hour = {"duration": 3600.0}

    def caught(*reasons: str) -> dict[str, object]:
        return {"filter_reasons": list(reasons), "keep": not reasons}

    put(output, UnitKey(SPLIT, 0, 0, "g"), [row(**hour), row(**hour, **caught("duration", "char_rate")), failed()])
    vietnamese = {"language": "Vietnamese", "duration": 7200.0}
    english = [row(**hour, **caught("char_rate")), row(**hour, **caught("low_logprob", "char_rate"))]
    put(
        output,
        UnitKey(SPLIT, 1, 0, "z"),
        [*english, row(**vietnamese), row(**vietnamese, **caught("reference_mismatch"))],
    )
    return output


def test_a_row_leaves_at_the_first_filter_that_catches_it(output: Output) -> None:
    funnel = read_funnel(output)
    assert funnel.languages == ["all", "English", "Vietnamese", "none"]
    assert funnel.total("English") == (4, 4 * 3600) and funnel.total() == (7, 8 * 3600)
    steps = {step.reason: step for step in funnel.steps("English")}
    assert list(steps) == list(REASONS)
    assert [(steps[name].num_caught, steps[name].num_removed) for name in ("duration", "low_logprob", "char_rate")] == [
        (1, 1), (1, 1), (3, 1),
    ]  # fmt: skip
    assert (steps["duration"].num_left, steps["duration"].left_s) == (3, 3 * 3600)
    assert (steps["reference_mismatch"].num_left, steps["reference_mismatch"].left_s) == (1, 3600)
    of_all = funnel.steps()
    assert of_all[-1].num_left == 2 and of_all[-1].left_s == 3 * 3600, "what is kept"
    assert of_all[0].reason == "failed" and of_all[0].num_removed == 1


def test_what_is_left_is_what_is_kept_and_languages_add_up(tmp_path: Path) -> None:
    from tests.outputs import archive

    output = archive(str(tmp_path / "archive"), num_shards=2)
    funnel = read_funnel(output)
    kept = sum(table["keep"].to_numpy().sum() for _, _, table in output.tables(_keys(output), ["keep"]))
    assert funnel.steps()[-1].num_left == kept > 0
    assert sum(funnel.total(name)[0] for name in funnel.languages[1:]) == funnel.total()[0] == 2 * 6 * 60


def _keys(output: Output) -> list[UnitKey]:
    return [key for done in output.committed().values() for key in done.keys]


def test_the_command_prints_tables_or_json(output: Output, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["funnel", output.url])
    assert result.exit_code == 0 and "all languages" in result.stdout and "Vietnamese" in result.stdout
    (line,) = [line for line in result.stdout.split("Vietnamese")[1].splitlines() if "reference_mismatch" in line][:1]
    assert line.split()[1:4] == ["1", "1", "1"] and "2 h 0 min" in line
    assert "caught nothing: empty, truncated" in result.stdout
    parsed = json.loads(CliRunner().invoke(app, ["funnel", output.url, "--json"]).stdout)
    assert parsed["Vietnamese"]["steps"][-1] == {
        "reason": "reference_mismatch", "num_caught": 1, "num_removed": 1, "num_left": 1, "left_s": 7200.0,
    }  # fmt: skip
    assert CliRunner().invoke(app, ["funnel", str(tmp_path / "nowhere")]).exit_code == 2


def test_an_output_without_units(tmp_path: Path) -> None:
    empty = start(str(tmp_path / "empty"), {SPLIT: 100.0})
    assert read_funnel(empty).total() == (0, 0.0)
    assert "caught nothing" in CliRunner().invoke(app, ["funnel", empty.url]).stdout
    with pytest.raises(ConfigError, match="holds no plan.json"):
        read_funnel(Output(str(tmp_path), {}))
