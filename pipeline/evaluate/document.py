"""An evaluation as JSON and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.evaluate.compare import Comparison, Contrast
from pipeline.evaluate.scores import Evaluation, Group, Scored
from pipeline.evaluate.stats import RESAMPLES
from pipeline.metrics import Edit

_CONTEXT_WORDS = 3  # that are right, on either side of an error
_MAX_EDITS = 40  # of one item
_MARKDOWN_CHARS = 120


def to_json(evaluation: Evaluation, comparison: Comparison | None) -> dict[str, Any]:
    """Every figure, and every item with its own. Rates are fractions, null where there is no reference word."""
    system = evaluation.system
    return {
        "system": {
            "name": system.name,
            "made_by": system.made_by,
            "rtfx": system.rtfx,
            "num_items": len(system.items),
            "num_without_reference": system.num_without_reference,
            "num_without_language": system.num_without_language,
        },
        "overall": [_group(each) for each in evaluation.overall],
        "languages": [_group(each) for each in evaluation.languages],
        "sets": [_group(each) for each in evaluation.sets],
        "durations": [_group(each) for each in evaluation.durations],
        "calibration": None if evaluation.calibration is None else asdict(evaluation.calibration),
        "funnel": [
            asdict(step) | {"rates": {measure: rate_or_none(rate) for measure, rate in step.rates.items()}}
            for step in evaluation.funnel
        ],
        "confusions": asdict(evaluation.confusions),
        "worst": [
            _item(each)
            | {"reference": each.item.reference, "hypothesis": each.item.hypothesis}
            | {"alignment": [asdict(edit) for edit in edits]}
            for each, edits in evaluation.worst
        ],
        "against": None if comparison is None else _comparison(comparison),
        "items": [_item(each) for each in evaluation.scored],
        "resamples": RESAMPLES,
    }


def to_markdown(evaluation: Evaluation, comparison: Comparison | None) -> str:
    """The tables of an evaluation."""
    system = evaluation.system
    about = [f"{key.removesuffix('_id')} {value}" for key, value in system.made_by.items()]
    about += [f"{len(system.items):,} recordings"]
    about += [f"{system.num_without_reference:,} without reference"] * bool(system.num_without_reference)
    about += [f"{system.num_without_language:,} without a language"] * bool(system.num_without_language)
    if system.rtfx is not None:
        about.append(f"RTFx {system.rtfx:.1f}")
    parts = [f"# {_cell(system.name)}", ", ".join(map(_cell, about)), _groups("", evaluation.overall)]
    parts += [_groups("## By language", evaluation.languages)]
    if any(group.name for group in evaluation.sets):
        parts += [_groups("## By set", evaluation.sets, with_language=True)]
    if comparison is not None:
        parts += ["\n".join(_against(comparison))]
    if evaluation.durations:
        parts += [_groups("## By duration", evaluation.durations)]
    if evaluation.calibration is not None:
        rows: list[Sequence[object]] = [
            (f"{b.low:.1f} to {b.high:.1f}", f"{b.num_words:,}", f"{b.confidence:.3f}", f"{b.accuracy:.3f}")
            for b in evaluation.calibration.bins
        ]
        parts += [
            f"## Confidence\n\nExpected calibration error {evaluation.calibration.error:.4f}.",
            _table(("exp(avg_logprob)", "words", "confidence", "right"), rows),
        ]
    if len(evaluation.funnel) > 1:
        steps = [
            (step.reason or "everything", f"{step.num_rows:,}", f"{step.audio_s / 3600:.2f}", rates_text(step.rates))
            for step in evaluation.funnel
        ]
        parts += ["## Left after each filter", _table(("filter", "rows", "hours", "error"), steps)]
    if evaluation.worst:
        worst = [
            (each.item.item_id, each.counts.num_errors, percent(each.counts.rate), " ".join(_marked(each, edits)))
            for each, edits in evaluation.worst
        ]
        note = "~~deleted~~, **inserted**, [reference → hypothesis]"
        parts += [f"## Most errors\n\n{note}", _table(("recording", "errors", "rate", "alignment"), worst)]
    return "\n\n".join(part for part in parts if part) + "\n"


def shortened(edits: Sequence[Edit]) -> Iterator[Edit | None]:
    """An alignment as it is shown: long runs without errors lose their middle, and a long one its end (None)."""
    shown = 0
    for i, edit in enumerate(edits):
        if shown == _MAX_EDITS:
            yield None
            return
        words = edit.reference
        if edit.kind != "equal" or len(words) <= 2 * _CONTEXT_WORDS + 1:
            yield edit
        else:
            head = words[:_CONTEXT_WORDS] if i else ()
            tail = words[-_CONTEXT_WORDS:] if i + 1 < len(edits) else ()
            yield Edit("equal", (*head, "…", *tail), (*head, "…", *tail))
        shown += edit.kind != "equal"


def joiner_of(scored: Scored) -> str:
    """What stands between the words, or characters, of its alignment."""
    return "" if scored.measure == "CER" else " "


def percent(rate: float) -> str:
    return f"{100 * rate:.2f} %" if math.isfinite(rate) else "no reference"


def interval_text(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"


def p_text(p_value: float) -> str:
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def rates_text(rates: dict[Any, float]) -> str:
    return ", ".join(f"{measure} {percent(rate)}" for measure, rate in rates.items())


def rate_or_none(rate: float) -> float | None:
    return rate if math.isfinite(rate) else None


def _group(group: Group) -> dict[str, Any]:
    return asdict(group) | {"rate": rate_or_none(group.counts.rate)}


def _item(scored: Scored) -> dict[str, Any]:
    item = scored.item
    return {
        "id": item.item_id,
        "language": item.language,
        "set": item.set_name,
        "duration_s": item.duration_s,
        "status": item.status,
        "measure": scored.measure,
        "counts": asdict(scored.counts),
        "rate": rate_or_none(scored.counts.rate),
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    contrasts = [
        asdict(each) | {"rate": rate_or_none(each.counts.rate), "other_rate": rate_or_none(each.other_counts.rate)}
        for each in comparison.contrasts
    ]
    return {"name": comparison.other.name, "made_by": comparison.other.made_by, "contrasts": contrasts}


def _groups(title: str, groups: Sequence[Group], with_language: bool = False) -> str:
    head = ["", "error", "95 %", "S", "D", "I", "reference", "items", "empty", "failed", "mean of items"]
    rows = [
        [
            f"{group.name or '(none)'} {group.language}" if with_language else group.name,
            f"{group.measure} {percent(group.counts.rate)}",
            interval_text(group.interval),
            *(f"{count:,}" for count in asdict(group.counts).values()),
            *(f"{count:,}" for count in (group.num_items, group.num_empty, group.num_failed)),
            "" if group.mean_rate is None else percent(group.mean_rate),
        ]
        for group in groups
    ]
    return "\n\n".join(part for part in (title, _table(head, rows)) if part)


def _against(comparison: Comparison) -> Iterator[str]:
    yield f"## Against {_cell(comparison.other.name)}\n"
    rows = [contrast_cells(each) for each in comparison.contrasts]
    yield _table(("", "this", "other", "difference", "95 %", "p", "better", "worse", "items"), rows)


def contrast_cells(contrast: Contrast) -> list[str]:
    """Name, both rates, difference with interval and p, and the numbers of items."""
    found = contrast.difference
    return [
        contrast.name,
        f"{contrast.measure} {percent(contrast.counts.rate)}",
        percent(contrast.other_counts.rate),
        "" if found is None else f"{100 * found.difference:+.2f}",
        "" if found is None else f"{100 * found.interval[0]:+.2f} to {100 * found.interval[1]:+.2f}",
        "" if found is None else p_text(found.p_value),
        *(f"{count:,}" for count in (contrast.num_better, contrast.num_worse, contrast.num_items)),
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [list(head), ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _marked(scored: Scored, edits: Sequence[Edit]) -> Iterator[str]:
    """The runs of an alignment, until a cell is full."""
    joiner, length = joiner_of(scored), 0
    for edit in shortened(edits):
        if edit is None or length > _MARKDOWN_CHARS:
            yield "…"
            return
        reference, hypothesis = joiner.join(edit.reference), joiner.join(edit.hypothesis)
        text = {
            "equal": reference,
            "delete": f"~~{reference}~~",
            "insert": f"**{hypothesis}**",
            "substitute": f"[{reference} → {hypothesis}]",
        }[edit.kind]
        length += len(text)
        yield text
