"""Thresholds fitted by language on a sample, written down, and shared by all units of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.calibrate import fit, folder, read_fit, thresholds, write_fit
from pipeline.config import ConfigError, TranscribeConfig
from pipeline.labels_config import CalibrateConfig
from pipeline.output import Output
from pipeline.units import UnitKey
from tests.outputs import failed, put, row, start

SPLIT = "a" * 16
NO_LIMITS = {"min_char_rate": None, "max_char_rate": None, "min_avg_logprob": None, "max_compression_ratio": None}
RATES = np.arange(10.0, 21.0)  # quartiles 12.5 and 17.5


def config(output: str = "out", **labels: Any) -> TranscribeConfig:
    return TranscribeConfig.model_validate({"inputs": ["a.tar"], "output": output, "labels": labels})


@pytest.fixture
def sample(tmp_path: Path) -> Output:
    """11 English rows with rates of 10 to 20, as many Vietnamese ones from 20 on, and three others."""
    output = start(str(tmp_path / "sample"), {SPLIT: 9.0})
    english = [row(char_rate=rate, avg_logprob=-rate / 10) for rate in RATES]
    vietnamese = [row(char_rate=rate + 10, avg_logprob=-0.1, language="Vietnamese") for rate in RATES]
    odd = [
        row(char_rate=900.0, status="empty", keep=False, filter_reasons=["empty"]),
        row(char_rate=900.0, language="Thai"),
        failed(),
    ]
    put(output, UnitKey(SPLIT, 0, 0, "g"), english[::2] + vietnamese[::2])
    put(output, UnitKey(SPLIT, 1, 0, "z"), english[1::2] + vietnamese[1::2] + odd)
    return output


def test_fences_of_the_rate_are_iqrs_beyond_the_quartiles() -> None:
    values = {"char_rate": RATES}
    assert thresholds(values, CalibrateConfig(char_rate_iqr=1.5), NO_LIMITS) == {
        "min_char_rate": 5.0,
        "max_char_rate": 25.0,
    }
    assert thresholds(values, CalibrateConfig(char_rate_iqr=3), NO_LIMITS) == {"max_char_rate": 32.5}, "below 0 is none"
    assert thresholds(values, CalibrateConfig(char_rate_iqr=None), NO_LIMITS) == {}
    assert thresholds({"char_rate": np.full(9, 12.0)}, CalibrateConfig(), NO_LIMITS) == {}, "no spread"


def test_quantiles_are_exact() -> None:
    values = {
        "char_rate": RATES,
        "avg_logprob": -np.arange(101.0),
        "compression_ratio": np.array([1.0, np.nan, np.inf]),
    }
    calibrate = CalibrateConfig(char_rate_iqr=None, quantiles={"min_avg_logprob": 0.05, "max_compression_ratio": 0.5})
    assert thresholds(values, calibrate, NO_LIMITS) == {"min_avg_logprob": -95.0, "max_compression_ratio": 1.0}


def test_a_fit_only_tightens() -> None:
    values, calibrate = {"char_rate": RATES}, CalibrateConfig()
    assert thresholds(values, calibrate, NO_LIMITS | {"max_char_rate": 24.0, "min_char_rate": 1.0}) == {
        "min_char_rate": 5.0
    }
    both = CalibrateConfig(quantiles={"max_char_rate": 0.5})
    assert thresholds(values, both, NO_LIMITS)["max_char_rate"] == 15.0, "the tighter of quantile and fence"


def test_each_language_of_enough_rows_is_fitted(sample: Output) -> None:
    job = config(calibrate={"min_segments": 5, "quantiles": {"min_avg_logprob": 0.1}}, min_avg_logprob=-1.95)
    found = fit(sample, job)
    assert found.num_segments == {"English": 11, "Thai": 1, "Vietnamese": 11}
    assert found.languages["Vietnamese"] == {"min_avg_logprob": -0.1, "min_char_rate": 15.0, "max_char_rate": 35.0}
    assert found.languages["English"] == {"min_avg_logprob": -1.9, "min_char_rate": 5.0, "max_char_rate": 25.0}
    assert found.languages.keys() == {"English", "Vietnamese"}

    applied = found.applied(job)
    assert applied.labels.thresholds("English")["max_char_rate"] == 25.0
    assert applied.labels.thresholds("Thai") == job.labels.thresholds("Thai")
    assert applied.result_hash() != job.result_hash(), "the fit is part of what the output belongs to"


def test_a_languages_own_thresholds_stay_beside_the_fitted(sample: Output) -> None:
    job = config(calibrate={"min_segments": 5}, languages={"English": {"max_char_rate": 20, "max_duration_s": 9}})
    english = fit(sample, job).applied(job).labels.languages["English"]
    assert english == {"max_char_rate": 20.0, "max_duration_s": 9.0, "min_char_rate": 5.0}


def test_the_first_fit_of_an_output_stays(sample: Output, tmp_path: Path) -> None:
    job = config(str(tmp_path / "out"), calibrate={"min_segments": 5})
    output = Output(job.output, {})
    assert read_fit(output, {}, job) is None
    first = fit(sample, job)
    write_fit(output, {}, first)
    put(sample, UnitKey(SPLIT, 2, 0, "z"), [row(char_rate=39.0)] * 50)
    write_fit(output, {}, fit(sample, job))
    assert read_fit(output, {}, job) == first
    text = yaml.safe_load((Path(folder(output)) / "thresholds.yaml").read_text())
    assert text["sample"] == sample.url and text["calibrate"]["char_rate_iqr"] == 1.5
    with pytest.raises(ConfigError, match=r"thresholds\.yaml was fitted for another configuration"):
        read_fit(output, {}, config(job.output, calibrate={"min_segments": 6}))


def test_nothing_to_fit_on(tmp_path: Path) -> None:
    empty = start(str(tmp_path / "empty"), {SPLIT: 9.0})
    with pytest.raises(ConfigError, match="holds no segment with text to fit thresholds on"):
        fit(empty, config(calibrate={}))
