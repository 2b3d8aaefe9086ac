"""What `shardscribe quantize` leaves behind, in one folder that is there whole or not at all:

OUT/fake-quant      ModelOpt's checkpoint: full-size weights, quantizers' tensors and modelopt_state.pth
OUT/export          int4: ModelOpt's unified Hugging Face checkpoint, for other runtimes
OUT/packed          int4: as `shardscribe pack` writes it, the smallest and the one to run
OUT/README.md       the card
OUT/quantize.json   all figures of the card, the configuration and the calibration set
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.export import export_hf_checkpoint

from pipeline import redact
from pipeline.config import ConfigError
from pipeline.distill.card import card
from pipeline.distill.config import QuantizeConfig
from pipeline.distill.quantize import Result, Samples, load, logits_of, quiet
from pipeline.engine.checkpoint import resolve, weight_files
from pipeline.engine.fake_quant import read_fake_quant
from pipeline.engine.quantized import read, write_packed
from pipeline.storage import is_local

_VERSIONED = ("shardscribe", "torch", "transformers", "qwen-asr", "nvidia-modelopt")
_COPIED = (".json", ".txt", ".jinja")


def check_output(output: str) -> Path:
    """Raises ConfigError unless it is the name of a new local folder."""
    if not is_local(output):
        raise ConfigError(f"output: {output} is no local folder; write to one and copy it from there")
    path = Path(output).expanduser().absolute()
    if path.exists():
        raise ConfigError(f"output: {path} exists; name a new folder")
    return path


def write(result: Result, config: QuantizeConfig) -> dict[str, Any]:
    """Writes the folder and gives what quantize.json holds. Changes the result's model."""
    target = check_output(config.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        source = result.checkpoint.path
        write_fake_quant(result.wrapper.model, source, folder / "fake-quant")
        _check_equal(result, folder / "fake-quant")
        write_other_forms(result.wrapper.model, source, folder, config.format == "int4")
        facts = _facts(result, config, folder)
        (folder / "quantize.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card(facts), encoding="utf-8")
        make_readable(folder)
        if target.exists():
            raise ConfigError(f"output: {target} was made meanwhile; name a new folder")
        folder.rename(target)
    return facts


def write_fake_quant(model: Any, source: Path, folder: Path) -> None:
    """ModelOpt's checkpoint of a model that was loaded from `source`."""
    with quiet():
        model.save_pretrained(folder)
    _copy_files(source, folder)


def write_other_forms(model: Any, source: Path, folder: Path, is_int4: bool) -> None:
    """`export` and `packed` beside `fake-quant` in `folder`, which have the same weights. Changes the model. What could
    not be read back does not come out."""
    fake, export, packed = (folder / name for name in ("fake-quant", "export", "packed"))
    if not is_int4:
        read_fake_quant(fake)
        return
    write_packed(read(fake), fake, packed)
    with quiet(), _with_forward(type(model)):
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=export)
    _copy_files(source, export)
    read(export)


def make_readable(folder: Path) -> None:
    """By whom its other files are: safetensors lets nobody else read what it writes."""
    for weights in folder.rglob("*.safetensors"):
        weights.chmod((weights.parent / "config.json").stat().st_mode)


def _copy_files(source: Path, target: Path) -> None:
    """What belongs to a checkpoint beside its weights and the config."""
    for file in source.iterdir():
        if file.suffix in _COPIED and file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(file, target / file.name)


def _check_equal(result: Result, folder: Path) -> None:
    """Raises RuntimeError unless the folder loads as the model that was written, bit for bit."""
    model = result.wrapper.model
    restored = load(resolve(str(folder), quantization="fake_quant"), model.device).model
    for ref, batch in list(zip(result.calibration.refs, result.calibration.batches, strict=True))[:4]:
        if not torch.equal(logits_of(model, batch), logits_of(restored, batch)):
            raise RuntimeError(f"{ref.example_id}: what was written gives other logits when it is loaded")


@contextlib.contextmanager
def _with_forward(kind: type) -> Iterator[None]:
    """ModelOpt's export runs the model, of which qwen-asr's outer class has no forward."""
    kind.forward = lambda self, input_ids=None, **others: self.thinker(input_ids=input_ids, **others)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del kind.forward  # type: ignore[attr-defined]


def _facts(result: Result, config: QuantizeConfig, folder: Path) -> dict[str, Any]:
    quantized = sum(layer.num_out * layer.num_in for layer in result.layers)
    num_bytes = {"original": _weight_bytes(result.checkpoint.path)} | {
        part.name: _weight_bytes(part) for part in sorted(folder.iterdir())
    }
    if config.format == "int4":
        num_bytes["quantized layers, packed"] = sum(w.num_bytes for w in read(folder / "packed").linears.values())
        num_bytes["quantized layers, 16 bit"] = 2 * quantized
    return {
        "model_id": redact.names(result.checkpoint.model_id),
        "model_revision": result.checkpoint.revision,
        "config": config.model_dump(mode="json", exclude={"storage"}),
        "num_weights": quantized,
        "bytes": num_bytes,
        "calibrated_s": round(result.calibrated_s, 1),
        "calibration": _samples(result.calibration) | asdict(result.calibration_cost),
        "heldout": None
        if result.heldout is None or result.heldout_cost is None
        else _samples(result.heldout) | asdict(result.heldout_cost),
        "layers": [asdict(layer) for layer in result.layers],
        "versions": {name: version(name) for name in _VERSIONED},
    }


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder))


def _samples(samples: Samples) -> dict[str, Any]:
    languages: dict[str, dict[str, float]] = {}
    for ref in samples.refs:
        its = languages.setdefault(ref.language, {"num_examples": 0, "audio_s": 0.0})
        its["num_examples"] += 1
        its["audio_s"] = round(its["audio_s"] + ref.duration_s, 3)
    return {
        "languages": dict(sorted(languages.items())),
        "audio_s": round(samples.audio_s, 3),
        "teachers": sorted({ref.teacher for ref in samples.refs if ref.teacher}),
        "examples": [ref.example_id for ref in samples.refs],
    }
