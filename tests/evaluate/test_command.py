"""`shardscribe evaluate` as a user runs it: three kinds of input, three files out, mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from jobs.cli import app
from pipeline.output import Output
from pipeline.units import UnitKey
from tests.conftest import write_tar
from tests.outputs import failed, put, row, start

A = "a" * 16
WORDS = "hello there my old friend"


def evaluate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def words_of(result: Result) -> str:
    return " ".join(result.output.split())


def output_of(folder: Path, *texts: str | None, **values: Any) -> Output:
    """An output of recordings in `talks.tar` whose reference is `WORDS`; None fails."""
    output = start(str(folder), {A: 10.0})
    rows = []
    for number, text in enumerate(texts):
        shared = {"text_ref": WORDS, "language_ref": "English"} | values
        name = f"in/talks-00000.tar/{number}.wav"
        rows.append(failed(name, **shared) if text is None else row(name, text=text, **shared))
    put(output, UnitKey(A, 0, 0, "z"), rows)
    return output


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "hypotheses.jsonl"
    items = [{"reference": WORDS, "hypothesis": f"{WORDS} {i}", "language": "en", "id": f"{i}"} for i in range(1, 4)]
    path.write_text("\n".join(map(json.dumps, items)))
    return path


def test_an_output_gives_a_table_and_three_files(tmp_path: Path) -> None:
    output_of(tmp_path / "run", WORDS, "hello there old friend", None)
    result = evaluate(tmp_path / "run", "--out", tmp_path / "scores")
    assert result.exit_code == 0, result.output
    assert "all words WER 40.00 %" in words_of(result) and "set talks English WER 40.00 %" in words_of(result)
    found = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    (overall,) = found["overall"]
    assert (overall["rate"], overall["num_failed"]) == (0.4, 1)
    assert overall["counts"] == {"substitutions": 0, "deletions": 6, "insertions": 0, "num_reference": 15}
    assert [(item["id"], item["rate"], item["status"]) for item in found["items"]] == [
        ("in/talks-00000.tar/0.wav", 0.0, "ok"),
        ("in/talks-00000.tar/1.wav", 0.2, "ok"),
        ("in/talks-00000.tar/2.wav", 1.0, "failed"),
    ]
    assert found["system"]["made_by"]["model_id"] == "embedded/student" and found["system"]["rtfx"] > 0
    assert [step["reason"] for step in found["funnel"]] == [None, "failed"]
    text = (tmp_path / "scores" / "evaluation.md").read_text()
    for part in ("| talks English | WER 40.00 % |", "| failed | 2 | 0.00 | WER 10.00 % |", "there ~~my~~ old friend"):
        assert part in text
    assert "<h1>" in (tmp_path / "scores" / "evaluation.html").read_text()


def test_without_out_nothing_is_written(tmp_path: Path) -> None:
    output_of(tmp_path / "run", WORDS)
    before = sorted(tmp_path.rglob("*"))
    assert evaluate(tmp_path / "run").exit_code == 0 and sorted(tmp_path.rglob("*")) == before


def test_json_is_all_that_is_printed(lines: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", "--hypotheses", str(lines), "--json"])
    found = json.loads(result.stdout)
    assert [each["rate"] for each in found["languages"]] == [0.2] and found["against"] is None


def test_only_what_filters_kept(tmp_path: Path) -> None:
    output_of(tmp_path / "run", WORDS, None)
    found = json.loads(evaluate(tmp_path / "run", "--json", "--kept-only").stdout)
    assert [each["rate"] for each in found["overall"]] == [0.0] and len(found["items"]) == 1
    output_of(tmp_path / "none", None)
    result = evaluate(tmp_path / "none", "--kept-only")
    assert result.exit_code == 2 and "filters caught every recording" in result.output


def test_against_another_output(tmp_path: Path) -> None:
    output_of(tmp_path / "one", WORDS, WORDS, WORDS)
    output_of(tmp_path / "two", "hello there", None, WORDS)
    result = evaluate(tmp_path / "one", "--against", tmp_path / "two", "--out", tmp_path / "scores")
    assert result.exit_code == 0
    assert "against  all words: WER 0.00 % to 53.33 %, -53.33 (-100.00 to +0.00), p 0.500" in result.output
    found = json.loads((tmp_path / "scores" / "evaluation.json").read_text())["against"]
    assert found["contrasts"][0]["num_better"] == 2 and found["contrasts"][0]["difference"]["p_value"] == 0.5
    assert f"## Against {tmp_path / 'two'}" in (tmp_path / "scores" / "evaluation.md").read_text()


def test_hypotheses_without_a_language_are_scored_and_said_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"reference": "I\'m here", "hypothesis": "I am here"}')
    result = evaluate("--hypotheses", path)
    assert result.exit_code == 0 and "1 items name no language and are scored by word" in result.output
    assert "all words WER 33.33 %" in words_of(result), "i m here"
    assert "all words WER 0.00 %" in words_of(evaluate("--hypotheses", path, "--language", "en"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to score: name an output folder, --hypotheses FILE"),
        (["--manifest", "x.jsonl"], "--manifest FILE and --model MODEL go together"),
        (["--set", "engine.name=offline", "{run}"], "--manifest FILE and --model MODEL go together"),
        (["--manifest", "x.jsonl", "--model", "embedded/student"], "--manifest needs --out DIR"),
        (["--manifest", "x", "--model", "m", "--out", "{run}", "--set", "engine.nme=x"], "did you mean `name`?"),
        (["--hypotheses", "/nowhere/a.jsonl"], "/nowhere/a.jsonl"),
        (["/nowhere/out"], "/nowhere/out holds no plan.json"),
        (["{run}", "--language", "Klingon"], "language 'Klingon' is none that Qwen3-ASR knows"),
        (["{run}", "--against", "{lines}"], "--against: different sets. 1 of 1 items of"),
        (["{run}", "{run}"], "is in "),
    ],
)
def test_a_mistake_is_one_message(tmp_path: Path, lines: Path, arguments: list[str], message: str) -> None:
    output_of(tmp_path / "run", WORDS)
    filled = [each.format(run=tmp_path / "run", lines=lines) for each in arguments]
    result = evaluate(*filled)
    assert result.exit_code in (1, 2) and message in result.output and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.usefixtures("local_ray")
def test_a_model_on_a_manifest_is_transcribed_then_scored(tmp_path: Path, light_checkpoint: Path) -> None:
    write_tar(tmp_path / "set.tar", [2, 3])
    (tmp_path / "cut.wav").write_bytes(b"")
    manifest = tmp_path / "test-set.jsonl"
    entries = [{"audio_filepath": "cut.wav", "text": "never heard", "lang": "en"}]
    manifest.write_text("\n".join(map(json.dumps, entries)))
    result = evaluate(
        *("--manifest", manifest, "--manifest", tmp_path / "set.tar", "--model", light_checkpoint),
        *("--out", tmp_path / "out", "--set", "units.target_s=10"),
    )
    assert result.exit_code == 3, "one recording failed, and the rest is scored"
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert {item["id"].rpartition("/")[2]: item["status"] for item in found["items"]}["cut.wav"] == "failed"
    assert len(found["items"]) == 3 and found["system"]["rtfx"] > 0
    assert (tmp_path / "out" / "transcripts").is_dir() and found["languages"][0]["name"] == "English"
    again = evaluate("--manifest", tmp_path / "set.tar", "--model", light_checkpoint, "--out", tmp_path / "out")
    assert again.exit_code == 2 and "the inputs have changed" in again.output or "another configuration" in again.output
