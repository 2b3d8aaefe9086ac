"""INT4 checkpoints as ModelOpt writes them and as we pack them: one model, and refusals of what does not match."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.export import export_hf_checkpoint
from qwen_asr import Qwen3ASRModel
from safetensors.torch import load_file, save_file

from pipeline.config import EngineConfig
from pipeline.engine.checkpoint import EMBEDDED_FOLDER, CheckpointError
from pipeline.engine.create import create_engine
from pipeline.engine.int4 import Int4Linear, Int4Weight
from pipeline.engine.offline import OfflineEngine
from pipeline.engine.quantized import form_of, read, write_packed
from pipeline.schema import Hypothesis, Segment
from tests.engine.tiny import noise, segment

SEGMENTS = [segment(seconds, seed) for seed, seconds in enumerate([1.0, 2.3, 3.1, 5.5, 9.0])]
FILES = ["preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"]


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """The embedded student after awq_full on a few seconds of noise: poor as a calibration, true in its form."""
    mto.enable_huggingface_checkpointing()
    wrapper = Qwen3ASRModel.from_pretrained(str(EMBEDDED_FOLDER / "student"), dtype=torch.bfloat16)
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    config["quant_cfg"] += [
        {"quantizer_name": "*audio_tower*", "enable": False},
        {"quantizer_name": "*lm_head*", "enable": False},
    ]
    config["algorithm"] = {"method": "awq_full", "alpha_step": 0.5}

    def calibrate(model: Any) -> None:
        audio = noise(2.0).astype("float32") / 32768
        prompt = wrapper._build_text_prompt("", None)
        inputs = wrapper.processor(text=[prompt], audio=[audio], return_tensors="pt", padding=True)
        inputs["input_features"] = inputs["input_features"].to(torch.bfloat16)
        model.thinker(**inputs)

    with torch.no_grad():
        yield mtq.quantize(wrapper.model, config, calibrate)


@pytest.fixture(scope="module")
def fake_quant(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fake_quant")
    model.save_pretrained(folder)
    copy_files(folder)
    return folder


@pytest.fixture(scope="module")
def export(fake_quant: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    model = Qwen3ASRModel.from_pretrained(str(fake_quant), dtype=torch.bfloat16).model  # exporting changes it
    kind = type(model)
    kind.forward = lambda self, input_ids=None, **others: self.thinker(input_ids=input_ids, **others)
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=folder)
    copy_files(folder)
    return folder


@pytest.fixture(scope="module")
def packed(fake_quant: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "checkpoint"
    write_packed(read(fake_quant), fake_quant, folder)
    return folder


def copy_files(folder: Path) -> None:
    for name in FILES:
        if (EMBEDDED_FOLDER / "student" / name).exists():
            shutil.copyfile(EMBEDDED_FOLDER / "student" / name, folder / name)


def int4_linears(engine: OfflineEngine) -> list[Int4Linear]:
    layers = engine._decoder._text.layers
    return [each for layer in layers for each in vars(layer).values() if isinstance(each, Int4Linear)]


def said(folder: Path, segments: list[Segment] = SEGMENTS, **changes: Any) -> list[Hypothesis]:
    options = {"name": "offline", "model": str(folder), "quantization": "int4", "device": "cpu"} | changes
    engine = create_engine(EngineConfig.model_validate(options))
    if isinstance(engine, OfflineEngine):
        for module in int4_linears(engine):
            module.switch = 8  # found by timing, it differs from one engine to the next, and with it the rounding
    assert (engine.info.quantization, engine.info.dtype) == ("int4", "bfloat16")
    results = engine.submit(segments).result(60)
    engine.close()
    assert all(isinstance(result, Hypothesis) for result in results)
    return results  # type: ignore[return-value]


def test_the_integers_are_those_of_modelopts_fake_quantization(model: Any, fake_quant: Path) -> None:
    quantized = read(fake_quant)
    assert quantized.form == "fake_quant" and len(quantized.linears) == 28
    for name, weight in quantized.linears.items():
        linear = model.get_submodule(name)
        found = linear.weight_quantizer(linear.weight).detach().float().unflatten(1, (-1, 128))
        amax = linear.weight_quantizer._amax.float().view(weight.shape[0], -1, 1)
        expected = (found * 7 / amax).round().flatten(1).to(torch.int8)
        differing = weight.integers() != expected
        # half a step exactly is rounded to either side, as the last digit of a float has it
        steps = (linear.weight.detach().float().unflatten(1, (-1, 128)) * 7 / amax).flatten(1)[differing]
        assert ((steps % 1 - 0.5).abs() < 1e-5).all() and differing.float().mean() < 1e-3
        assert torch.equal(weight.pre_scale, linear.input_quantizer._pre_quant_scale)  # type: ignore[arg-type]


def test_three_forms_are_one_model(fake_quant: Path, export: Path, packed: Path) -> None:
    assert [form_of(folder) for folder in (fake_quant, export, packed)] == ["fake_quant", "export", "packed"]
    # one row at a time: in 16 bits a text may turn with what is decoded beside it
    first, second, third = (said(folder, slots=1) for folder in (fake_quant, export, packed))
    assert [each.token_ids for each in first] == [each.token_ids for each in third], "packed loses nothing"
    for one, other in zip(first, second, strict=True):  # exporting fits scales and norms anew
        assert one.token_logprobs[0] == pytest.approx(other.token_logprobs[0], abs=0.15)
    assert read(export).linears["thinker.model.layers.0.self_attn.q_proj"].pre_scale is None, "folded into the norm"


def test_the_reference_runs_them_as_fake_quantization(fake_quant: Path) -> None:
    for one, other in zip(said(fake_quant), said(fake_quant, name="reference"), strict=True):
        assert one.token_logprobs[0] == pytest.approx(other.token_logprobs[0], abs=0.1)


def test_kernels_compute_what_fake_quantization_does(model: Any, fake_quant: Path) -> None:
    """Log-probabilities of the same tokens, by ModelOpt's model and by the engine."""
    wrapper = Qwen3ASRModel.from_pretrained(str(EMBEDDED_FOLDER / "student"), dtype=torch.bfloat16)
    for one, got in zip(SEGMENTS, said(fake_quant), strict=True):
        audio = one.pcm.astype("float32") / 32768
        prompt = wrapper._build_text_prompt("", None)
        inputs = wrapper.processor(text=[prompt], audio=[audio], return_tensors="pt", padding=True)
        inputs["input_features"] = inputs["input_features"].to(torch.bfloat16)
        chosen = torch.tensor([got.token_ids])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], chosen], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model.thinker(**inputs).logits[0, -chosen.shape[1] - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, chosen.T)[:, 0]
        assert (torch.tensor(got.token_logprobs) - expected).abs().mean() < 0.1


def test_packing_keeps_everything_and_takes_a_third_of_the_text_layers(fake_quant: Path, packed: Path) -> None:
    before, after = read(fake_quant), read(packed)
    assert before.linears.keys() == after.linears.keys() and before.others.keys() == after.others.keys()
    for name, weight in before.linears.items():
        assert torch.equal(weight.quants, after.linears[name].quants)
        assert torch.equal(weight.scales, after.linears[name].scales)
    num_bytes = sum(weight.num_bytes for weight in after.linears.values())
    assert num_bytes < 0.30 * 2 * sum(weight.shape[0] * weight.shape[1] for weight in after.linears.values())
    assert not (packed / "modelopt_state.pth").exists()
    assert "quantization_config" not in json.loads((packed / "config.json").read_text())


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "thinker.model.layers.1.mlp.up_proj"
MISMATCHES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("fake_quant", lambda f: (f / "modelopt_state.pth").unlink(), "is no INT4 checkpoint: it has none of"),
    ("fake_quant", lambda f: (f / "modelopt_state.pth").write_bytes(b"\x80\x04."), "is no state of ModelOpt's"),
    (
        "fake_quant",
        lambda f: edit_weights(f, lambda t: t.pop(f"{UP}.weight_quantizer._amax")),
        rf"{UP}: _amax is missing in the weights",
    ),
    (
        "fake_quant",
        lambda f: edit_weights(f, lambda t: t.update({"thinker.lm_head.weight_quantizer._amax": torch.ones(1)})),
        "1 tensors of quantizers belong to no layer .* thinker.lm_head.weight_quantizer._amax",
    ),
    (
        "fake_quant",
        lambda f: edit_weights(f, lambda t: t.update({f"{UP}.weight_quantizer._amax": torch.ones(7, 1)})),
        f"{UP}: 7 groups of 128 for a weight of 640 x 256",
    ),
    ("packed", lambda f: edit_weights(f, lambda t: t.pop(f"{UP}.int4_quants")), "tells of 28 layers .* hold 27"),
    ("packed", lambda f: edit_weights(f, lambda t: t.pop(f"{UP}.int4_scales")), f"{UP}: int4_scales is missing"),
    (
        "packed",
        lambda f: edit_weights(f, lambda t: t.update({f"{UP}.int4_scales": torch.ones(640, 3)})),
        rf"{UP}: scales of \(640, 3\) for a weight of 640 x 256",
    ),
    (
        "export",
        lambda f: (f / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}'),
        "is FP8; Shardscribe runs W4A16_AWQ",
    ),
    (
        "export",
        lambda f: edit_weights(f, lambda t: t.update({f"{UP}.weight": torch.zeros(640, 256)})),
        f"{UP}: its weight is torch.float32, not two 4-bit integers",
    ),
]


@pytest.mark.parametrize(("form", "damage", "message"), MISMATCHES)
def test_what_does_not_match_is_refused_by_name(
    request: pytest.FixtureRequest, tmp_path: Path, form: str, damage: Callable[[Path], Any], message: str
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(form), tmp_path / "damaged"))
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        said(folder)


@pytest.mark.parametrize("form", ["fake_quant", "export", "packed"])
def test_no_form_runs_unquantized_by_mistake(request: pytest.FixtureRequest, form: str) -> None:
    folder = request.getfixturevalue(form)
    for name in ("offline", "reference"):
        with pytest.raises(CheckpointError, match=r"is quantized .*engine.quantization: int4"):
            create_engine(EngineConfig.model_validate({"name": name, "model": str(folder)}))


def test_an_unquantized_checkpoint_is_not_taken_for_int4() -> None:
    with pytest.raises(CheckpointError, match="student is no INT4 checkpoint"):
        said(EMBEDDED_FOLDER / "student")


def test_tower_and_head_stay_in_16_bit(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "tower"))

    def quantize_tower(tensors: dict[str, torch.Tensor]) -> None:
        name = "thinker.audio_tower.layers.0.fc1"
        weight = Int4Weight.of(torch.zeros(512, 128, dtype=torch.int8), torch.ones(512, 1))
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.int4_quants": weight.quants, f"{name}.int4_scales": weight.scales}

    edit_weights(folder, quantize_tower)
    about = json.loads((folder / "shardscribe_int4.json").read_text()) | {"num_linears": 29}
    (folder / "shardscribe_int4.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="thinker.audio_tower.layers.0.fc1 is quantized"):
        said(folder)
