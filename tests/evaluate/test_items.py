"""Hypotheses as JSON lines: what a line may say, and what is refused with file, line and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.evaluate.items import UNKNOWN, Item, System, only_kept, pooled, read_hypotheses


def write(path: Path, *lines: dict[str, Any] | str) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_all_that_a_line_may_say(tmp_path: Path) -> None:
    full = {
        "reference": "xin chào",
        "hypothesis": "xin chao",
        "language": "vi-VN",
        "id": 7,
        "set": "test",
        "duration": 2,
        "detected": "Vietnamese",
        "avg_logprob": -0.5,
        "filter_reasons": ["low_logprob"],
        "more": {"is": "ignored"},
    }
    bare = {"reference": "", "hypothesis": None, "audio_filepath": "a.wav"}
    system = read_hypotheses(write(tmp_path / "a.jsonl", full, "", bare, {"reference": "a", "hypothesis": "b"}), {})
    first, second, third = system.items
    assert first == Item("7", "xin chào", "xin chao", "Vietnamese", "test", 2.0, "Vietnamese", -0.5, ("low_logprob",))
    assert (second.item_id, second.hypothesis, second.status, second.language) == ("a.wav", None, "failed", UNKNOWN)
    assert third.item_id == "line 4", "blank lines count"
    assert system.num_without_language == 2 and system.made_by == {} and system.rtfx is None
    assert [row.filter_reasons for row in system.rows] == [("low_logprob",), (), ()]


def test_a_language_for_all_overrides_their_own(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"reference": "a", "hypothesis": "b", "language": "Klingon"})
    assert [item.language for item in read_hypotheses(path, {}, "Thai").items] == ["Thai"]


def test_of_several_languages_the_first_decides(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"reference": "a", "hypothesis": "b", "language": "zh,English"})
    assert [item.language for item in read_hypotheses(path, {}).items] == ["Chinese,English"]


GOOD = {"reference": "a", "hypothesis": "b", "id": "x"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON: Expecting property name"),
        ("[1]", "a JSON list, where an object is right"),
        ({"hypothesis": "b", "text": "a"}, "no `reference`; its keys are hypothesis, text"),
        ({"reference": "b"}, "no `hypothesis`; its keys are reference"),
        ({"reference": None, "hypothesis": "b"}, "`reference` is null"),
        ({"reference": 3, "hypothesis": "b"}, "`reference` is a int, where a string is right"),
        (GOOD | {"id": "y", "language": "Klingon"}, "language 'Klingon' is none that Qwen3-ASR knows"),
        (GOOD | {"id": "y", "duration": "2 s"}, "`duration` is '2 s', where a number is right"),
        (GOOD | {"id": "y", "duration": -1}, "`duration` is -1.0, and below 0"),
        (GOOD | {"id": "y", "avg_logprob": float("nan")}, "`avg_logprob` is nan"),
        (GOOD | {"id": "y", "filter_reasons": "empty"}, "`filter_reasons` is 'empty', where a list"),
        (GOOD, "the id 'x' is that of line 1, too"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, line)
    with pytest.raises(ConfigError) as raised:
        read_hypotheses(path, {})
    assert str(raised.value).startswith(f"{path}, line 2: {message}")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_says_what_a_line_is(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r'a.jsonl is empty; a line is \{"reference"'):
        read_hypotheses(str(tmp_path / "a.jsonl"), {})


def test_several_sets_are_one_system_and_a_recording_counts_once() -> None:
    one, two = (System(name, [Item(name, "a", "a", "English")], []) for name in "ab")
    assert [item.item_id for item in pooled([one, two]).items] == ["a", "b"]
    with pytest.raises(ConfigError, match="a is in a and in c; a recording counts once"):
        pooled([one, System("c", one.items, [])])


def test_only_what_no_filter_caught() -> None:
    items = [Item("a", "a", "a", "English"), Item("b", "b", "", "English", filter_reasons=("empty",))]
    assert [item.item_id for item in only_kept(System("s", items, [])).items] == ["a"]
