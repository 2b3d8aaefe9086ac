"""Subtitles, read back by the libraries of their formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.export.subtitles import Cue, cues_of, to_srt, to_vtt
from tests.export.inputs import export, make, row
from tests.outputs import config, start

srt = pytest.importorskip("srt")
webvtt = pytest.importorskip("webvtt")


def sentence(text: str, offset: float, duration: float) -> dict[str, Any]:
    return {"text": text, "offset": offset, "duration": duration}


def a_row(
    *sentences: dict[str, Any], words: list[dict[str, Any]] | None = None, offset: float = 10.0
) -> dict[str, Any]:
    text = " ".join(each["text"] for each in sentences)
    return {"text": text, "offset": 10.0, "duration": 20.0, "sentences": list(sentences), "words": words}


def test_a_sentence_is_a_cue() -> None:
    cues = cues_of(a_row(sentence("One here.", 10.0, 2.0), sentence("Two there.", 12.5, 3.0)))
    assert cues == [Cue(10.0, 12.0, ["One here."]), Cue(12.5, 15.5, ["Two there."])]
    without = {"text": "No sentences.", "offset": 3.0, "duration": 2.0, "sentences": None, "words": None}
    assert cues_of(without) == [Cue(3.0, 5.0, ["No sentences."])]
    assert cues_of(without | {"text": ""}) == []


def test_a_long_sentence_is_cut_between_words_at_its_share_of_letters() -> None:
    text = " ".join(["abcdefghi"] * 16)  # four to a line
    cues = cues_of(a_row(sentence(text, 10.0, 16.0)))
    assert [cue.lines for cue in cues] == [[" ".join(["abcdefghi"] * 4)] * 2] * 2
    assert [(cue.start_s, cue.end_s) for cue in cues] == [(10.0, 18.0), (18.0, 26.0)]


def test_with_word_times_a_cut_stands_where_the_word_does() -> None:
    words = [{"word": "abcdefghi", "start": i + 0.25 + (i >= 8) * 5, "end": i + 0.75 + (i >= 8) * 5} for i in range(16)]
    cues = cues_of(a_row(sentence(" ".join(["abcdefghi"] * 16), 10.0, 21.0), words=words))
    assert [(cue.start_s, cue.end_s) for cue in cues] == [(10.25, 17.75), (23.25, 30.75)]


def test_chinese_is_cut_by_its_width() -> None:
    cues = cues_of(a_row(sentence("今天天气很好我们一起去公园散步" * 4, 10.0, 20.0)))
    assert [len(line) for cue in cues for line in cue.lines] == [21, 21, 18]
    assert "".join(line for cue in cues for line in cue.lines) == "今天天气很好我们一起去公园散步" * 4


def test_a_word_wider_than_a_line_and_marks_that_mean_something() -> None:
    cues = cues_of(a_row(sentence("a " + "x" * 100 + " b --> <i>&amp;", 10.0, 5.0)))
    assert max(len(line) for cue in cues for line in cue.lines) <= 42
    assert "".join("".join(cue.lines) for cue in cues).replace(" ", "") == "a" + "x" * 100 + "b--><i>&amp;"
    (parsed,) = webvtt.from_string(to_vtt([Cue(0.0, 3725.5, ["a --> <b> & c", "d"])]))
    assert parsed.raw_text == "a --&gt; &lt;b&gt; &amp; c\nd" and parsed.end == "01:02:05.500"
    (cue,) = srt.parse(to_srt([Cue(1.0, 3725.5, ["a --> b"])]))
    assert cue.content == "a -> b" and cue.end.total_seconds() == 3725.5


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_a_file_a_recording(tmp_path: Path, kind: str) -> None:
    output = make(tmp_path)
    assert export(output, kind, tmp_path / "subs").exit_code == 0
    index = [json.loads(line) for line in (tmp_path / "subs" / "index-00000.jsonl").read_text().splitlines()]
    assert len(index) == 4 and len({entry["file"] for entry in index}) == 4
    (entry,) = [entry for entry in index if entry["audio_filepath"].endswith("long.wav")]
    assert entry["file"].startswith("long-") and entry["file"].endswith(f".{kind}")
    text = (tmp_path / "subs" / entry["file"]).read_text()
    cues = list(srt.parse(text)) if kind == "srt" else list(webvtt.from_string(text))
    assert [cue.content if kind == "srt" else cue.text for cue in cues] == ["Part 0.", "Part 3.25.", "Part 5.75."]
    last = cues[-1].end.total_seconds() if kind == "srt" else cues[-1].end_in_seconds
    assert last == 9.0


def test_units_of_one_recording_make_one_file(tmp_path: Path) -> None:
    from pipeline.sources.plan import plan
    from pipeline.units import UnitKey
    from tests import outputs

    output = make(tmp_path)
    job = config(output.url, [str(tmp_path / "in" / "long.wav")])
    (split,) = plan(job.inputs, {}, 1800)
    other = start(str(tmp_path / "parts"), {split.split_id: 9.0}, job)
    late = row(job.inputs[0].path, offset=5.0, duration=4.0, text="Late.")
    early = row(job.inputs[0].path, offset=0.0, duration=5.0, text="Early.")
    outputs.put(other, UnitKey(split.split_id, 0, 0, "p"), [early])
    outputs.put(other, UnitKey(split.split_id, 0, 1, "z"), [late])
    assert export(other, "srt", tmp_path / "subs").exit_code == 0
    (path,) = (tmp_path / "subs").glob("*.srt")
    assert [cue.content for cue in srt.parse(path.read_text())] == ["Early.", "Late."]
