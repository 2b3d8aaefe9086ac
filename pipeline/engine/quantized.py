"""INT4 checkpoints in the three forms that there are, read as one: `Int4Weight` by the name of its linear layer.

    fake_quant   ModelOpt's own: full-size weights, their quantizers' tensors, and modelopt_state.pth beside them
    export       ModelOpt's `export_hf_checkpoint`: two outputs in a byte, scales, hf_quant_config.json
    packed       ours, written by `shardscribe pack`: two inputs in a byte, scales, shardscribe_int4.json

What does not fit together is refused: a model must not come up unquantized, or quantized in another way than it was.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.engine.checkpoint import INT4_FILES, CheckpointError, weight_files
from pipeline.engine.int4 import Int4Weight

Form = Literal["fake_quant", "export", "packed"]
_FILES: dict[str, Form] = dict(zip(INT4_FILES, ("fake_quant", "export", "packed"), strict=True))
PACKED_FILE = INT4_FILES[2]
_SMALLEST_AMAX = 2.0**-24  # at and below it ModelOpt takes a group for zeros


@dataclass(frozen=True, slots=True)
class Quantized:
    """`linears` by name, such as `thinker.model.layers.0.mlp.up_proj`; `others` are all tensors beside them."""

    form: Form
    linears: dict[str, Int4Weight]
    others: dict[str, Tensor]


def form_of(path: Path) -> Form | None:
    """What kind of INT4 checkpoint a folder is; None for one that is not quantized by its files."""
    return next((form for name, form in _FILES.items() if (path / name).is_file()), None)


def read(path: Path) -> Quantized:
    """Raises CheckpointError for a folder that is no INT4 checkpoint, or one whose parts do not match."""
    form = form_of(path)
    if form is None:
        raise CheckpointError(
            f"{path} is no INT4 checkpoint: it has none of {', '.join(sorted(_FILES))}. Set engine.quantization: none, "
            "or name a quantized checkpoint"
        )
    tensors = read_tensors(path)
    readers = {"fake_quant": _read_fake_quant, "export": _read_export, "packed": _read_packed}
    linears = readers[form](path, tensors)  # takes what it uses out of `tensors`
    if not linears:
        raise CheckpointError(f"{path} has {_file_of(form)} and no quantized layer")
    refuse_leftovers(path, tensors, _file_of(form))
    if half := sorted(name for name in linears if re.search(r"audio_tower|lm_head", name)):
        raise CheckpointError(
            f"{path}: {half[0]} is quantized; Shardscribe runs audio tower and lm_head in 16 bit. Quantize without them"
        )
    return Quantized(form, linears, tensors)


def write_packed(quantized: Quantized, source: Path, target: Path) -> None:
    """Our form of a checkpoint in a new folder `target`: weights in one file, the rest copied from `source`."""
    target.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in quantized.others.items()}
    for name, weight in quantized.linears.items():
        tensors[f"{name}.int4_quants"], tensors[f"{name}.int4_scales"] = weight.quants, weight.scales.contiguous()
        if weight.pre_scale is not None:
            tensors[f"{name}.int4_pre_scale"] = weight.pre_scale.contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for file in source.iterdir():
        if file.suffix in (".json", ".txt", ".jinja") and file.name not in (*_FILES, "model.safetensors.index.json"):
            shutil.copyfile(file, target / file.name)
    config = json.loads((target / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    groups = sorted({weight.group_size for weight in quantized.linears.values()})
    about = {"format": 1, "num_linears": len(quantized.linears), "group_sizes": groups, "from": quantized.form}
    (target / PACKED_FILE).write_text(json.dumps(about, indent=2))


def refuse_leftovers(path: Path, tensors: Mapping[str, Tensor], state: str) -> None:
    """Raises CheckpointError when tensors of quantizers are left that no layer has taken by the file `state`."""
    odd = sorted(name for name in tensors if re.search(r"quantizer|weight_scale|pre_quant_scale|int4_", name))
    if odd:
        raise CheckpointError(
            f"{path}: {len(odd)} tensors of quantizers belong to no layer that is quantized by {state}, such as "
            f"{odd[0]}. Weights and state are not of one checkpoint: copy both again"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name."""
    return {name: tensor for file in weight_files(path) for name, tensor in _tensors(file)}


def _file_of(form: Form) -> str:
    return next(name for name, its in _FILES.items() if its == form)


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (it is no mapping)
            yield name, opened.get_tensor(name)


@contextmanager
def named(path: Path, name: str) -> Iterator[None]:
    """A layer that is not as it should be is told by its name."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: {name}: {error}") from error


def taken(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{name.rpartition('.')[2]} is missing in the weights")
    return tensors.pop(name)


def _read_packed(path: Path, tensors: dict[str, Tensor]) -> dict[str, Int4Weight]:
    about = json.loads((path / PACKED_FILE).read_text())
    names = [name.removesuffix(".int4_quants") for name in tensors if name.endswith(".int4_quants")]
    if about.get("format") != 1 or about.get("num_linears") != len(names):
        raise CheckpointError(
            f"{path}: {PACKED_FILE} tells of {about.get('num_linears')} layers in format {about.get('format')}; the "
            f"weights hold {len(names)}, and format 1 is known. Pack the checkpoint again"
        )
    linears = {}
    for name in names:
        with named(path, name):
            quants, scales = taken(tensors, f"{name}.int4_quants"), taken(tensors, f"{name}.int4_scales")
            weight = Int4Weight(quants, scales, tensors.pop(f"{name}.int4_pre_scale", None))
            _check_shapes(weight)
            linears[name] = weight
    return linears


def _read_export(path: Path, tensors: dict[str, Tensor]) -> dict[str, Int4Weight]:
    about = json.loads((path / "hf_quant_config.json").read_text()).get("quantization", {})
    algorithm, group = about.get("quant_algo"), about.get("group_size")
    if algorithm not in ("W4A16_AWQ", "W4A16") or about.get("has_zero_point"):
        zero = " with zero points" if about.get("has_zero_point") else ""
        raise CheckpointError(f"{path} is {algorithm}{zero}; Shardscribe runs W4A16_AWQ without zero points as INT4")
    names = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    linears = {}
    for name in names:
        with named(path, name):
            pairs, scales = taken(tensors, f"{name}.weight"), taken(tensors, f"{name}.weight_scale")
            if pairs.dtype != torch.uint8:
                raise ValueError(f"its weight is {pairs.dtype}, not two 4-bit integers in a byte")
            nibbles = torch.stack([pairs & 15, pairs >> 4], dim=1).flatten(0, 1).to(torch.int8)  # even outputs are low
            signed = torch.where(nibbles > 7, nibbles - 16, nibbles)
            weight = Int4Weight.of(signed, scales, tensors.pop(f"{name}.pre_quant_scale", None))
            if weight.group_size != group:
                raise ValueError(f"its groups have {weight.group_size} inputs, hf_quant_config.json says {group}")
            _check_shapes(weight)
            linears[name] = weight
    return linears


def _read_fake_quant(path: Path, tensors: dict[str, Tensor]) -> dict[str, Int4Weight]:
    linears = {}
    for linear, quantizer in weight_quantizers(path).items():
        with named(path, linear):
            group = _group_of(quantizer)
            weight, amax, pre_scale = take_fake_quant(tensors, linear)
            linears[linear] = fitted(weight, amax, group, pre_scale)
    return linears


def take_fake_quant(tensors: dict[str, Tensor], linear: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """A layer's weight, its quantizer's largest magnitudes, and the scale of its inputs where there is one."""
    weight, amax = taken(tensors, f"{linear}.weight"), taken(tensors, f"{linear}.weight_quantizer._amax")
    return weight, amax, tensors.pop(f"{linear}.input_quantizer._pre_quant_scale", None)


def weight_quantizers(path: Path) -> dict[str, Mapping[str, Any]]:
    """The state of every weight's quantizer by the name of its layer. Raises CheckpointError when anything else is
    quantized."""
    found = {}
    for name, quantizer in _quantizers(path).items():
        if quantizer.get("_disabled", True):
            continue
        if not name.endswith(".weight_quantizer"):
            raise CheckpointError(f"{path}: {name} is enabled; Shardscribe runs quantized weights and nothing else")
        found[name.removesuffix(".weight_quantizer")] = quantizer
    return found


def _quantizers(path: Path) -> Mapping[str, Any]:
    """The state of every quantizer after the last mode, by its name. The file is a pickle, of which only plain values
    and tensors are read."""
    file = path / "modelopt_state.pth"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        modes = state["modelopt_state_dict"]
        quantizers: Mapping[str, Any] = modes[-1][1]["metadata"]["quantizer_state"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{file} is no state of ModelOpt's quantization: {str(error).partition(chr(10))[0]}"
        ) from error
    return quantizers


def _group_of(quantizer: Mapping[str, Any]) -> int:
    """The inputs that share a scale. Raises ValueError for what is not symmetric static 4-bit in groups."""
    blocks = quantizer.get("_block_sizes") or {}
    found = {
        "num_bits": quantizer.get("_num_bits"),
        "block type": blocks.get("type"),
        "unsigned": quantizer.get("_unsigned"),
        "narrow_range": quantizer.get("_narrow_range"),
        "rotate": bool(quantizer.get("_rotate")),
    }
    wanted = {"num_bits": 4, "block type": "static", "unsigned": False, "narrow_range": False, "rotate": False}
    if found != wanted or -1 not in blocks:
        differing = ", ".join(f"{name} {value}" for name, value in found.items() if value != wanted[name])
        raise ValueError(
            f"its quantizer has {differing or 'no groups of inputs'}; INT4 is symmetric and in static groups. "
            "engine.quantization: fake_quant runs others, to compare"
        )
    return int(blocks[-1])


def fitted(weight: Tensor, amax: Tensor, group: int, pre_scale: Tensor | None = None) -> Int4Weight:
    """The integers that ModelOpt's fake quantization rounds `weight` [out, in] to; amax holds the largest magnitude of
    every group [out * in / group, 1]."""
    return Int4Weight.of(*rounded(weight, amax, group, 4), pre_scale)


def rounded(weight: Tensor, amax: Tensor, group: int, num_bits: int) -> tuple[Tensor, Tensor]:
    """The same in any width up to 8 bits: int8 [out, in], and float32 scales [out, in / group]."""
    num_out, num_in = weight.shape
    if num_in % group or amax.numel() != num_out * num_in // group:
        raise ValueError(f"{amax.numel()} groups of {group} for a weight of {num_out} x {num_in}")
    bound = 2 ** (num_bits - 1) - 1  # what amax stands for
    amax = amax.float().reshape(num_out, num_in // group)
    is_zero = amax <= _SMALLEST_AMAX
    steps = torch.where(is_zero, 0.0, bound / amax)
    grouped = weight.float().unflatten(1, (-1, group))
    integers = (grouped * steps[:, :, None]).round().clamp(-bound - 1, bound).to(torch.int8).flatten(1)
    return integers, torch.where(is_zero, 1.0, 1.0 / steps)


def _check_shapes(weight: Int4Weight) -> None:
    num_out, num_in = weight.shape
    groups = weight.scales.shape
    if len(groups) != 2 or groups[0] != num_out or num_in % groups[1]:
        raise ValueError(f"scales of {tuple(groups)} for a weight of {num_out} x {num_in}")
    if weight.pre_scale is not None and weight.pre_scale.shape != (num_in,):
        raise ValueError(f"a scale of {tuple(weight.pre_scale.shape)} for {num_in} inputs")
