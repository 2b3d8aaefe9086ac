"""`shardscribe distill-tower`: what a causal tower learns from, that it learns, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config import ConfigError, EngineConfig, validate
from pipeline.distill import state as states
from pipeline.distill.audio import Loader
from pipeline.distill.collate import NO_LOSS, collate
from pipeline.distill.config import SpeechConfig, TowerConfig
from pipeline.distill.examples import read_examples
from pipeline.distill.forward import Listener
from pipeline.distill.log import entries
from pipeline.distill.loop import Loop
from pipeline.distill.quantize import load
from pipeline.distill.tower import TOWER_FILE, CausalTower, TowerReader, nearest_offline, train
from pipeline.distill.tower_text import TextLoss
from pipeline.distill.worker import Worker
from pipeline.engine.causal.weights import load_tower
from pipeline.engine.checkpoint import CheckpointError, resolve
from pipeline.engine.model import load_model
from pipeline.engine.windowed import encode
from tests.distill.sources import write_manifest

CPU = torch.device("cpu")
ALONE = Worker(0, 1, CPU)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_manifest(tmp_path_factory.mktemp("manifest") / "m.jsonl", 4))


def configured(model: Path | str, manifest: str, output: Path, **changes: Any) -> TowerConfig:
    options: dict[str, Any] = {
        "model": str(model),
        "output": str(output),
        "speech": {"sources": [manifest]},
        "heldout": {"sources": [manifest], "samples_per_language": 1},
        "steps": 6,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "batch_audio_s": 12,
        "evaluate_every": 6,
        "save_every": 2,
        "log_every": 1,
        "dtype": "float32",
        "device": "cpu",
        "readers": 1,
    }
    return validate(TowerConfig, options | changes, "test")


def test_a_step_learns_from_the_offline_step_whose_frames_are_nearest() -> None:
    """Offline steps begin at every eighth frame of every hundred, causal ones at every eighth of all."""
    offline = [100 * chunk + 8 * step for chunk in range(4) for step in range(13)]
    for step, found in enumerate(nearest_offline(50).tolist()):
        distances = [abs(start - 8 * step) for start in offline]
        assert distances[found] == min(distances) and found == distances.index(min(distances))


def test_batches_follow_from_the_seed_and_their_number(tiny_checkpoint: Path, manifest: str, tmp_path: Path) -> None:
    config = configured(tiny_checkpoint, manifest, tmp_path, max_offset=6000)
    refs = read_examples([manifest], {})[:8]
    made = [TowerReader(config, 128, 0)(number, refs) for number in range(12)]
    again = TowerReader(config, 128, 0)(7, refs)
    assert torch.equal(again.offsets, made[7].offsets) and again.block_frames == made[7].block_frames
    assert {batch.block_frames for batch in made} == {96, 192}
    offsets = torch.cat([batch.offsets for batch in made])
    assert offsets.max() > 1500 and offsets.max() <= 6000, "beyond the table of positions"
    share = float((offsets > 0).float().mean())
    assert 0.35 < share < 0.65 and float(offsets[offsets > 0].float().log().std()) > 1.5


def test_only_the_causal_tower_learns_and_it_comes_nearer(manifest: str, tmp_path: Path) -> None:
    """The embedded student's, in a few steps."""
    config = configured("embedded/student", manifest, tmp_path, steps=15, evaluate_every=15, learning_rate=3e-4)
    task = CausalTower(config, ALONE, torch.float32)
    offline = {name: tensor.clone() for name, tensor in task._offline.state_dict().items()}
    loop = Loop(config, task, ALONE, torch.float32)
    loop.run()
    loop.close()
    assert all(torch.equal(task._offline.state_dict()[name], tensor) for name, tensor in offline.items())
    first, last = (entry for entry in entries(tmp_path / "training.jsonl") if entry["kind"] == "heldout")
    assert last["loss"] < 0.9 * first["loss"] and last["cosine"] < first["cosine"] and last["mse"] < first["mse"]
    assert first["error_rate"] < 0.3, "its decoder understands the untrained one, too"
    state = states.newest(tmp_path / "state")
    assert state is not None and all(not torch.equal(state.weights[f"tower.{name}"], offline[name]) for name in offline)


def test_texts_are_learned_through_a_decoder_that_stands_still(manifest: str, tmp_path: Path) -> None:
    """From the tower that a training left, whose held-out loss is the first one here."""
    config = configured("embedded/student", manifest, tmp_path / "a", steps=10, evaluate_every=10, learning_rate=3e-4)
    logs = {}
    for name, options in (("a", {}), ("b", {"tower": str(tmp_path / "a" / "best"), "text_weight": 4.0})):
        (tmp_path / name).mkdir()
        changed = validate(TowerConfig, config.model_dump() | options | {"output": str(tmp_path / name)}, "test")
        if name == "b":
            (folder,) = (tmp_path / "a" / "best").iterdir()
            changed = changed.model_copy(update={"tower": str(folder)})
        task = CausalTower(changed, ALONE, torch.float32)
        before = None if task._text is None else task._text._model.norm.weight.clone()
        loop = Loop(changed, task, ALONE, torch.float32)
        loop.run()
        loop.close()
        logs[name] = [entry for entry in entries(tmp_path / name / "training.jsonl") if entry["kind"] == "heldout"]
    assert task._text is not None and before is not None
    assert torch.equal(task._text._model.norm.weight, before) and task._text._model.norm.weight.grad is None
    best = min(logs["a"], key=lambda entry: entry["error_rate"])
    first, last = logs["b"]
    assert first["mse"] == pytest.approx(best["mse"], rel=5e-3) and "text" not in best
    assert last["text"] < 0.8 * first["text"]


def test_the_cross_entropy_of_texts_is_that_of_the_model_itself(manifest: str, tmp_path: Path) -> None:
    """Given the embeddings of its own tower."""
    wrapper = load(resolve("embedded/student"), CPU)
    examples = [Loader({}).load(ref) for ref in read_examples([manifest], {})[:5]]
    batch = collate(examples, wrapper.processor)
    with torch.no_grad():
        logits = Listener(wrapper.model.float().thinker)(batch)
        labels = batch["labels"][:, 1:]
        want = torch.nn.functional.cross_entropy(logits, labels[labels != NO_LOSS])
        num_frames = batch["feature_attention_mask"].sum(1)
        heard, num_tokens = encode(wrapper.model.thinker.audio_tower, batch["input_features"], num_frames)
        loss = TextLoss(wrapper, torch.float32)
        got = loss(heard, num_tokens.tolist(), [example.ref for example in examples])
    assert float(got) == pytest.approx(float(want), rel=1e-4)


def test_it_goes_on_with_the_same_curve(
    tiny_checkpoint: Path, manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = {}
    real = Loop._learn

    def stop(self: Loop[Any], batches: Any) -> Any:
        if self._step == 3:
            raise KeyboardInterrupt
        return real(self, batches)

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        config = configured(tiny_checkpoint, manifest, tmp_path / name)
        if name == "stopped":
            monkeypatch.setattr(Loop, "_learn", stop)
            with pytest.raises(KeyboardInterrupt):
                train(config, ALONE)
            monkeypatch.undo()
        train(config, ALONE)
        log = entries(tmp_path / name / "training.jsonl")
        curves[name] = [entry["loss"] for entry in log if entry["kind"] == "step"]
    assert len(curves["whole"]) == 6 and curves["stopped"] == pytest.approx(curves["whole"], rel=1e-6)


@pytest.mark.usefixtures("local_ray")
def test_the_command_ends_with_a_tower_that_loads(tiny_checkpoint: Path, manifest: str, tmp_path: Path) -> None:
    conf = tmp_path / "t.yaml"
    config = configured(tiny_checkpoint, manifest, tmp_path / "out")
    conf.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    result = CliRunner().invoke(app, ["distill-tower", str(conf)])
    assert result.exit_code == 0, result.output
    model = tmp_path / "out" / "model"
    assert "step 6/6  held-out: MSE" in result.output and "causal audio tower" in (model / "README.md").read_text()
    tower = load_model(EngineConfig(model=str(tiny_checkpoint), device="cpu")).model.thinker.audio_tower
    found = load_tower(str(model / TOWER_FILE), tower, "tiny")
    assert found.notes["languages"] == "Chinese,English,Vietnamese" and found.notes["block_frames"] == "96,192"
    facts = json.loads((model / "training.json").read_text())
    assert facts["num_weights"] == sum(tensor.numel() for tensor in tower.state_dict().values())
    again = CliRunner().invoke(app, ["distill-tower", str(conf)])
    assert again.exit_code == 0 and "nothing left to do" in again.output


def test_texts_are_not_needed_but_for_held_out_speech(tiny_checkpoint: Path, manifest: str, tmp_path: Path) -> None:
    without = tmp_path / "without.jsonl"
    lines = [json.loads(line) for line in Path(manifest).read_text().splitlines()]
    without.write_text("".join(json.dumps(line | {"text": ""}) + "\n" for line in lines))
    config = configured(tiny_checkpoint, manifest, tmp_path, steps=2, evaluate_every=2)
    train(config.model_copy(update={"speech": SpeechConfig(sources=[str(without)])}), ALONE)
    assert len(entries(tmp_path / "training.jsonl")) == 4
    heldout = config.heldout.model_copy(update={"sources": [str(without)]})
    with pytest.raises(ConfigError, match="without.jsonl:1 has no text, which an example needs"):
        train(config.model_copy(update={"heldout": heldout}), ALONE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_frames": [100]}, r"block_frames: 100 must be a multiple of 8 within left_steps \(195\)"),
        ({"block_frames": [1600]}, "block_frames: 1600 must be a multiple of 8"),
        ({"block_frames": []}, "block_frames"),
        ({"offset_share": 2}, "offset_share"),
    ],
)
def test_mistakes_in_the_configuration(manifest: str, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured("embedded/student", manifest, tmp_path, **changes)


def test_a_model_that_is_not_there(manifest: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model: there is no 'embedded/none'"):
        train(configured("embedded/none", manifest, tmp_path), ALONE)
