"""Which examples come, in which order: by seed, epoch and rank alone, and balanced over languages."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from pipeline.config import ConfigError
from pipeline.distill.examples import ExampleRef
from pipeline.distill.sampling import batches, draw


def refs(**counts: int) -> list[ExampleRef]:
    rng = random.Random(0)
    return [
        ExampleRef(f"{language}-{i}", "a.wav", 0.0, rng.uniform(1.0, 20.0), "text", language, "a.wav")
        for language, count in counts.items()
        for i in range(count)
    ]


def ids(batch: list[ExampleRef]) -> list[str]:
    return [ref.example_id for ref in batch]


def test_the_same_arguments_give_the_same_batches_and_others_others() -> None:
    some = refs(English=200, Thai=50)
    first = [ids(batch) for batch in batches(some, 60.0, seed=1, epoch=0)]
    assert first == [ids(batch) for batch in batches(some, 60.0, seed=1, epoch=0)]
    assert first != [ids(batch) for batch in batches(some, 60.0, seed=1, epoch=1)]
    assert first != [ids(batch) for batch in batches(some, 60.0, seed=2, epoch=0)]


def test_ranks_share_an_epoch_and_have_equally_many() -> None:
    some = refs(English=200, Thai=50)
    whole = [ids(batch) for batch in batches(some, 60.0, seed=1, epoch=0)]
    parts = [[ids(batch) for batch in batches(some, 60.0, 1, 0, rank, 4)] for rank in range(4)]
    assert {len(part) for part in parts} == {len(whole) // 4}
    assert [batch for turn in zip(*parts, strict=True) for batch in turn] == whole[: len(whole) // 4 * 4]


def test_no_batch_is_longer_than_asked_but_one_example_may_be() -> None:
    some = refs(English=300)
    for limit in (60.0, 10.0):
        for batch in batches(some, limit, 0, 0):
            assert len(batch) == 1 or len(batch) * max(ref.duration_s for ref in batch) <= limit
    padded = sum(len(b) * max(ref.duration_s for ref in b) for b in batches(some, 60.0, 0, 0))
    assert padded < 1.1 * sum(ref.duration_s for ref in some), "lengths are alike in a batch"


def seconds(some: list[ExampleRef], balance: float) -> Counter[str]:
    found: Counter[str] = Counter()
    for batch in batches(some, 60.0, 3, 0, balance=balance):
        for ref in batch:
            found[ref.language] += ref.duration_s  # type: ignore[assignment]
    return found


def test_languages_are_balanced_by_seconds() -> None:
    some = refs(English=900, Thai=90)
    total = sum(ref.duration_s for ref in some)
    equal, natural, between = (seconds(some, balance) for balance in (1.0, 0.0, 0.5))
    for found in (equal, natural, between):
        assert sum(found.values()) == pytest.approx(total, rel=0.01)
    assert equal["Thai"] == pytest.approx(equal["English"], rel=0.02)
    assert natural["Thai"] / total < 0.12 < between["Thai"] / total < 0.4


def test_as_it_is_every_example_comes_once() -> None:
    for some in (refs(English=100), refs(English=100, Thai=10)):
        found = [each for batch in batches(some, 60.0, 3, 0, balance=0.0) for each in ids(batch)]
        assert sorted(found) == sorted(ids(some))


def test_too_few_batches_for_the_processes() -> None:
    with pytest.raises(ConfigError, match="1 batches of 600 s for 2 processes"):
        list(batches(refs(English=3), 600.0, 0, 0, 1, 2))


def test_draw_takes_equally_many_of_every_language() -> None:
    some = refs(English=40, Thai=9)
    drawn = draw(some, 9, seed=5)
    assert Counter(ref.language for ref in drawn) == {"English": 9, "Thai": 9}
    assert len(set(ids(drawn))) == 18 and drawn == draw(some, 9, 5) and drawn != draw(some, 9, 6)
    with pytest.raises(ConfigError, match="Thai has 9 examples; samples_per_language is 10"):
        draw(some, 10, 5)
