"""The scores of a system: error rates by language, set and duration, confidence against truth, what filters leave."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.evaluate.items import Item, Row, System
from pipeline.evaluate.stats import Interval, interval
from pipeline.metrics import Edit, ErrorCounts, align, count_errors, unit_name
from pipeline.schema import Reason

DURATION_EDGES_S = (0.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 300.0, math.inf)
NUM_WORST = 20
_NUM_BINS = 10  # of confidence
_NUM_CONFUSIONS = 20  # of each kind

Measure = Literal["WER", "CER"]
_ALL: dict[Measure, str] = {"WER": "all words", "CER": "all characters"}


@dataclass(frozen=True, slots=True)
class Scored:
    """An item with its errors."""

    item: Item
    counts: ErrorCounts

    @property
    def measure(self) -> Measure:
        return unit_name(self.item.language)


@dataclass(frozen=True, slots=True)
class Group:
    """The errors of some items, words and characters never pooled. `language` is empty where there are several.

    `mean_rate` is the mean of the items' own rates, those without reference words left out; `interval` is that of
    `counts.rate`. `num_misheard` counts items taken for another language, of the `num_heard` where that is known.
    """

    name: str
    language: str
    measure: Measure
    counts: ErrorCounts
    mean_rate: float | None
    interval: Interval | None
    num_items: int
    num_empty: int
    num_failed: int
    num_heard: int
    num_misheard: int
    audio_s: float | None


@dataclass(frozen=True, slots=True)
class Bin:
    """Items whose `exp(avg_logprob)` is in `(low, high]`: their mean confidence, the share of the hypotheses' words
    that are right, and how many words these are."""

    low: float
    high: float
    num_items: int
    num_words: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far confidence is from truth. `error` is the expected calibration error: |confidence - accuracy| averaged
    over the bins, each with the weight of its words (Guo et al., "On calibration of modern neural networks", 2017)."""

    bins: list[Bin]
    error: float


@dataclass(frozen=True, slots=True)
class Step:
    """What is left after a filter and all before it; the first step, without a reason, is everything. `rates` are the
    error rates of the scored items left, by measure."""

    reason: str | None
    num_rows: int
    audio_s: float
    num_items: int
    rates: dict[Measure, float]


@dataclass(frozen=True, slots=True)
class Confusions:
    """The commonest errors with their numbers, (reference, hypothesis) for substitutions."""

    substitutions: list[tuple[tuple[str, str], int]]
    deletions: list[tuple[str, int]]
    insertions: list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that is said of one system. `worst` are the items with the most errors, with their alignments."""

    system: System
    scored: list[Scored]
    overall: list[Group]
    languages: list[Group]
    sets: list[Group]
    durations: list[Group]
    calibration: Calibration | None
    funnel: list[Step]
    worst: list[tuple[Scored, list[Edit]]]
    confusions: Confusions


def evaluate(system: System) -> Evaluation:
    """Score every item of `system`."""
    scored, errors = score(system.items)
    worst = sorted((each for each in scored if each.counts.num_errors), key=lambda each: -each.counts.num_errors)
    return Evaluation(
        system=system,
        scored=scored,
        overall=_groups(scored, lambda each: (_ALL[each.measure], "")),
        languages=_groups(scored, lambda each: (each.item.language, each.item.language)),
        sets=_groups(scored, lambda each: (each.item.set_name, each.item.language)),
        durations=_by_duration(scored),
        calibration=calibrate(scored),
        funnel=funnel(system.rows, scored),
        worst=[(each, _alignment(each.item)) for each in worst[:NUM_WORST]],
        confusions=errors,
    )


def score(items: Sequence[Item]) -> tuple[list[Scored], Confusions]:
    """Errors of every item, in order, and the commonest of them."""
    scored: list[Scored] = []
    pairs: Counter[tuple[str, str]] = Counter()
    missed: Counter[str] = Counter()
    added: Counter[str] = Counter()
    for item in items:
        edits = _alignment(item)
        scored.append(Scored(item, count_errors(edits)))
        for edit in edits:
            if edit.kind == "substitute":
                pairs.update(zip(edit.reference, edit.hypothesis, strict=True))
            elif edit.kind == "delete":
                missed.update(edit.reference)
            elif edit.kind == "insert":
                added.update(edit.hypothesis)
    commonest = (each.most_common(_NUM_CONFUSIONS) for each in (missed, added))
    return scored, Confusions(pairs.most_common(_NUM_CONFUSIONS), *commonest)


def group(name: str, language: str, members: Sequence[Scored]) -> Group:
    """The figures of `members`, one or more, all of one measure."""
    (measure,) = {each.measure for each in members}
    counts = [each.counts for each in members]
    rates = [each.rate for each in counts if each.num_reference]
    heard = [each.item for each in members if each.item.detected is not None]
    seconds = [each.item.duration_s for each in members]
    return Group(
        name=name,
        language=language,
        measure=measure,
        counts=sum(counts, ErrorCounts()),
        mean_rate=sum(rates) / len(rates) if rates else None,
        interval=interval(counts),
        num_items=len(members),
        num_empty=sum(each.item.status == "empty" for each in members),
        num_failed=sum(each.item.status == "failed" for each in members),
        num_heard=len(heard),
        num_misheard=sum(_first(item.detected or "") != _first(item.language) for item in heard),
        audio_s=None if None in seconds else sum(seconds),  # type: ignore[arg-type]
    )


def calibrate(scored: Iterable[Scored]) -> Calibration | None:
    """Of the items with text and an `avg_logprob`; None where there are none."""
    members: dict[int, list[tuple[float, int, int]]] = defaultdict(list)
    for each in scored:
        num_words = each.counts.num_reference - each.counts.deletions + each.counts.insertions
        if each.item.avg_logprob is not None and num_words:
            confidence = min(math.exp(each.item.avg_logprob), 1.0)
            num_right = num_words - each.counts.substitutions - each.counts.insertions
            members[max(math.ceil(confidence * _NUM_BINS - 1e-9) - 1, 0)].append((confidence, num_right, num_words))
    if not members:
        return None
    bins = [_bin(number, members[number]) for number in sorted(members)]
    total = sum(each.num_words for each in bins)
    return Calibration(bins, sum(each.num_words * abs(each.confidence - each.accuracy) for each in bins) / total)


def funnel(rows: Sequence[Row], scored: Sequence[Scored]) -> list[Step]:
    """Everything, then what is left after each reason that caught a row: in the order of `schema.Reason`, reasons that
    it does not know last."""
    met = Counter(reason for row in rows for reason in row.filter_reasons)
    known = [reason for reason in get_args(Reason) if reason in met]
    steps, passed = [_step(None, rows, scored)], set()
    for reason in [*known, *sorted(met.keys() - set(known), key=lambda each: (-met[each], each))]:
        passed.add(reason)
        left = [row for row in rows if passed.isdisjoint(row.filter_reasons)]
        steps.append(_step(reason, left, [each for each in scored if passed.isdisjoint(each.item.filter_reasons)]))
    return steps


def _step(reason: str | None, rows: Sequence[Row], scored: Sequence[Scored]) -> Step:
    pooled: dict[Measure, ErrorCounts] = defaultdict(ErrorCounts)
    for each in scored:
        pooled[each.measure] += each.counts
    rates = {measure: pooled[measure].rate for measure in get_args(Measure) if measure in pooled}
    return Step(reason, len(rows), sum(row.duration_s or 0.0 for row in rows), len(scored), rates)


def _groups(scored: Sequence[Scored], key: Callable[[Scored], tuple[str, str]]) -> list[Group]:
    """By `key`, which gives name and language; the largest first. WER comes before CER."""
    members: dict[tuple[str, str], list[Scored]] = defaultdict(list)
    for each in scored:
        members[key(each)].append(each)
    found = [group(name, language, own) for (name, language), own in members.items()]
    return sorted(found, key=lambda each: (each.measure == "CER", -each.num_items, each.name))


def _by_duration(scored: Sequence[Scored]) -> list[Group]:
    members: dict[tuple[Measure, int], list[Scored]] = defaultdict(list)
    for each in scored:
        if each.item.duration_s is not None:
            number = next(i for i, edge in enumerate(DURATION_EDGES_S[1:]) if each.item.duration_s <= edge)
            members[each.measure, number].append(each)
    order = sorted(members, key=lambda key: (key[0] == "CER", key[1]))
    return [group(_duration_name(number), "", members[measure, number]) for measure, number in order]


def _duration_name(number: int) -> str:
    low, high = DURATION_EDGES_S[number : number + 2]
    unit = 60 if low >= 60 else 1
    name = "min" if unit == 60 else "s"
    return f"over {low / unit:g} {name}" if high == math.inf else f"{low / unit:g} to {high / unit:g} {name}"


def _bin(number: int, members: Sequence[tuple[float, int, int]]) -> Bin:
    num_words = sum(words for _, _, words in members)
    return Bin(
        low=number / _NUM_BINS,
        high=(number + 1) / _NUM_BINS,
        num_items=len(members),
        num_words=num_words,
        confidence=sum(confidence * words for confidence, _, words in members) / num_words,
        accuracy=sum(right for _, right, _ in members) / num_words,
    )


def _alignment(item: Item) -> list[Edit]:
    return align(item.reference, item.text, item.language)


def _first(language: str) -> str:
    return language.partition(",")[0]
