"""Flat tower files: what is loaded is what was saved, and what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.engine.causal.weights import load_tower, save_tower
from pipeline.engine.checkpoint import CheckpointError
from tests.engine.causal.test_tower import random_tower
from tests.engine.causal.upstream import STUDENT, tower_of, upstream

BASE = "a-base"


def test_a_tower_comes_back_as_it_was(tmp_path: Path) -> None:
    tower, other = random_tower(16, 2, 2, seed=1), random_tower(16, 2, 2, seed=2)
    save_tower(tower, tmp_path / "made" / "tower.safetensors", {"languages": "English,Vietnamese"})
    found = load_tower(str(tmp_path / "made"), other, BASE)
    assert found.notes["languages"] == "English,Vietnamese"
    assert all(torch.equal(one, two) for one, two in zip(tower.parameters(), other.parameters(), strict=True))
    again = load_tower(str(tmp_path / "made" / "tower.safetensors"), other, BASE)
    assert again.revision == found.revision and len(found.revision) == 40


def test_its_layout_is_that_of_upstream(tmp_path: Path) -> None:
    tower, other = tower_of(STUDENT), tower_of(STUDENT)
    for parameter in other.parameters():
        parameter.data.zero_()
    save_tower(tower, tmp_path / "tower.safetensors", {})
    holder = torch.nn.Module()
    holder.audio_encoder = torch.nn.Module()
    holder.audio_encoder.audio_tower = other
    upstream(".causal").load_tower_checkpoint(holder, tmp_path / "tower.safetensors")
    assert all(torch.equal(one, two) for one, two in zip(tower.parameters(), other.parameters(), strict=True))


def test_bfloat16_weights_load_into_a_float32_model(tmp_path: Path) -> None:
    tower = random_tower(16, 2, 1, seed=1)
    save_tower(random_tower(16, 2, 1, seed=2).to(torch.bfloat16), tmp_path / "tower.safetensors", {})
    load_tower(str(tmp_path), tower, BASE)
    assert all(parameter.dtype == torch.float32 for parameter in tower.parameters())


@pytest.mark.parametrize(
    ("d_model", "layers", "said"),
    [
        (
            32,
            2,
            r"tower of a-base: \d+ tensors of another shape .such as \S+k_proj.weight is .32, 32. instead of .16, 16",
        ),
        (16, 3, r"\d+ that it does not know .such as layers.2"),
        (16, 1, r"\d+ tensors missing .such as layers.1"),
    ],
)
def test_a_tower_of_another_model_is_refused_by_name(tmp_path: Path, d_model: int, layers: int, said: str) -> None:
    save_tower(random_tower(d_model, 2, layers, seed=1), tmp_path / "tower.safetensors", {})
    tower = random_tower(16, 2, 2, seed=2)
    before = [parameter.clone() for parameter in tower.parameters()]
    with pytest.raises(CheckpointError, match=said):
        load_tower(str(tmp_path), tower, BASE)
    assert all(torch.equal(one, two) for one, two in zip(before, tower.parameters(), strict=True))


def test_what_is_no_tower_is_refused_by_name(tmp_path: Path) -> None:
    tower = random_tower(16, 2, 2, seed=2)
    cases = {
        "nowhere": "no file or folder on this machine and no Hub id",
        str(tmp_path): "must hold one safetensors file, the tower; it has none",
        str(STUDENT / "model.safetensors"): "a whole Qwen3-ASR checkpoint: it goes under engine.model",
    }
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "tower.pt").write_bytes(b"pickle")
    cases[str(tmp_path / "x" / "tower.pt")] = "pickles are never loaded"
    (tmp_path / "x" / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    cases[str(tmp_path / "x" / "cut.safetensors")] = "cut short"
    for reference, said in cases.items():
        with pytest.raises(CheckpointError, match=said):
            load_tower(reference, tower, BASE)
    save_file({}, tmp_path / "x" / "cut.safetensors")
    with pytest.raises(CheckpointError, match="revision"):
        load_tower(str(tmp_path / "x"), tower, BASE, revision="main")


def test_the_embedded_students_tower_is_one(tmp_path: Path) -> None:
    save_tower(tower_of(STUDENT), tmp_path / "tower.safetensors", {})
    names = load_file(tmp_path / "tower.safetensors")
    assert "conv2d1.weight" in names and "layers.3.self_attn.q_proj.bias" in names and "proj2.bias" in names
