"""The page of an evaluation, as HTML and as headless Chromium shows it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from pipeline.evaluate import charts
from pipeline.evaluate.compare import compare, matched
from pipeline.evaluate.document import shortened, to_markdown
from pipeline.evaluate.items import Item, Row, System
from pipeline.evaluate.page import render
from pipeline.evaluate.scores import Evaluation, evaluate
from pipeline.metrics import Edit
from tests.browser import NEEDS_CHROMIUM, Browser, framed, pixels, said

HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
TEXTS = {"English": "we walked home last night", "Vietnamese": "hôm nay trời có nắng nhẹ", "Chinese": "今天天气很好"}


def made_up(seed: int, num_items: int = 200, error_share: float = 0.1) -> System:
    """Recordings in three languages and two sets; a word or character in `1 / error_share` is wrong."""
    rng = random.Random(seed)
    items = []
    for number in range(num_items):
        language = rng.choice(list(TEXTS))
        between = "" if language == "Chinese" else " "
        words = list(TEXTS[language]) if language == "Chinese" else TEXTS[language].split()
        said_words = [rng.choice(["", words[0] + words[-1]]) if rng.random() < error_share else word for word in words]
        reasons = ("low_logprob",) if rng.random() < 0.1 else ()
        items.append(
            Item(
                item_id=f"in/talks.tar/{number}.wav",
                reference=between.join(words),
                hypothesis=between.join(said_words) if number else None,
                language=language,
                set_name=("talks", "calls")[number % 2],
                duration_s=number / num_items * 40,
                detected=language,
                avg_logprob=-rng.gammavariate(2, 0.1),
                filter_reasons=reasons,
            )
        )
    made_by = {"engine": "offline", "model_id": "some/model", "model_revision": "0123456789abcdef"}
    rows = [Row(each.duration_s, each.filter_reasons) for each in items]
    return System(f"out/run-{seed}", items, rows, 2, made_by, 812.5)


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(made_up(1))


def write_page(folder: Path, evaluation: Evaluation) -> Path:
    path = folder / "page.html"
    path.write_text(render(evaluation, compare(evaluation, matched(evaluation.system, made_up(1, error_share=0.1)))))
    return path


def test_the_page_and_the_markdown_say_the_same(evaluation: Evaluation) -> None:
    comparison = compare(evaluation, matched(evaluation.system, made_up(1)))
    page, text = render(evaluation, comparison), to_markdown(evaluation, comparison)
    (english,) = [group for group in evaluation.languages if group.name == "English"]
    rate = f"{100 * english.counts.rate:.2f} %"
    for shown in (page, text):
        assert rate in shown and "low_logprob" in shown and "calls" in shown and "10 to 15 s" in shown
    assert "812.5x" in page and "RTFx 812.5" in text and "0123456789ab<" in page and "1 failed" in page


def test_items_without_anything_but_texts_give_a_page() -> None:
    evaluation = evaluate(System("bare", [Item("a", "red", "red", "unknown")], [Row(None, ())]))
    page = render(evaluation, None)
    assert "Not one error." in page and "1 without a language" in page
    for missing in ("By duration", "Confidence", "By set", "What filters leave", "real time", "Against"):
        assert missing not in page
    nothing = evaluate(System("no words", [Item("a", "!", "noise", "English"), Item("b", "", "", "English")], []))
    assert "no reference" in render(nothing, None) and "no reference" in to_markdown(nothing, None)


def test_bars_have_their_intervals_and_an_outlier_flattens_none(evaluation: Evaluation) -> None:
    chart = charts.language_chart(evaluation.languages)
    top = float(chart.y_ticks[-1].label.removesuffix(" %"))
    for bar, group in zip(chart.bars, evaluation.languages, strict=True):
        assert bar.height == pytest.approx(100 * 100 * group.counts.rate / top) and group.name in bar.title
    assert chart.whiskers.count("V") == 3 and chart.whiskers.count("H") == 6 and chart.y_title == "WER and CER"
    wild = evaluate(System("wild", [Item("a", "red", "x " * 40, "English"), *(_short(i) for i in range(200))], []))
    (rate,) = wild.languages
    assert rate.interval is not None and rate.interval[1] > 2 * rate.counts.rate
    cut = charts.language_chart(wild.languages)
    assert "V0.00" in cut.whiskers and cut.whiskers.count("H") == 1, "its upper end is beyond the plot"


def _short(number: int) -> Item:
    return Item(f"short {number}", "red", "red", "English")


def test_durations_are_named_by_their_upper_edge() -> None:
    items = [Item(str(s), "red", "tan", "English", duration_s=s) for s in (1.0, 59.0, 100.0, 999.0)]
    chart = charts.duration_chart(evaluate(System("s", items, [])).durations)
    assert [tick.label for tick in chart.x_ticks] == ["2 s", "60 s", "5 min", ">5 min"]
    assert [bar.title.partition(":")[0] for bar in chart.bars] == ["0 to 2 s", "30 to 60 s", "1 to 5 min", "over 5 min"]


def test_names_of_many_languages_are_codes() -> None:
    names = ("English", "German", "French", "Thai", "Hindi", "Dutch", "Polish", "Czech", "Vietnamese")
    evaluation = evaluate(System("many", [Item(name, "a", "b", name) for name in names], []))
    chart = charts.language_chart(evaluation.languages)
    assert {tick.label for tick in chart.x_ticks} == {"en", "de", "fr", "th", "hi", "nl", "pl", "cs", "vi"}


def test_calibration_bars_stand_at_their_confidence(evaluation: Evaluation) -> None:
    assert evaluation.calibration is not None
    chart = charts.calibration_chart(evaluation.calibration)
    for bar, each in zip(chart.bars, evaluation.calibration.bins, strict=True):
        assert bar.x > 100 * each.low and bar.x + bar.width < 100 * each.high
        assert bar.height == pytest.approx(100 * each.accuracy) and math.isfinite(bar.y)


def test_long_alignments_are_shortened() -> None:
    right = Edit("equal", tuple("abcdefghij"), tuple("abcdefghij"))
    wrong = Edit("substitute", ("x",), ("y",))
    first, _, middle, *_ = shown = list(shortened([right, wrong] * 50))
    assert first is not None and first.reference == ("…", "h", "i", "j")
    assert middle is not None and middle.reference == ("a", "b", "c", "…", "h", "i", "j")
    assert len(shown) == 81 and shown[-1] is None
    assert list(shortened([wrong])) == [wrong]


def test_hostile_texts_are_escaped() -> None:
    items = [Item(HOSTILE, "red tan", HOSTILE, "English", set_name=HOSTILE, filter_reasons=(HOSTILE,))]
    system = System(HOSTILE, items, [Row(1.0, (HOSTILE,))], made_by={"model_id": HOSTILE})
    evaluation = evaluate(system)
    page = render(evaluation, compare(evaluation, system))
    assert "<script" not in page and "<img" not in page and page.count("&lt;script&gt;") >= 5
    assert "\n| \\|" not in to_markdown(evaluation, None)


@NEEDS_CHROMIUM
@pytest.mark.parametrize("width", [320, 700, 1400])
def test_nothing_is_wider_than_the_screen(evaluation: Evaluation, tmp_path: Path, browser: Browser, width: int) -> None:
    script = "it.documentElement.scrollWidth"
    assert int(said(browser("--dump-dom", framed(write_page(tmp_path, evaluation), script, width)))) == width


@NEEDS_CHROMIUM
def test_the_plots_are_drawn_where_their_figures_are(evaluation: Evaluation, tmp_path: Path, browser: Browser) -> None:
    """Bars, as the browser lays them out, are as high as their rates; whiskers and labels are to be seen."""
    script = (
        "JSON.stringify([...it.querySelectorAll('.plot')].map((plot) => [plot.querySelector('svg').ariaLabel, "
        "[...plot.querySelectorAll('rect')].map((bar) => bar.getBoundingClientRect().height / plot.clientHeight), "
        "plot.querySelectorAll('.whisker').length && plot.querySelector('.whisker').getBoundingClientRect().width > 0, "
        "[...plot.querySelectorAll('span.x')].map((label) => label.textContent)]))"
    )
    found = json.loads(said(browser("--dump-dom", framed(write_page(tmp_path, evaluation), script))))
    labels = [label for label, *_ in found]
    assert labels == [
        "Error rate by language",
        "WER by duration",
        "CER by duration",
        "Share of right words by confidence",
    ]
    top = float(charts.language_chart(evaluation.languages).y_ticks[-1].label.removesuffix(" %"))
    _, heights, has_whiskers, names = found[0]
    assert has_whiskers and names == [group.name for group in evaluation.languages]
    assert heights == pytest.approx([100 * group.counts.rate / top for group in evaluation.languages], abs=0.01)


@NEEDS_CHROMIUM
def test_it_is_drawn_in_light_and_dark(evaluation: Evaluation, tmp_path: Path, browser: Browser) -> None:
    path = write_page(tmp_path, evaluation)
    light, dark = ((0xF6, 0xF5, 0xF1), (0x2A, 0x75, 0x93)), ((0x13, 0x17, 0x1A), (0x56, 0xA9, 0xC8))
    for setting, (paper, kept) in ((1, light), (0, dark)):
        shot = tmp_path / f"{setting}.png"
        flags = (f"--blink-settings=preferredColorScheme={setting}", "--window-size=1400,3000")
        browser(f"--screenshot={shot}", *flags, f"file://{path}")
        image = pixels(shot)
        assert tuple(image[3, 3]) == paper and (image == kept).all(axis=2).sum() > 20_000, "bars and meters"
