"""The checkpoints, held-out sets and samples that are shipped."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from qwen_asr import Qwen3ASRModel

from pipeline.config import EngineConfig
from pipeline.embedded.evaluation import evaluate
from pipeline.engine.checkpoint import EMBEDDED_FOLDER, embedded_models, resolve
from pipeline.engine.create import create_engine
from pipeline.schema import Hypothesis, Segment

MODELS = ("embedded/student", "embedded/teacher")


def test_the_family_is_complete_and_under_40_mib() -> None:
    assert tuple(embedded_models()) == MODELS
    files = [file for file in EMBEDDED_FOLDER.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")]
    assert sum(file.stat().st_size for file in files) < 40 << 20
    assert {file.parent.name for file in files} >= {"student", "teacher", "heldout", "samples"}


@pytest.mark.parametrize("model", MODELS)
def test_sizes_are_those_asked_for(model: str) -> None:
    path = resolve(model).path
    text = json.loads((path / "config.json").read_text())["thinker_config"]["text_config"]
    parameters = (path / "model.safetensors").stat().st_size / 2  # bfloat16
    if model.endswith("student"):
        assert 3.5e6 < parameters < 4.8e6
        assert text["hidden_size"] % 128 == 0 and text["intermediate_size"] % 128 == 0, "groups of INT4"
    else:
        assert 8e6 < parameters < 12e6


@pytest.mark.parametrize("model", MODELS)
def test_qwen_asr_loads_it_unchanged(model: str) -> None:
    wrapper = Qwen3ASRModel.from_pretrained(str(embedded_models()[model]), dtype=torch.float32, max_new_tokens=8)
    (transcription,) = wrapper.transcribe((np.zeros(16_000, np.float32), 16_000))
    assert isinstance(transcription.text, str)


@pytest.mark.parametrize("model", MODELS)
def test_error_on_held_out_speech_is_what_the_card_says(model: str) -> None:
    expected = json.loads((EMBEDDED_FOLDER / "scores.json").read_text())[model.removeprefix("embedded/")]
    found = evaluate(model)
    assert found.keys() == expected.keys()
    for name, score in found.items():
        counts = expected[name]["counts"]
        rate = (counts["substitutions"] + counts["deletions"] + counts["insertions"]) / counts["num_reference"]
        # another CPU rounds otherwise, and may turn a word here and there
        assert score.counts.rate == pytest.approx(rate, abs=0.015), name


@pytest.mark.parametrize("model", MODELS)
def test_silence_is_no_language_and_no_text(model: str) -> None:
    engine = create_engine(EngineConfig(model=model))
    noise = np.random.default_rng(0).normal(0, 20, 48_000).astype(np.int16)
    try:
        results = engine.submit([Segment("silence", np.zeros(48_000, np.int16)), Segment("noise", noise)]).result()
    finally:
        engine.close()
    for result in results:
        assert isinstance(result, Hypothesis)
        assert (result.language, result.text) == ("", "") and result.text_raw.startswith("language None")
