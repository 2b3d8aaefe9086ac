"""The page and the command that writes it: every state of a job, hostile texts, nothing loaded from elsewhere."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner, Result

from jobs.cli import app
from pipeline.output import Output
from pipeline.report.audio import Clip
from pipeline.report.gather import Report, gather
from pipeline.report.page import _clock, _percent, render
from pipeline.units import UnitKey
from tests.outputs import archive, failed, put, row, start

A, B = "a" * 16, "b" * 16
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7919 * 7907 }}"


class Tags(HTMLParser):
    """All tags of a page with their attributes, and all that is between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "

    def values(self, attribute: str) -> list[str]:
        return [str(attrs[attribute]) for _, attrs in self.tags if attribute in attrs]


def shardscribe(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def pages_of(report: Report) -> str:
    return " ".join(Tags(render(report, None)).text.split())


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return start(str(tmp_path / "out"), {A: 100.0, B: 4000.0})


def test_a_finished_job(tmp_path: Path) -> None:
    output = archive(str(tmp_path), num_shards=6, num_groups=2)
    text = pages_of(gather(output, {}, 24))
    assert "complete, with failures" in text and "ETA" not in text and "unfinished" not in text
    for part in (str(tmp_path), "embedded/student", "6f7ca6f57717", "20260924T101320-0fd2c1", "3 d pause", "RTFx"):
        assert part in text
    for part in ("Vietnamese", "not_audio", "low_logprob", "2026/calls-00003.tar", "24 of 720", "torch 2.13.0"):
        assert part in text


def test_an_unfinished_job_says_what_is_left(output: Output) -> None:
    put(output, UnitKey(A, 0, 0, "z"), [row(duration=100.0)])
    text = pages_of(gather(output, {}, 24))
    assert "unfinished 1 of 2 shards complete, about 6 min 40 s of work left" in text, "4000 s at 10x"
    assert "1 min 40 s audio of ~1 h 8 min" in text and "planned, estimated" in text and "10.0x real time" in text


def test_a_job_before_its_first_unit(output: Output) -> None:
    text = pages_of(gather(output, {}, 24))
    assert "unfinished 0 of 2 shards complete" in text and text.count("No unit is committed yet.") == 2
    assert "No segment is there yet." in text and "not known before the first unit" in text


def test_an_all_failed_job(tmp_path: Path) -> None:
    output = start(str(tmp_path), {A: 100.0})
    put(output, UnitKey(A, 0, 0, "z"), [failed(f"in/{i}.wav") for i in range(5)])
    text = pages_of(gather(output, {}, 24))
    assert "complete, all failed" in text and "100.0 % of segments failed" in text and "5 of 5" in text


def test_a_finished_job_on_inputs_without_recordings(tmp_path: Path) -> None:
    output = start(str(tmp_path), {A: 100.0})
    put(output, UnitKey(A, 0, 0, "z"), [])
    text = pages_of(gather(output, {}, 24))
    assert "complete the inputs held no recordings" in text and "– of segments kept" in text


def test_hostile_texts_and_names_stay_text(tmp_path: Path) -> None:
    output = start(str(tmp_path / HOSTILE.replace("/", "")), {A: 100.0})
    name = f"in/{HOSTILE}.tar/{HOSTILE}.wav"
    values = {"text": HOSTILE, "text_ref": HOSTILE, "language": HOSTILE, "filter_reasons": [HOSTILE], "keep": False}
    put(output, UnitKey(A, 0, 0, "z"), [row(name, **values), failed(name, f"{HOSTILE}: {HOSTILE}")])
    report = gather(output, {}, 24)
    page = render(report, [Clip(None, HOSTILE)] * 2)
    tags = Tags(page)
    assert [tag for tag, _ in tags.tags].count("script") == 1 and "img" not in {tag for tag, _ in tags.tags}
    assert not [attribute for _, attrs in tags.tags for attribute in attrs if attribute.startswith("on")]
    assert tags.text.count(HOSTILE) >= 8 and str(7919 * 7907) not in page


def test_nothing_is_loaded_and_no_other_script_may_run(tmp_path: Path) -> None:
    output = archive(str(tmp_path), num_shards=2, num_groups=1)
    report = gather(output, {}, 6)
    tags = Tags(render(report, [Clip(b"OggS", "")] * 6))
    assert set(tags.values("src")) == {"data:audio/ogg;base64,T2dnUw=="} and tags.values("href") == ["data:,"]
    policy = next(str(attrs["content"]) for _, attrs in tags.tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy and "http" not in policy


def test_long_texts_are_cut(output: Output) -> None:
    put(output, UnitKey(A, 0, 0, "z"), [row(text="t" * 9000, text_ref="r" * 900_000)])
    page = render(gather(output, {}, 24), None)
    assert len(page) < 60_000 and "r" * 399 + "…" in page and "t" * 1999 + "…" in page


def test_one_reason_for_all_missing_audio_is_said_once(output: Output) -> None:
    put(output, UnitKey(A, 0, 0, "z"), [row(f"in/{i}.wav") for i in range(6)])
    report = gather(output, {}, 6)
    text = Tags(render(report, [Clip(None, "the bucket is gone")] * 5 + [Clip(None, "another")])).text
    assert text.count("the bucket is gone") == 1 and text.count("No audio: see above") == 5
    assert "No audio: another" in text


def test_a_page_is_the_same_for_the_same_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = archive(str(tmp_path), num_shards=3, num_groups=2)
    monkeypatch.setattr("time.time", lambda: 1.8e9)
    assert render(gather(output, {}, 24), None) == render(gather(output, {}, 24), None)


def test_the_page_grows_with_what_it_shows_not_with_the_job(tmp_path: Path) -> None:
    small = render(gather(archive(str(tmp_path / "small"), 12, 1), {}, 6), None)
    large = render(gather(archive(str(tmp_path / "large"), 60, 3), {}, 6), None)
    assert len(large) < 1.5 * len(small), "of 15 times the rows"


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 10, "0.0 %"), (1, 1e6, "<0.1 %"), (999_999, 1e6, ">99.9 %"), (5, 5, "100.0 %"), (1, 8, "12.5 %"), (0, 0, "–")],
)
def test_a_share_is_never_rounded_to_none_or_all(part: int, whole: int, text: str) -> None:
    assert _percent(part, whole) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00.0"), (59.96, "1:00.0"), (3723.4, "1:02:03.4")])
def test_a_place_in_a_recording(seconds: float, text: str) -> None:
    assert _clock(seconds) == text


def test_the_command_writes_into_a_local_output(tmp_path: Path) -> None:
    archive(str(tmp_path / "out"), num_shards=2, num_groups=1)
    result = shardscribe("report", tmp_path / "out", "--samples", 5)
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "out" / "report.html") in result.output
    assert "5 of 5 samples without audio, such as: inputs[0] nowhere/*.tar: nothing to read there" in result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "5 of 120" in page
    assert shardscribe("report", tmp_path / "out").exit_code == 0, "and again, over the page that is there"


def test_the_command_writes_where_told_and_without_audio(tmp_path: Path) -> None:
    archive(str(tmp_path / "out"), num_shards=1, num_groups=1)
    result = shardscribe("report", tmp_path / "out", "--no-audio", "--out", tmp_path / "new" / "page.html")
    assert result.exit_code == 0 and "without audio" not in result.output
    assert "Without audio, as asked for." in (tmp_path / "new" / "page.html").read_text()
    assert not (tmp_path / "out" / "report.html").exists()


def test_the_page_of_a_remote_output_comes_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    archive("memory://bucket/report-test", num_shards=2, num_groups=1)
    result = shardscribe("report", "memory://bucket/report-test", "--no-audio")
    assert result.exit_code == 0, result.output
    assert "memory://bucket/report-test" in (tmp_path / "report.html").read_text()
    assert not fsspec.filesystem("memory").exists("/bucket/report-test/report.html")


def test_mistakes_are_one_message(tmp_path: Path) -> None:
    missing = shardscribe("report", tmp_path)
    assert missing.exit_code == 2 and "holds no plan.json" in missing.output and "Traceback" not in missing.output
    assert not (tmp_path / "report.html").exists()
    assert shardscribe("report", tmp_path, "--samples", "-1").exit_code == 2


def test_help_has_examples() -> None:
    result = shardscribe("report", "--help")
    assert result.exit_code == 0 and "shardscribe report" in result.output and "Examples" in result.output
