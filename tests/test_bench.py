"""`shardscribe bench` and `shardscribe pack`, small enough to run each time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from jobs.bench import table
from jobs.cli import app
from pipeline import bench
from pipeline.bench import Figure
from pipeline.engine.int4 import Int4Weight
from pipeline.engine.quantized import Quantized, read, write_packed
from pipeline.schema import SAMPLE_RATE_HZ


def shardscribe(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_figures_are_printed_and_written(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    result = shardscribe("bench", "engine", "--clips", "6", "--threads", "1", "--out", out)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert {"device", "threads", "torch", "shardscribe", "ray"} <= written["machine"].keys()
    figures = {figure["name"]: figure for figure in written["figures"]}
    ratio = figures["offline / reference, student"]
    rtfx = ratio["detail"]["RTFx"]
    (ours,) = (value for name, value in rtfx.items() if name.startswith("offline"))
    best = max(value for name, value in rtfx.items() if name.startswith("reference"))
    assert ratio["value"] == pytest.approx(ours / best) and ratio["is_met"] is (ratio["value"] >= 8)
    assert 0 < figures["slot efficiency"]["value"] <= 1
    assert "offline / reference, student" in result.output and "written to" in result.output


def test_a_figure_that_is_none_is_a_mistake() -> None:
    result = shardscribe("bench", "sped")
    assert result.exit_code == 2 and "sped: no figure; there are engine, 0.6b, int4, reading" in result.output


def test_a_target_is_met_or_missed() -> None:
    assert [Figure("a", 1).is_met, Figure("a", 1, target=1).is_met, Figure("a", 1, target=2).is_met] == [
        None,
        True,
        False,
    ]
    assert Figure("a", 1, target=2, at_most=True).is_met and not Figure("a", 3, target=2, at_most=True).is_met
    assert table([Figure("a", 1, "x", 2)]).row_count == 1


def test_clips_are_speech_of_the_lengths_asked_for() -> None:
    clips = bench.clips(12, 1.0, 5.0)
    assert all(SAMPLE_RATE_HZ <= len(clip) <= 5 * SAMPLE_RATE_HZ and clip.dtype == np.int16 for clip in clips)
    assert all(np.array_equal(one, two) for one, two in zip(clips, bench.clips(12, 1.0, 5.0), strict=True))
    assert np.abs(clips[0]).max() > 1000


@pytest.fixture
def packed(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint in our form, of zeros."""
    from safetensors.torch import load_file

    tensors = load_file(tiny_checkpoint / "model.safetensors")
    name = "thinker.model.layers.0.mlp.up_proj"
    num_out, num_in = tensors.pop(f"{name}.weight").shape
    weight = Int4Weight.of(torch.zeros(num_out, num_in, dtype=torch.int8), torch.ones(num_out, 1))
    write_packed(Quantized("packed", {name: weight}, tensors), tiny_checkpoint, tmp_path / "packed")
    return tmp_path / "packed"


def test_packing_again_is_the_same(packed: Path, tmp_path: Path) -> None:
    result = shardscribe("pack", packed, tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert "1 layers in" in result.output and "quantization: int4}" in result.output
    one, two = read(packed), read(tmp_path / "again")
    assert one.linears.keys() == two.linears.keys() and one.others.keys() == two.others.keys()


def test_mistakes_of_packing_are_one_line(packed: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for source, target, message in (
        (packed, packed, "exists; name a new folder"),
        (tiny_checkpoint, tmp_path / "new", "is no INT4 checkpoint"),
    ):
        result = shardscribe("pack", source, target)
        assert result.exit_code in (1, 2) and message in result.output.replace("\n", " ")
        assert "Traceback" not in result.output
