"""A report as one HTML page that needs nothing else: no network, no file beside it, no font.

What a transcript or a file name holds is hostile until escaped: the template escapes all that it prints, and the page's
own Content-Security-Policy refuses every script but its own and every request.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jinja2

from pipeline.progress import duration
from pipeline.report import charts
from pipeline.report.audio import Clip
from pipeline.report.gather import Report
from pipeline.report.tally import KINDS

_MAX_TEXT = 2_000  # characters of a transcript
_MAX_REFERENCE = 400  # of a reference, which may be a long recording's whole
_MAX_LANGUAGES = 12
_MAX_REASONS = 20
_MAX_RUNS = 10


def render(report: Report, clips: Sequence[Clip] | None) -> str:
    """The page. `clips` are parallel to `report.samples`, None for a page without audio."""
    assert clips is None or len(clips) == len(report.samples)
    has_units, has_text = len(report.commits) > 0, report.confidence.quantile(0.5) is not None
    return template(Path(__file__).with_name("page.html.j2")).render(
        report=report,
        summary=report.summary,
        revision=report.engine.get("model_revision") or report.model_revision or report.config.engine.revision or "",
        rtfx=next((run.rtfx for run in report.runs if run.run_id == report.plan.run_id), None),
        kinds=KINDS,
        num_segments=sum(report.kinds.values()),
        languages=report.languages[:_MAX_LANGUAGES],
        num_more_languages=max(len(report.languages) - _MAX_LANGUAGES, 0),
        failures=report.failures[:_MAX_REASONS],
        num_more_reasons=max(len(report.failures) - _MAX_REASONS, 0),
        runs=report.runs[-_MAX_RUNS:],
        mean_rtfx=charts.mean_rtfx(report) if has_units else None,
        progress=charts.progress_chart(report) if has_units else None,
        speed=charts.speed_chart(report) if has_units else None,
        durations=charts.duration_chart(report.durations) if report.durations.quantile(0.5) is not None else None,
        confidence=charts.confidence_chart(report.confidence, report.config.labels.min_avg_logprob)
        if has_text
        else None,
        samples=[
            {"drawn_as": drawn_as, "row": row, "clip": clips[i] if clips is not None else None}
            for i, (drawn_as, row) in enumerate(report.samples)
        ],
        common_note=_common_note(clips or ()),
        with_audio=clips is not None,
        max_text=_MAX_TEXT,
        max_reference=_MAX_REFERENCE,
    )


def template(path: Path) -> jinja2.Template:
    """A page's template, with the parts and the style that all pages share."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([path.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": duration,
        "when": _when,
        "count": lambda number: f"{number:,}",
        "percent": _percent,
        "logprob": lambda value: "" if value is None else f"{value:.2f}".replace("-", "−").replace("−0.00", "0.00"),
        "speed": lambda rtfx: "–" if rtfx is None else f"{rtfx:,.1f}x",
        "clock": _clock,
        "clip": lambda text, limit: text if len(text) <= limit else text[: limit - 1] + "…",
        "tail": lambda path: "/".join(path.rsplit("/", 2)[-2:]),
        "data_uri": lambda ogg: f"data:audio/ogg;base64,{base64.b64encode(ogg).decode()}",
        "csp_hash": lambda script: f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
    }
    return environment.get_template(path.name)


def _common_note(clips: Sequence[Clip]) -> str | None:
    """Why there is no audio, where more than half of the clips give the same reason: it is said once then."""
    notes = Counter(clip.note for clip in clips if clip.ogg is None)
    return next((note for note, count in notes.items() if 2 * count > len(clips) > 1), None)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _clock(seconds: float) -> str:
    """A place in a recording: "1:02:03.4"."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    clock = f"{minutes}:{rest // 10:02d}.{rest % 10}"
    return f"{hours}:{clock.zfill(7)}" if hours else clock


def _percent(part: float, whole: float) -> str:
    """Never 0 % of something nor 100 % of less than all."""
    if not whole:
        return "–"
    value = 100 * part / whole
    if 0 < value < 0.1:
        return "<0.1 %"
    if 99.9 < value < 100:
        return ">99.9 %"
    return f"{value:.1f} %"
