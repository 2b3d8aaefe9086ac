"""Geometry of the report's charts: where lines, bars and labels stand, in percent of the plot's width and height.

y grows downward, as in SVG. The page draws what stands here and knows no figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.report.gather import Report
from pipeline.report.tally import KINDS, Histogram, Run

_MAX_POINTS = 400  # of a line: more than a screen has columns to show
_SPEED_BINS = 60
_HISTOGRAM_BINS = 40
_MIN_BAR_PERCENT = 0.8  # so that one failure among a million is seen
_SHOWN_SHARE = 0.995  # of a histogram's values; the tail beyond goes into its outermost bar
_CLOCK_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_TIME_STEPS_S = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400]


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str


@dataclass(frozen=True, slots=True)
class Chart:
    """`line`, `area`, `whiskers` and `guide` (dashed) are SVG path data; `level` is a horizontal rule, `marks` are
    vertical ones."""

    label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_title: str
    y_title: str
    line: str = ""
    area: str = ""
    bars: list[Bar] = field(default_factory=list)
    level: Tick | None = None
    marks: list[Tick] = field(default_factory=list)
    whiskers: str = ""
    guide: str = ""


def progress_chart(report: Report) -> Chart:
    """Committed audio over working time, a step a commit; while units are missing, with the planned total."""
    work = _WorkingTime(report.runs)
    x = work.percent(report.commits[:, 0])
    total_s = np.cumsum(report.commits[:, 2])
    shown = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MAX_POINTS)).astype(int))
    planned_s = 0.0 if report.summary.is_complete else report.summary.audio_planned_s
    unit_s, unit = _time_unit(max(float(total_s[-1]), planned_s))
    scale = Scale(max(float(total_s[-1]), planned_s) / unit_s)
    y = scale.percent(total_s / unit_s)
    steps = "".join(f"H{x[i]:.2f}V{y[i]:.2f}" for i in shown)
    return Chart(
        label="Audio committed over working time",
        x_ticks=work.ticks(),
        y_ticks=scale.ticks(),
        x_title="time at work",
        y_title=f"{unit} of audio",
        line=f"M0,100{steps}",
        area=f"M0,100{steps}V100Z",
        level=Tick(float(scale.percent(planned_s / unit_s)), "planned, estimated") if planned_s else None,
        marks=[Tick(at, f"{_clock(gap_s)} pause") for at, gap_s in work.pauses()],
    )


def speed_chart(report: Report) -> Chart:
    """Audio seconds a second over working time; a unit's audio is spread over the time that it was worked on."""
    work = _WorkingTime(report.runs)
    committed_at, busy_s, audio_s = report.commits.T
    begin, end = work.percent(committed_at - busy_s), work.percent(committed_at)
    span = np.maximum(end - begin, 1e-9)
    edges = np.linspace(0, 100, _SPEED_BINS + 1)
    done_s = np.array([float(np.sum(audio_s * np.clip((edge - begin) / span, 0, 1))) for edge in edges])
    rtfx = np.diff(done_s) / (work.total_s / _SPEED_BINS)
    scale = Scale(float(rtfx.max()))
    y = scale.percent(rtfx)
    steps = "".join(f"V{level:.2f}H{right:.2f}" for level, right in zip(y, edges[1:], strict=True))
    return Chart(
        label="Speed over working time",
        x_ticks=work.ticks(),
        y_ticks=scale.ticks("x"),
        x_title="time at work",
        y_title="RTFx",
        line=f"M0,{y[0]:.2f}{steps}",
        area=f"M0,100{steps}V100Z",
        level=Tick(float(scale.percent(mean_rtfx(report))), ""),
        marks=[Tick(at, "") for at, _ in work.pauses()],
    )


def mean_rtfx(report: Report) -> float:
    """Audio seconds a second of working time, all runs together."""
    return float(report.commits[:, 2].sum()) / _WorkingTime(report.runs).total_s


def duration_chart(histogram: Histogram) -> Chart:
    """Segments by length in seconds."""
    highest = max(histogram.largest, histogram.bin_width)
    step = _nice_step(highest / _HISTOGRAM_BINS, histogram.bin_width)
    num_bins = math.ceil(highest / step)
    counts = _merged(histogram, step, num_bins)
    scale = Scale(float(counts.sum(axis=0).max()))
    names = [f"{plain(i * step)} to {plain((i + 1) * step)} s" for i in range(num_bins)]
    return Chart(
        label="Segments by duration",
        x_ticks=_value_ticks(num_bins * step),
        y_ticks=scale.ticks(),
        x_title="seconds",
        y_title="segments",
        bars=list(_bars(counts, names, scale)),
    )


def confidence_chart(histogram: Histogram, threshold: float | None) -> Chart:
    """Segments by avg_logprob, 0 on the right; `threshold` is `labels.min_avg_logprob`."""
    highest = max(histogram.quantile(_SHOWN_SHARE) or 0.0, 0.2)
    step = _nice_step(highest / _HISTOGRAM_BINS, histogram.bin_width)
    num_bins = math.ceil(highest / step)
    limit = num_bins * step
    counts = _merged(histogram, step, num_bins)[:, ::-1]
    scale = Scale(float(counts.sum(axis=0).max()))
    names = [f"{plain(-(i + 1) * step)} to {plain(-i * step)}" for i in reversed(range(num_bins))]
    names[0] = f"{plain(-limit + step)} or less"
    marks = []
    if threshold is not None and -limit < threshold < 0:
        marks = [Tick(100 * (1 + threshold / limit), f"filter {plain(threshold)}")]
    ticks = [Tick(100 - tick.at, tick.label if tick.label == "0" else f"−{tick.label}") for tick in _value_ticks(limit)]
    return Chart(
        label="Segments by mean token log-probability",
        x_ticks=ticks[::-1],
        y_ticks=scale.ticks(),
        x_title="avg_logprob",
        y_title="segments",
        bars=list(_bars(counts, names, scale)),
        marks=marks,
    )


class _WorkingTime:
    """Wall time with the pauses between runs cut out, or a resume after a week would leave a week of nothing."""

    def __init__(self, runs: Sequence[Run]) -> None:
        spans: list[list[float]] = []
        for run in runs:  # in the order they started; two at once become one span
            if spans and run.started_at <= spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], run.ended_at)
            else:
                spans.append([run.started_at, run.ended_at])
        self._wall = np.array(spans).ravel()
        lengths = [end - start for start, end in spans]
        self._work = np.repeat(np.cumsum([0.0, *lengths]), 2)[1:-1]
        self.total_s = max(float(self._work[-1]), 1e-3)

    def percent(self, wall: np.ndarray) -> np.ndarray:
        percent: np.ndarray = 100 * np.interp(wall, self._wall, self._work) / self.total_s
        return percent

    def pauses(self) -> list[tuple[float, float]]:
        """Where runs ended before the last, in percent, and the seconds until the next."""
        ends, starts = self._wall[1:-1:2], self._wall[2::2]
        return list(zip(self.percent(ends).tolist(), (starts - ends).tolist(), strict=True))

    def ticks(self) -> list[Tick]:
        step = next((s for s in _TIME_STEPS_S if self.total_s / s <= 8), 86400.0 * math.ceil(self.total_s / 8 / 86400))
        unit_s, unit = next(u for u in _CLOCK_UNITS if step >= u[0])
        values = [i * step for i in range(math.floor(self.total_s / step) + 1)]
        return [Tick(100 * value / self.total_s, f"{value / unit_s:,.0f} {unit}" if value else "0") for value in values]


class Scale:
    """A vertical axis from 0 to a round number that holds `highest`."""

    def __init__(self, highest: float) -> None:
        self._step = _nice_step(max(highest, 1e-6) / 4)
        self._top = self._step * math.ceil(max(highest, 1e-6) / self._step)

    def percent(self, values: np.ndarray | float) -> np.ndarray:
        return np.asarray(100 - 100 * np.asarray(values) / self._top)

    def ticks(self, unit: str = "") -> list[Tick]:
        values = [i * self._step for i in range(round(self._top / self._step) + 1)]
        return [Tick(float(self.percent(value)), f"{_compact(value)}{unit}") for value in values]


def _bars(counts: np.ndarray, names: list[str], scale: Scale) -> Iterator[Bar]:
    """Stacked bars of counts `[len(KINDS), num_bins]`."""
    width = 100 / counts.shape[1]
    for i, name in enumerate(names):
        title = ", ".join(
            f"{count:,} {kind}" for kind, count in zip(KINDS, counts[:, i].tolist(), strict=True) if count
        )
        top = 100.0
        for kind, height in zip(KINDS, 100 - scale.percent(counts[:, i]), strict=True):
            if height:
                height = max(float(height), _MIN_BAR_PERCENT)
                top -= height
                yield Bar(i * width, top, width * 0.88, height, kind, f"{name}: {title}")


def _merged(histogram: Histogram, step: float, num_bins: int) -> np.ndarray:
    """Counts `[len(KINDS), num_bins]` in bins of `step`; the last one takes what lies beyond."""
    starts = np.arange(num_bins) * round(step / histogram.bin_width)
    return np.asarray(np.add.reduceat(histogram.counts, starts, axis=1))


def _value_ticks(limit: float) -> list[Tick]:
    step = _nice_step(limit / 5)
    return [Tick(100 * i * step / limit, plain(i * step)) for i in range(math.floor(limit / step + 1e-9) + 1)]


def _nice_step(at_least: float, multiple_of: float = 0.0) -> float:
    """The smallest of 1, 2, 5, 10, ... times a power of ten that is at least both."""
    at_least = max(at_least, multiple_of)
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= at_least * (1 - 1e-9))


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds < 120:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 7200 else (3600.0, "hours")


def _clock(seconds: float) -> str:
    unit_s, unit = next((u for u in _CLOCK_UNITS if seconds >= u[0]), _CLOCK_UNITS[-1])
    return f"{plain(round(seconds / unit_s, 1))} {unit}"


def _compact(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{plain(value / size)}{suffix}"
    return plain(value)


def plain(value: float) -> str:
    """Up to three decimals, with a true minus sign."""
    return f"{value:.3f}".rstrip("0").rstrip(".").replace("-", "−")
