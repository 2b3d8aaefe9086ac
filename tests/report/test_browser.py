"""The page as headless Chromium shows it: drawn, narrow enough for a phone, searchable, audible, safe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.report.audio import read_clips
from pipeline.report.gather import gather
from pipeline.report.page import render
from pipeline.sources.plan import plan
from pipeline.units import UnitKey
from tests.browser import NEEDS_CHROMIUM, Browser, framed, pixels, said
from tests.outputs import archive, config, failed, put, row, start
from tests.report.test_audio import make_inputs

pytestmark = NEEDS_CHROMIUM
HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
TALL = 5000


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page about three recordings that are there to hear, one of them filtered, and a hostile failure."""
    job = config(str(tmp_path / "out"), [make_inputs(tmp_path, "tar")])
    (split,) = plan(job.inputs, {}, job.units.target_s)
    tar = tmp_path / "shard.tar"
    names = [f"{tar}/talk.tar/{i}.flac" for i in range(3)]
    rows = [
        row(names[0], duration=3.0, text="Công nhân rất giận", language="Vietnamese", avg_logprob=-0.1),
        row(names[1], duration=2.0, text="x" * 300, text_ref=HOSTILE),
        row(names[2], duration=1.0, text=HOSTILE, keep=False, filter_reasons=["low_logprob"], avg_logprob=-2.0),
        failed(f"{tar}/{HOSTILE}.wav", f"not_audio: {HOSTILE}"),
    ]
    output = start(job.output, {split.split_id: 6.0}, job)
    put(output, UnitKey(split.split_id, 0, 0, "z"), rows)
    report = gather(output, {}, 24)
    path = tmp_path / "page.html"
    path.write_text(render(report, read_clips([each for _, each in report.samples], report.config, {})))
    return path


def shown(dom: str) -> tuple[str, list[str]]:
    """What the filter's counter says, and the kinds of the rows that are not hidden."""
    (counter,) = re.findall(r'id="shown"[^>]*>([^<]*)<', dom)
    rows = re.findall(r"<tr [^>]*data-kind=[^>]*>", dom)
    return counter, [re.findall(r'data-kind="(\w+)"', tag)[0] for tag in rows if "hidden" not in tag]


def test_hostile_texts_run_nothing(page: Path, browser: Browser) -> None:
    dom = browser("--dump-dom", f"file://{page}")
    assert "<title>Shardscribe report: " in dom and "<title>owned" not in dom and "<img" not in dom
    assert dom.count("&lt;script&gt;document.title") >= 4


def test_a_script_that_gets_into_the_page_is_refused(page: Path, browser: Browser) -> None:
    page.write_text(page.read_text().replace("</main>", f"{HOSTILE}</main>"))
    dom = browser("--dump-dom", f"file://{page}", complaints=True)
    assert "<img src=" in dom and "<title>owned" not in dom, "neither the script nor the image nor its handler"


@pytest.mark.parametrize(
    ("fragment", "counter", "kinds"),
    [
        ("", "4 of 4", ["kept", "kept", "filtered", "failed"]),
        ("kind=failed", "1 of 4", ["failed"]),
        ("language=Vietnamese", "1 of 4", ["kept"]),
        ("find=CONG+nhan", "1 of 4", ["kept"]),
        ("find=talk.tar&kind=kept", "2 of 4", ["kept", "kept"]),
        ("find=nowhere", "0 of 4", []),
    ],
)
def test_segments_are_searched_and_the_address_remembers(
    page: Path, browser: Browser, fragment: str, counter: str, kinds: list[str]
) -> None:
    assert shown(browser("--dump-dom", f"file://{page}#{fragment}")) == (counter, kinds)


def test_every_player_has_the_audio_of_its_row(page: Path, browser: Browser) -> None:
    script = "[...it.querySelectorAll('audio')].map((audio) => [audio.error, audio.duration.toFixed(1)]).join(' ')"
    assert sorted(said(browser("--dump-dom", framed(page, script))).split()) == [",1.0", ",2.0", ",3.0"]


@pytest.mark.parametrize("width", [320, 700, 1400])
def test_nothing_is_wider_than_the_screen(page: Path, browser: Browser, width: int) -> None:
    script = "it.documentElement.scrollWidth"
    assert int(said(browser("--dump-dom", framed(page, script, width)))) == width


def test_an_archive_is_drawn_in_light_and_dark(tmp_path: Path, browser: Browser) -> None:
    report = gather(archive(str(tmp_path / "out"), num_shards=20, num_groups=3, missing=4), {}, 24)
    path = tmp_path / "page.html"
    path.write_text(render(report, None))
    shots = {}
    for scheme, setting in (("light", 1), ("dark", 0)):
        shot = tmp_path / f"{scheme}.png"
        flags = (f"--blink-settings=preferredColorScheme={setting}", f"--window-size=1400,{TALL}")
        browser(f"--screenshot={shot}", *flags, f"file://{path}")
        shots[scheme] = pixels(shot)
        assert shots[scheme].shape == (TALL, 1400, 3)
    assert shots["light"][3, 3].min() > 230 and shots["dark"][3, 3].max() < 40
    for scheme, kept, caught in (
        ("light", (0x2A, 0x75, 0x93), (0xD8, 0x96, 0x2C)),
        ("dark", (0x56, 0xA9, 0xC8), (0xDD, 0xA8, 0x4F)),
    ):
        for colour, at_least in ((kept, 20_000), (caught, 500)):
            assert (shots[scheme] == colour).all(axis=2).sum() > at_least, f"bars of {colour} on the {scheme} page"
