"""Two systems on the same recordings: who errs less, by how much, and whether that could be chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.config import ConfigError
from pipeline.evaluate.items import System
from pipeline.evaluate.scores import Evaluation, Measure, Scored, score
from pipeline.evaluate.stats import Difference, difference
from pipeline.metrics import ErrorCounts, normalize

_NAMED = 3  # recordings in a message


@dataclass(frozen=True, slots=True)
class Contrast:
    """Both systems on one group of items; `num_better` of them have fewer errors in the evaluated system."""

    name: str
    measure: Measure
    counts: ErrorCounts
    other_counts: ErrorCounts
    difference: Difference | None
    num_items: int
    num_better: int
    num_worse: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """The evaluated system beside `other`: by measure, then by language. Differences are evaluated - other."""

    other: System
    contrasts: list[Contrast]


def matched(system: System, other: System) -> System:
    """`other` with its items in the order of `system`'s, in the languages of these.

    Raises ConfigError unless both hold the same recordings with the same references.
    """
    mine = {item.item_id: item for item in system.items}
    theirs = {item.item_id: item for item in other.items}
    lacking = [
        f"{len(names):,} of {whole:,} items of {here} are not in {there} (such as {', '.join(names[:_NAMED])})"
        for names, whole, here, there in (
            (sorted(mine.keys() - theirs.keys()), len(mine), system.name, other.name),
            (sorted(theirs.keys() - mine.keys()), len(theirs), other.name, system.name),
        )
        if names
    ]
    if lacking:
        raise ConfigError(f"--against: different sets. {'; '.join(lacking)}. Both have to hold the same items, by id")
    changed = [
        item_id
        for item_id, item in mine.items()
        if normalize(item.reference, item.language) != normalize(theirs[item_id].reference, item.language)
    ]
    if changed:
        raise ConfigError(
            f"--against: {len(changed):,} of {len(mine):,} items have another reference in {other.name} than in "
            f"{system.name} (such as {', '.join(changed[:_NAMED])})"
        )
    return replace(other, items=[replace(theirs[name], language=item.language) for name, item in mine.items()])


def both_kept(system: System, other: System) -> tuple[System, System]:
    """Of two matched systems the items that no filter caught in either."""
    kept = [not a.filter_reasons and not b.filter_reasons for a, b in zip(system.items, other.items, strict=True)]
    first, second = (
        replace(each, items=[item for item, is_kept in zip(each.items, kept, strict=True) if is_kept])
        for each in (system, other)
    )
    return first, second


def compare(evaluation: Evaluation, other: System) -> Comparison:
    """`other` is matched to the system of `evaluation`."""
    second, _ = score(other.items)
    pairs = list(zip(evaluation.scored, second, strict=True))
    contrasts = [
        _contrast(group.name, group.measure, [pair for pair in pairs if pair[0].measure == group.measure])
        for group in evaluation.overall
    ]
    contrasts += [
        _contrast(group.name, group.measure, [pair for pair in pairs if pair[0].item.language == group.language])
        for group in evaluation.languages
    ]
    return Comparison(other, contrasts)


def _contrast(name: str, measure: Measure, pairs: Sequence[tuple[Scored, Scored]]) -> Contrast:
    mine, theirs = ([pair[side].counts for pair in pairs] for side in (0, 1))
    gains = [b.num_errors - a.num_errors for a, b in zip(mine, theirs, strict=True)]
    return Contrast(
        name=name,
        measure=measure,
        counts=sum(mine, ErrorCounts()),
        other_counts=sum(theirs, ErrorCounts()),
        difference=difference(theirs, mine),
        num_items=len(pairs),
        num_better=sum(gain > 0 for gain in gains),
        num_worse=sum(gain < 0 for gain in gains),
    )
