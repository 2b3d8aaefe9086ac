"""Scores of made-up items, and of hypotheses whose scores were published."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluate.items import Item, Row, System, read_hypotheses
from pipeline.evaluate.scores import calibrate, evaluate, score
from pipeline.metrics import ErrorCounts

PUBLISHED = Path(__file__).parents[3] / "shared" / "scoring" / "mcif_qwen3_asr_0_6b.jsonl"


def item(reference: str, hypothesis: str | None, language: str = "English", **values: Any) -> Item:
    return Item(values.pop("item_id", reference), reference, hypothesis, language, **values)


def system(*items: Item) -> System:
    return System("made up", list(items), [Row(each.duration_s, each.filter_reasons) for each in items])


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"no published scores at {PUBLISHED}")
def test_published_scores_are_met_exactly() -> None:
    found = evaluate(read_hypotheses(str(PUBLISHED), {}))
    published = [json.loads(line) for line in PUBLISHED.read_text().splitlines()]
    assert [each.counts.rate for each in found.scored] == [line["wer_whisper"] for line in published]
    assert [each.item.item_id for each in found.scored] == [line["audio_id"] for line in published]
    (group,) = found.overall
    assert round(group.mean_rate or 0, 6) == 0.207477 and round(group.counts.rate, 6) == 0.208859
    assert group.interval is not None and group.interval[0] < 0.208859 < group.interval[1]


def test_the_published_form_is_read_and_scored(tmp_path: Path) -> None:
    """As the file above has it, written here: names, extra keys, and rates as a hand count gives them."""
    lines = [
        {"audio": "a.wav", "audio_id": "A", "language": "English", "reference": "\"Hi, I'm Sara from Trento.",
         "hypothesis": "Hi, I am Sarah from Trento", "latency_sec": 4.2, "wer_whisper": 1 / 6},
        {"audio": "b.wav", "audio_id": "B", "language": "English", "reference": "Twenty-one colours, um, okay.",
         "hypothesis": "21 colors", "latency_sec": 4.2, "wer_whisper": 1 / 3},
    ]  # fmt: skip
    path = tmp_path / "published.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = evaluate(read_hypotheses(str(path), {}))
    assert [each.counts.rate for each in found.scored] == [line["wer_whisper"] for line in lines]
    assert [each.item.item_id for each in found.scored] == ["A", "B"]


def test_words_and_characters_are_never_pooled() -> None:
    found = evaluate(
        system(item("你好吗", "你好"), item("red tan", "red"), item("你好吗", "你好", "Chinese", item_id="zh"))
    )
    assert [(group.name, group.counts.num_reference) for group in found.overall] == [
        ("all words", 3),
        ("all characters", 3),
    ]
    assert [(group.name, group.measure, group.counts.rate) for group in found.languages] == [
        ("English", "WER", pytest.approx(2 / 3)),
        ("Chinese", "CER", pytest.approx(1 / 3)),
    ]


def test_sets_are_split_by_language() -> None:
    found = evaluate(
        system(
            item("a", "a", set_name="talks"),
            item("b", "b", "Vietnamese", set_name="talks"),
            item("c", "x", set_name="calls"),
        )
    )
    assert {(group.name, group.language, group.counts.rate) for group in found.sets} == {
        ("talks", "English", 0.0),
        ("talks", "Vietnamese", 0.0),
        ("calls", "English", 1.0),
    }


def test_durations_fall_in_bins_with_their_upper_edge() -> None:
    seconds = [0.0, 2.0, 2.1, 30.0, 45.0, 61.0, 9000.0]
    items = [item("a", "a", item_id=str(each), duration_s=each) for each in seconds]
    found = evaluate(system(*items, item("b", "b"), item("好", "好", "Chinese", duration_s=1.0)))
    assert [(group.measure, group.name, group.num_items) for group in found.durations] == [
        ("WER", "0 to 2 s", 2),
        ("WER", "2 to 5 s", 1),
        ("WER", "20 to 30 s", 1),
        ("WER", "30 to 60 s", 1),
        ("WER", "1 to 5 min", 1),
        ("WER", "over 5 min", 1),
        ("CER", "0 to 2 s", 1),
    ]


def test_the_mean_of_items_leaves_out_those_without_reference_words() -> None:
    found = evaluate(system(item("red tan", "red"), item("!", "noise"), item("red tan blue pink", "red tan blue pink")))
    (group,) = found.overall
    assert group.mean_rate == 0.25 and group.counts == ErrorCounts(0, 1, 1, 6)
    (nothing,) = evaluate(system(item("!", "noise"))).overall
    assert nothing.mean_rate is None and nothing.counts.rate == math.inf and nothing.interval is None


def test_confidence_against_truth_by_hand() -> None:
    found, _ = score(
        [
            item("a b c d", "a b c d", avg_logprob=math.log(0.95)),
            item("a b c e", "a x c e", avg_logprob=math.log(0.91)),
            item("a b", "x y z", avg_logprob=math.log(0.3)),
            item("not heard", "", avg_logprob=-0.1),
            item("not known", "not known"),
        ]
    )
    calibration = calibrate(found)
    assert calibration is not None
    low, high = calibration.bins
    assert (low.low, low.high, low.num_words, low.accuracy, low.confidence) == (0.2, 0.3, 3, 0.0, pytest.approx(0.3))
    assert (high.low, high.num_items, high.num_words, high.accuracy) == (0.9, 2, 8, 7 / 8)
    assert high.confidence == pytest.approx(0.93)
    assert calibration.error == pytest.approx((3 * 0.3 + 8 * (0.93 - 7 / 8)) / 11)
    assert calibrate(found[3:]) is None


def test_deletions_do_not_lower_the_share_of_right_words() -> None:
    found, _ = score([item("a b c d", "a b", avg_logprob=0.0)])
    calibration = calibrate(found)
    assert calibration is not None and calibration.error == 0.0 and calibration.bins[0].num_words == 2


def test_a_funnel_follows_the_order_of_reasons_whatever_they_are() -> None:
    items = [
        item("a", "a", item_id="1", duration_s=10.0),
        item("a b", "x y", item_id="2", duration_s=20.0, filter_reasons=("char_rate", "new_filter")),
        item("a", "", item_id="3", duration_s=5.0, filter_reasons=("empty",)),
        item("a", "a", item_id="4", duration_s=1.0, filter_reasons=("other_filter",)),
        item("a", "a", item_id="5", duration_s=1.0, filter_reasons=("new_filter",)),
    ]
    steps = evaluate(system(*items)).funnel
    assert [(step.reason, step.num_rows, step.audio_s, step.rates["WER"]) for step in steps] == [
        (None, 5, 37.0, 0.5),
        ("empty", 4, 32.0, 0.4),
        ("char_rate", 3, 12.0, 0.0),
        ("new_filter", 2, 11.0, 0.0),
        ("other_filter", 1, 10.0, 0.0),
    ]


def test_the_worst_are_those_with_most_errors_and_the_commonest_errors_are_counted() -> None:
    items = [item("the cat " * n + "sat", "a cat " * n, item_id=str(n)) for n in range(30)]
    found = evaluate(system(*items))
    assert [each.item.item_id for each, _ in found.worst] == [str(n) for n in range(29, 9, -1)]
    assert found.confusions.substitutions == [(("the", "a"), sum(range(30)))]
    assert found.confusions.deletions == [("sat", 30)] and found.confusions.insertions == []
    assert evaluate(system(item("fine", "Fine!"))).worst == []
