"""The plots of an evaluation, as the report's charts: error rates with their intervals, confidence against truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.evaluate.document import interval_text
from pipeline.evaluate.scores import Calibration, Group
from pipeline.languages import language_code
from pipeline.report.charts import Bar, Chart, Scale, Tick, plain

_MAX_NAMES = 8  # languages that are written out under their bars
_MAX_BARS = 30
_BAR_SHARE = 0.62  # of the room that a bar has
_MAX_BAR_PERCENT = 9.0  # of the plot's width
_MAX_HEADROOM = 2.0  # of the highest bar: an interval that goes beyond is cut, or it would flatten all bars


def language_chart(groups: Sequence[Group]) -> Chart:
    """Error rate by language, words and characters side by side; the languages with most items."""
    shown = groups[:_MAX_BARS]
    names = [group.name if len(shown) <= _MAX_NAMES else language_code(group.name) for group in shown]
    return _rates("Error rate by language", "language", shown, names)


def duration_chart(groups: Sequence[Group]) -> Chart:
    """Error rate by the length of recordings; `groups` are of one measure."""
    names = [group.name.rpartition(" to ")[2].replace("over ", ">") for group in groups]  # short, for a phone
    return _rates(f"{groups[0].measure} by duration", "duration up to", groups, names)


def calibration_chart(calibration: Calibration) -> Chart:
    """Share of right words over confidence; on the dashed line both are the same."""
    bars = [
        Bar(
            100 * each.low + 100 * (each.high - each.low) * (1 - _BAR_SHARE) / 2,
            100 - 100 * each.accuracy,
            100 * (each.high - each.low) * _BAR_SHARE,
            100 * each.accuracy,
            "kept",
            f"confidence {each.confidence:.3f}, right {100 * each.accuracy:.1f} % of {each.num_words:,} words in "
            f"{each.num_items:,} recordings",
        )
        for each in calibration.bins
    ]
    ticks = [0, 20, 40, 60, 80, 100]
    return Chart(
        label="Share of right words by confidence",
        x_ticks=[Tick(tick, plain(tick / 100)) for tick in ticks],
        y_ticks=[Tick(100 - tick, f"{tick} %") for tick in ticks],
        x_title="exp(avg_logprob)",
        y_title="right words",
        bars=bars,
        guide="M0,100L100,0",
    )


def _rates(label: str, x_title: str, groups: Sequence[Group], names: Sequence[str]) -> Chart:
    """A bar a group with its 95 % interval. A rate without reference words has no bar."""
    rates = [group.counts.rate if math.isfinite(group.counts.rate) else 0.0 for group in groups]
    highest = max([*rates, *(group.interval[1] for group in groups if group.interval)])
    scale = Scale(100 * min(highest, _MAX_HEADROOM * max(rates)))
    room = 100 / len(groups)
    width = min(_BAR_SHARE * room, _MAX_BAR_PERCENT)
    bars, whiskers = [], []
    for i, (group, rate) in enumerate(zip(groups, rates, strict=True)):
        top, middle = float(scale.percent(100 * rate)), (i + 0.5) * room
        known = f" (95 %: {interval_text(group.interval)})" if group.interval else ""
        title = f"{group.name}: {group.measure} {100 * rate:.2f} %{known}, {group.num_items:,} recordings"
        bars.append(Bar(middle - width / 2, top, width, 100 - top, "kept", title))
        if group.interval:
            low, high = (float(scale.percent(100 * bound)) for bound in group.interval)
            whiskers.append(f"M{middle:.2f},{low:.2f}V{max(high, 0.0):.2f}")
            tip = 0.15 * width
            whiskers += [f"M{middle - tip:.2f},{at:.2f}H{middle + tip:.2f}" for at in (low, high) if at >= 0]
    return Chart(
        label=label,
        x_ticks=[Tick((i + 0.5) * room, name) for i, name in enumerate(names)],
        y_ticks=scale.ticks(" %"),
        x_title=x_title,
        y_title=" and ".join(dict.fromkeys(group.measure for group in groups)),
        bars=bars,
        whiskers="".join(whiskers),
    )
