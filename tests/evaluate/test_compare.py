"""Two systems on the same recordings, and what is refused."""

from __future__ import annotations

import pytest

from pipeline.config import ConfigError
from pipeline.evaluate.compare import both_kept, compare, matched
from pipeline.evaluate.items import Item, System
from pipeline.evaluate.scores import evaluate


def system(name: str, *texts: tuple[str, str, str], language: str = "English") -> System:
    return System(name, [Item(item_id, reference, text, language) for item_id, reference, text in texts], [])


ONE = system("one", ("a", "x y", "x y"), ("b", "x y", "x z"), ("c", "x y", ""))


def test_items_are_matched_by_id_in_any_order() -> None:
    other = system("two", ("c", "x y", "x y"), ("a", "X, y.", "x"), ("b", "x y", "x z"), language="Vietnamese")
    comparison = compare(evaluate(ONE), matched(ONE, other))
    overall, english = comparison.contrasts
    assert (overall.name, english.name, english.num_items) == ("all words", "English", 3)
    assert (overall.counts.num_errors, overall.other_counts.num_errors) == (3, 2)
    assert (overall.num_better, overall.num_worse) == (1, 1)
    assert overall.difference is not None and overall.difference.difference == pytest.approx(1 / 6)
    assert overall.difference.p_value == 1.0, "of +2 and -1 every draw of signs is as far off"


def test_a_system_that_errs_less_is_below_zero() -> None:
    bad = system("bad", ("a", "x y", "q"), ("b", "x y", "q q"), ("c", "x y", "x x"))
    good = system("good", ("a", "x y", "x y"), ("b", "x y", "x y"), ("c", "x y", "x y"))
    (overall, _) = compare(evaluate(good), matched(good, bad)).contrasts
    assert overall.difference is not None and overall.difference.difference == pytest.approx(-5 / 6)
    assert overall.difference.interval[1] < 0 and overall.difference.p_value == 0.25, "the least of three recordings"


def test_different_sets_are_named_from_both_sides() -> None:
    other = system("two", ("a", "x y", "x y"), ("d", "x y", "x y"))
    with pytest.raises(ConfigError) as raised:
        matched(ONE, other)
    assert "2 of 3 items of one are not in two (such as b, c)" in str(raised.value)
    assert "1 of 2 items of two are not in one (such as d)" in str(raised.value)


def test_other_references_are_named() -> None:
    other = system("two", ("a", "x y", ""), ("b", "x q", ""), ("c", "x y", ""))
    with pytest.raises(ConfigError, match=r"1 of 3 items have another reference in two than in one \(such as b\)"):
        matched(ONE, other)


def test_only_what_both_keep() -> None:
    caught = Item("b", "x y", "x z", "English", filter_reasons=("low_logprob",))
    first, second = both_kept(ONE, System("two", [ONE.items[0], caught, ONE.items[2]], []))
    assert [item.item_id for item in first.items] == ["a", "c"] == [item.item_id for item in second.items]
