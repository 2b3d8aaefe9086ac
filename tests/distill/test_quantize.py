"""`shardscribe quantize`: what it writes loads as it was written, runs in the engines, and says what it costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from jobs import quantize as job
from jobs.cli import app
from pipeline.config import ConfigError, EngineConfig, validate
from pipeline.distill.config import QuantizeConfig
from pipeline.distill.quantize import Result, load, logits_of, quantize, quantized_linears
from pipeline.distill.quantized_output import write
from pipeline.engine.checkpoint import CheckpointError, resolve
from pipeline.engine.create import create_engine
from pipeline.engine.fake_quant import read_fake_quant
from pipeline.engine.model import load_model
from pipeline.engine.quantized import form_of, read
from pipeline.schema import Hypothesis
from tests.distill.sources import write_manifest
from tests.engine.tiny import segment

CPU = torch.device("cpu")
SEGMENTS = [segment(seconds, seed) for seed, seconds in enumerate([1.0, 2.3, 9.0])]
UP = "thinker.model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_manifest(tmp_path_factory.mktemp("manifest") / "m.jsonl", 3))


def config(manifest: str, model: Path | str, output: Path | str, **changes: Any) -> QuantizeConfig:
    calibration = {"sources": [manifest], "samples_per_language": 2} | changes.pop("calibration", {})
    options = {
        "model": str(model),
        "output": str(output),
        "calibration": calibration,
        "group_size": 32,
        "device": "cpu",
    }
    return validate(QuantizeConfig, options | {"alpha_step": 0.5, "clip_tokens": 60, "threads": 1} | changes, "test")


def engine_config(model: Path, quantization: str) -> EngineConfig:
    options = {"model": str(model), "quantization": quantization, "dtype": "bfloat16", "device": "cpu"}
    return EngineConfig.model_validate(options | {"max_new_tokens": 8})


def quietly(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, manifest: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, Any]:
    """awq_full of the tiny checkpoint: its folder, the result, logits of the model before it was written."""
    out = tmp_path_factory.mktemp("made") / "int4"
    options = config(manifest, tiny_checkpoint, out)
    result = quantize(options, quietly)
    before = [logits_of(result.wrapper.model, batch) for batch in result.calibration.batches]
    write(result, options)
    return out, result, before


def test_it_loads_back_bit_equal(made: tuple[Path, Result, Any]) -> None:
    out, result, before = made
    restored = load(resolve(str(out / "fake-quant"), quantization="fake_quant"), CPU).model
    assert len(quantized_linears(restored)) == 14
    for logits, batch in zip(before, result.calibration.batches, strict=True):
        assert torch.equal(logits, logits_of(restored, batch))


def test_three_forms_run_as_int4_and_hold_what_the_original_does(
    made: tuple[Path, Result, Any], tiny_checkpoint: Path
) -> None:
    out, _, _ = made
    texts = []
    for form in ("fake-quant", "export", "packed"):
        assert form_of(out / form) == form.replace("-", "_")
        engine = create_engine(engine_config(out / form, "int4"))
        results = engine.submit(SEGMENTS).result(60)
        engine.close()
        assert all(isinstance(each, Hypothesis) for each in results)
        texts.append([each.token_ids for each in results if isinstance(each, Hypothesis)])
        for name in ("generation_config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"):
            if (tiny_checkpoint / name).exists():
                assert (out / form / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
        assert (out / form / "model.safetensors").stat().st_mode & 0o044
    assert texts[0] == texts[2], "packed loses nothing"


def test_the_card_and_its_figures(made: tuple[Path, Result, Any], tiny_checkpoint: Path, manifest: str) -> None:
    out, result, _ = made
    facts = json.loads((out / "quantize.json").read_text())
    assert facts["model_revision"] == resolve(str(tiny_checkpoint)).revision
    its = facts["calibration"]
    assert {name: each["num_examples"] for name, each in its["languages"].items()} == {
        "Chinese": 2, "English": 2, "Vietnamese": 2,
    }  # fmt: skip
    assert len(its["examples"]) == len(set(its["examples"])) == 6 and its["kl"] > 0 and facts["heldout"] is None
    sizes = facts["bytes"]
    assert sizes["packed"] == (out / "packed" / "model.safetensors").stat().st_size < sizes["fake-quant"]
    assert sizes["quantized layers, packed"] < 0.45 * sizes["quantized layers, 16 bit"], "groups of 32 in float32"
    assert len(facts["layers"]) == 14 and all(0 < layer["error"] < 1 for layer in facts["layers"])
    card = (out / "README.md").read_text()
    for said in (manifest, "awq_full", "groups of 32 inputs", f"`{UP}`", f"{sizes['packed']:,}", f"{its['kl']:.5f}"):
        assert said in card


def test_the_error_of_a_layer_is_of_its_outputs(made: tuple[Path, Result, Any], tiny_checkpoint: Path) -> None:
    """The first layer meets the same inputs in both models, so its error follows from the weights that were written."""
    out, result, _ = made
    name = "thinker.model.layers.0.self_attn.q_proj"
    original = load(resolve(str(tiny_checkpoint)), CPU).model
    linear, seen = original.get_submodule(name), []
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in result.calibration.batches:
        logits_of(original, batch)
    x = torch.cat([each.flatten(0, -2) for each in seen]).float()
    values = read_fake_quant(out / "fake-quant").tensors[f"{name}.weight"]
    expected = x @ linear.weight.float().T
    error = float((x @ values.T - expected).norm() / expected.norm())
    found = next(layer for layer in result.layers if layer.name == name)
    assert found.error == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"format": "int3"}, "fake-int3"),
        ({"format": "int2", "algorithm": "awq_lite"}, "fake-int2"),
        ({"format": "fp8", "algorithm": "rtn"}, "fake-fp8"),
        ({"format": "int4", "algorithm": "rtn"}, "fake-int4"),
        ({"format": "int3", "algorithm": "rtn", "exclude": ["*lm_head*", "*layers.0.*"]}, "fake-int3"),
    ],
)
def test_engines_run_every_comparator_as_modelopt_computes_it(
    manifest: str, tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], numbers: str
) -> None:
    options = config(manifest, tiny_checkpoint, tmp_path / "out", **changes)
    result = quantize(options, quietly)
    expected = [logits_of(result.wrapper.model, batch).float() for batch in result.calibration.batches]
    original = load(result.checkpoint, CPU).model
    write(result, options)
    folder = tmp_path / "out" / "fake-quant"
    engine = engine_config(folder, "fake_quant")
    loaded = load_model(engine)
    assert loaded.info.quantization == numbers
    for batch, logits in zip(result.calibration.batches, expected, strict=True):
        off = (logits_of(loaded.model, batch).float() - logits).norm()
        cost = (logits_of(original, batch).float() - logits).norm()
        assert off < 0.5 * cost, "what rounding makes is less than what quantizing changes"
    for name in ("offline", "reference"):
        running = create_engine(engine.model_copy(update={"name": name}))
        results = running.submit(SEGMENTS).result(60)
        running.close()
        assert all(isinstance(each, Hypothesis) for each in results)
    if "layers.0" in str(changes):
        assert {layer.name.split(".")[1] for layer in result.layers} == {"audio_tower", "model"}
        assert not any("layers.0" in layer.name for layer in result.layers)


def test_awq_costs_less_than_rounding_and_fewer_bits_cost_more(manifest: str, tmp_path: Path) -> None:
    kl = {}
    for number, algorithm in (("fp8", "rtn"), ("int4", "rtn"), ("int2", "rtn"), ("int2", "awq_full")):
        held = {"sources": [manifest], "samples_per_language": 1, "seed": 3}
        changes = {"format": number, "algorithm": algorithm, "group_size": 128, "heldout": held, "clip_tokens": 24}
        changes["calibration"] = {"samples_per_language": 1}
        result = quantize(config(manifest, "embedded/student", tmp_path / "out", **changes), quietly)
        assert result.heldout_cost is not None and result.calibration_cost.ce_before < 0.2
        kl[number, algorithm] = result.calibration_cost.kl
    assert kl["fp8", "rtn"] < kl["int4", "rtn"] < kl["int2", "awq_full"] < kl["int2", "rtn"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"calibration": {"languages": ["English", "Thai"]}},
            "no examples of Thai .* there are Chinese, English, Viet",
        ),
        ({"calibration": {"samples_per_language": 4}}, "Chinese has 3 examples; samples_per_language is 4"),
        ({"group_size": 48}, r"group_size: thinker.model.layers.0.\S+ has \d+ inputs, no multiple of 48"),
        ({"exclude": ["*"]}, r"exclude: \* leaves no layer to quantize"),
        ({"exclude": ["*lm_head*"], "algorithm": "rtn"}, r"audio_tower\S+ would be quantized; int4 runs"),
        ({"exclude": ["*audio_tower*"]}, r"`exclude`: `\*lm_head\*` has to be in it"),
        ({"format": "fp8"}, "algorithm: awq_full searches for integers in groups; format: fp8 takes rtn"),
        ({"output": "s3://bucket/out"}, "output: s3://bucket/out is no local folder"),
        ({"model": "embedded/none"}, "model: there is no 'embedded/none'"),
        ({"revision": "main"}, "^revision: 'main' is for Hub ids"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(
    manifest: str, tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    options = {"model": tiny_checkpoint, "output": tmp_path / "out"} | changes
    with pytest.raises((ConfigError, CheckpointError), match=message):
        job.run(config(manifest, **options), Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_quantized_is_not_quantized_again(
    made: tuple[Path, Result, Any], manifest: str, tmp_path: Path
) -> None:
    for form in ("fake-quant", "export", "packed"):
        with pytest.raises(CheckpointError, match=r"is quantized already \(.*; quantize what it was made from"):
            job.run(config(manifest, made[0] / form, tmp_path / "out"), Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(manifest: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    conf = tmp_path / "q.yaml"
    conf.write_text(json.dumps(config(manifest, tiny_checkpoint, tmp_path / "out").model_dump(mode="json")))
    result = CliRunner().invoke(app, ["quantize", str(conf)])
    assert result.exit_code == 2 and f"output: {tmp_path / 'out'} exists; name a new folder" in result.output
    assert not list((tmp_path / "out").iterdir())


def test_a_failure_while_writing_leaves_nothing(
    manifest: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pipeline.distill.quantized_output.card", fail)
    with pytest.raises(OSError, match="disk full"):
        job.run(config(manifest, tiny_checkpoint, tmp_path / "out", algorithm="rtn"), Console(quiet=True))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def comparator(tiny_checkpoint: Path, manifest: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int3") / "out"
    job.run(config(manifest, tiny_checkpoint, out, format="int3", algorithm="rtn"), Console(quiet=True))
    return out / "fake-quant"


def test_a_comparator_runs_under_its_own_name_alone(
    comparator: Path, made: tuple[Path, Result, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert not (comparator.parent / "packed").exists()
    with pytest.raises(CheckpointError, match=r"layers.0.\S+ its quantizer has num_bits 3; INT4 is .* fake_quant runs"):
        read(comparator)
    with pytest.raises(CheckpointError, match=r"is quantized \(modelopt_state.pth\)"):
        load_model(EngineConfig(model=str(comparator)))
    for folder, other in ((made[0] / "packed", "int4"), (made[0] / "export", "int4"), (tiny_checkpoint, "none")):
        with pytest.raises(CheckpointError, match=f"has no modelopt_state.pth, .* set it to {other}"):
            load_model(EngineConfig(model=str(folder), quantization="fake_quant"))
    mixed = Path(shutil.copytree(comparator, tmp_path / "mixed"))
    shutil.copyfile(made[0] / "fake-quant" / "model.safetensors", mixed / "model.safetensors")
    (mixed / "modelopt_state.pth").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="is no state of ModelOpt's quantization"):
        read_fake_quant(mixed)
