"""An evaluation as one HTML page that needs nothing else, in the style of the job's report."""

from __future__ import annotations

import time
from itertools import groupby
from pathlib import Path

from pipeline.evaluate import charts, document
from pipeline.evaluate.compare import Comparison
from pipeline.evaluate.scores import Evaluation
from pipeline.report.page import template

_MAX_GROUPS = 40  # rows of a table
_MAX_CONFUSIONS = 10


def render(evaluation: Evaluation, comparison: Comparison | None) -> str:
    """The page."""
    scored, found = evaluation.scored, evaluation.confusions
    return template(Path(__file__).with_name("page.html.j2")).render(
        evaluation=evaluation,
        system=evaluation.system,
        comparison=comparison,
        generated_at=time.time(),
        num_failed=sum(each.item.status == "failed" for each in scored),
        audio_s=sum(each.item.duration_s or 0.0 for each in scored),
        has_sets=any(group.name for group in evaluation.sets),
        max_groups=_MAX_GROUPS,
        languages=charts.language_chart(evaluation.languages),
        durations=[
            charts.duration_chart(list(groups))
            for _, groups in groupby(evaluation.durations, key=lambda group: group.measure)
        ],
        calibration=charts.calibration_chart(evaluation.calibration) if evaluation.calibration else None,
        confusions=[
            ("Substituted", [(f"{said} → {heard}", count) for (said, heard), count in found.substitutions]),
            ("Deleted", found.deletions),
            ("Inserted", found.insertions),
        ],
        max_confusions=_MAX_CONFUSIONS,
        rate=document.percent,
        span=document.interval_text,
        rates=document.rates_text,
        cells=document.contrast_cells,
        shortened=document.shortened,
        joiner=document.joiner_of,
    )
