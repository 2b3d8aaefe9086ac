"""Thresholds fitted by language on a sample of rows, before a job begins, so that all its units share them.

The fit lies in OUT/calibration/thresholds.yaml: what it was fitted on, how, and what came out. The job runs with it as
part of its configuration (`labels.languages`), and so of its hash and of every unit's record.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import yaml

from pipeline import redact, storage
from pipeline.config import ConfigError, TranscribeConfig, validate
from pipeline.label import LIMITS
from pipeline.labels_config import CalibrateConfig
from pipeline.languages import NAMES
from pipeline.output import Output

COLUMNS = {key: limit.column for limit in LIMITS for key in (limit.low, limit.high) if key is not None}
"""Threshold key -> the column that it bounds."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What was fitted on the rows with text of `sample`, an output: `languages` are language -> threshold key -> limit,
    `num_segments` says of how many rows by language. `config_hash` is that of the configuration before the fit."""

    config_hash: str
    sample: str
    fitted_at: str
    calibrate: dict[str, Any]
    num_segments: dict[str, int]
    languages: dict[str, dict[str, float]]

    def applied(self, config: TranscribeConfig) -> TranscribeConfig:
        """`config` with these thresholds in `labels.languages`."""
        data = config.model_dump()
        languages = data["labels"]["languages"]
        for language, thresholds in self.languages.items():
            languages[language] = languages.get(language, {}) | thresholds
        return validate(type(config), data, f"thresholds fitted on {self.sample}")


def folder(output: Output) -> str:
    """Where an output has its fit, and the sample transcribed for it."""
    return storage.join(output.url, "calibration")


def read_fit(output: Output, options: storage.Options, config: TranscribeConfig) -> Fit | None:
    """The fit of an output, None before there is one. Raises ConfigError when it is of another configuration."""
    url = storage.join(folder(output), "thresholds.yaml")
    if not storage.exists(url, options):
        return None
    fit = Fit(**yaml.safe_load(storage.read_bytes(url, options)))
    if fit.config_hash != config.result_hash():
        raise ConfigError(
            f"{url} was fitted for another configuration; set that back, or write to a new output (or, before a unit "
            f"is committed, delete {folder(output)})"
        )
    return fit


def write_fit(output: Output, options: storage.Options, fit: Fit) -> None:
    """Put a fit in place, unless another writer did."""
    text = yaml.safe_dump(asdict(fit), sort_keys=False, allow_unicode=True)
    storage.commit(storage.join(folder(output), "thresholds.yaml"), text.encode(), options)


def fit(sample: Output, config: TranscribeConfig) -> Fit:
    """Fit `config.labels.calibrate` on all rows with text of an output.

    Raises ConfigError when there are none at all.
    """
    calibrate = config.labels.calibrate
    assert calibrate is not None
    columns = sorted({COLUMNS[key] for key in calibrate.quantiles} | {"char_rate"})
    values = _values_by_language(sample, columns)
    num_segments = {language: len(rows["char_rate"]) for language, rows in sorted(values.items())}
    if not num_segments:
        raise ConfigError(f"labels.calibrate: {sample.url} holds no segment with text to fit thresholds on")
    return Fit(
        config_hash=config.result_hash(),
        sample=redact.names(sample.url),
        fitted_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        calibrate=calibrate.model_dump(mode="json", exclude={"output"}),
        num_segments=num_segments,
        languages={
            language: thresholds(rows, calibrate, config.labels.thresholds(language))
            for language, rows in sorted(values.items())
            if num_segments[language] >= calibrate.min_segments and language in NAMES
        },
    )


def thresholds(
    values: dict[str, np.ndarray], calibrate: CalibrateConfig, limits: dict[str, float | None]
) -> dict[str, float]:
    """Threshold key -> limit of one language, from `values` by column, where the fit is tighter than `limits`."""
    fitted: dict[str, float] = {}
    for key, share in calibrate.quantiles.items():
        known = _finite(values[COLUMNS[key]])
        if len(known):
            fitted[key] = float(np.quantile(known, share))
    rates = _finite(values["char_rate"])
    if calibrate.char_rate_iqr is not None and len(rates):
        first, third = np.quantile(rates, [0.25, 0.75])
        beyond = calibrate.char_rate_iqr * (third - first)
        for key, fence in (("min_char_rate", first - beyond), ("max_char_rate", third + beyond)):
            if third > first:  # without any spread there is nothing to measure by
                fitted[key] = _tighter(key, fitted.get(key), float(fence))
    return {
        key: float(f"{value:.6g}")
        for key, value in fitted.items()
        if _tighter(key, limits[key], value) != limits[key] and not (key == "min_char_rate" and value <= 0)
    }


def _tighter(key: str, limit: float | None, value: float) -> float:
    if limit is None:
        return value
    return max(limit, value) if key.startswith("min_") else min(limit, value)


def _finite(values: np.ndarray) -> np.ndarray:
    finite: np.ndarray = values[np.isfinite(values)]
    return finite


def _values_by_language(sample: Output, columns: list[str]) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    keys = sorted(key for done in sample.committed().values() for key in done.keys)
    for _, _, table in sample.tables(keys, ["language", "status", *columns]):
        spoken = table.filter(pc.equal(table["status"], "ok"))
        languages = np.array([(name or "").partition(",")[0] for name in spoken["language"].to_pylist()], dtype=object)
        for language in set(languages):
            for column in columns:
                numbers = spoken[column].cast("float64").to_numpy()
                found[language][column].append(numbers[languages == language])
    return {
        language: {name: np.concatenate(parts) for name, parts in by_column.items()}
        for language, by_column in found.items()
    }
