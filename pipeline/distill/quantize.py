"""Quantizes a checkpoint with ModelOpt: calibrated on teacher-forced speech of every language alike, and measured.

Examples go through the model one by one, so that nothing of a padded batch is calibrated on.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.distill.audio import Loader
from pipeline.distill.collate import NO_LOSS, collate
from pipeline.distill.config import QuantizeConfig, SamplesConfig
from pipeline.distill.examples import ExampleRef, read_examples
from pipeline.distill.sampling import draw
from pipeline.engine.checkpoint import Checkpoint, CheckpointError, resolve, sign_of_quantization
from pipeline.engine.model import build
from pipeline.engine.reference import install_windowed_attention
from pipeline.storage import Options

Say = Callable[[str], None]
_BITS = {"int4": 4, "int3": 3, "int2": 2}


@dataclass(frozen=True, slots=True)
class Samples:
    """Examples as the model takes them, each a batch of one."""

    refs: list[ExampleRef]
    batches: list[dict[str, Tensor]]

    @property
    def audio_s(self) -> float:
        return sum(ref.duration_s for ref in self.refs)


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantized linear layer; `error` is the norm of what its outputs are off over the norm of the outputs that the
    weights as they were give for the same inputs."""

    name: str
    num_out: int
    num_in: int
    error: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What quantizing costs on some speech: KL divergence in nats a token, of the answers' tokens, from the model as it
    was; the mean cross-entropy of the answers before and after."""

    kl: float
    kl_by_language: dict[str, float]
    ce_before: float
    ce_after: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """`wrapper` holds the model with ModelOpt's fake quantization."""

    checkpoint: Checkpoint
    wrapper: Any
    calibration: Samples
    heldout: Samples | None
    layers: list[Layer]
    calibration_cost: Cost
    heldout_cost: Cost | None
    calibrated_s: float


def quantize(config: QuantizeConfig, say: Say) -> Result:
    """Raises ConfigError and CheckpointError for what cannot be quantized as the configuration has it."""
    checkpoint = resolve(config.model, config.revision, key="model", quantization="int4")  # quantized is told below
    if sign := sign_of_quantization(checkpoint.path):
        raise CheckpointError(f"{checkpoint.path} is quantized already ({sign}); quantize what it was made from")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device(
        config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    )
    options = config.storage.access
    refs = _draw(config.calibration, options)
    held_refs = None if config.heldout is None else _draw(config.heldout, options)
    original, wrapper = (load(checkpoint, device) for _ in range(2))
    _check_layers(original.model, config)
    calibration = _load_samples(refs, original.processor, options)
    heldout = None if held_refs is None else _load_samples(held_refs, original.processor, options)
    say(f"calibrating on {len(refs)} examples, {calibration.audio_s / 60:.1f} min")
    began = time.monotonic()
    _quantize(wrapper.model, config, calibration.batches)
    calibrated_s = time.monotonic() - began
    say(f"calibrated in {calibrated_s:.1f} s; measuring")
    return Result(
        checkpoint,
        wrapper,
        calibration,
        heldout,
        _layer_errors(wrapper.model, original.model, calibration.batches),
        _cost(wrapper.model, original.model, calibration),
        None if heldout is None else _cost(wrapper.model, original.model, heldout),
        calibrated_s,
    )


def load(checkpoint: Checkpoint, device: torch.device) -> Any:
    """qwen-asr's wrapper of a checkpoint in bfloat16, with fake quantization where its folder has it."""
    with quiet():
        mto.enable_huggingface_checkpointing()
        wrapper = build(checkpoint, torch.bfloat16)
    wrapper.model.to(device).eval()
    install_windowed_attention(wrapper.model.thinker.audio_tower)
    return wrapper


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[B, L, vocabulary], on the model's device."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    logits: Tensor = model.thinker(**inputs).logits
    return logits


def quantized_linears(model: nn.Module) -> dict[str, Any]:
    """Layers whose weights are quantized, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """ModelOpt prints what it does, and would on the lines of a progress."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _draw(config: SamplesConfig, options: Options) -> list[ExampleRef]:
    refs = read_examples(config.sources, options, config.languages, config.min_s, config.max_s)
    return draw(refs, config.samples_per_language, config.seed)


def _load_samples(refs: Sequence[ExampleRef], processor: Any, options: Options) -> Samples:
    loader = Loader(options)
    return Samples(list(refs), [collate([loader.load(ref)], processor, torch.bfloat16) for ref in refs])


def _check_layers(model: nn.Module, config: QuantizeConfig) -> None:
    """Raises ConfigError unless the configuration leaves layers to quantize that can be, and that somebody runs."""
    linears = {
        name: module.in_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not any(fnmatch(f"{name}.weight_quantizer", pattern) for pattern in config.exclude)
    }
    if not linears:
        raise ConfigError(f"exclude: {', '.join(config.exclude)} leaves no layer to quantize")
    tower = next((name for name in linears if "audio_tower" in name), None)
    if tower and config.format == "int4":
        raise ConfigError(
            f"exclude: {tower} would be quantized; int4 runs with the audio tower in 16 bit: add *audio_tower*"
        )
    for name, num_in in linears.items():
        if config.format != "fp8" and num_in % config.group_size:  # ModelOpt would pad, of which no reader knows
            raise ConfigError(
                f"group_size: {name} has {num_in} inputs, no multiple of {config.group_size}; take one that divides "
                "them, or exclude the layer"
            )


@torch.no_grad()
def _quantize(model: Any, config: QuantizeConfig, batches: Sequence[dict[str, Tensor]]) -> None:
    """In place."""
    numbers: dict[str, Any] = (
        {"num_bits": (4, 3), "axis": 0}
        if config.format == "fp8"
        else {"num_bits": _BITS[config.format], "block_sizes": {-1: config.group_size, "type": "static"}}
    )
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "parent_class": "nn.Linear", "cfg": numbers},
        *({"quantizer_name": pattern, "enable": False} for pattern in config.exclude),
    ]
    algorithm: Any = "max"
    if config.algorithm != "rtn":
        algorithm = {"method": config.algorithm, "alpha_step": config.alpha_step}
    if config.algorithm == "awq_full":
        algorithm["max_tokens_per_batch"] = max(1, config.clip_tokens // len(batches))

    def calibrate(model: Any) -> None:
        for batch in batches:
            logits_of(model, batch)

    with quiet():
        mtq.quantize(
            model, {"quant_cfg": rules, "algorithm": algorithm}, None if config.algorithm == "rtn" else calibrate
        )


def _layer_errors(model: Any, original: Any, batches: Sequence[dict[str, Tensor]]) -> list[Layer]:
    """Of every quantized layer on the inputs that it meets in the quantized model."""
    linears = quantized_linears(model)
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in linears}
    hooks = []
    for name, linear in linears.items():
        before = original.get_submodule(name)

        def add(_: Any, args: Any, output: Tensor, name: str = name, before: Any = before) -> None:
            expected = before(args[0]).float()
            off = (output.float() - expected).square().sum()
            sums[name] += torch.stack([off, expected.square().sum()]).to("cpu", torch.float64)

        hooks.append(linear.register_forward_hook(add))
    for batch in batches:
        logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    return [
        Layer(name, linear.out_features, linear.in_features, float((sums[name][0] / sums[name][1]).sqrt()))
        for name, linear in linears.items()
    ]


def _cost(model: Any, original: Any, samples: Samples) -> Cost:
    sums = torch.zeros(3, dtype=torch.float64)
    by_language: dict[str, list[float]] = {}
    num_tokens = 0
    for ref, batch in zip(samples.refs, samples.batches, strict=True):
        targets = batch["labels"][:, 1:]
        wanted = targets != NO_LOSS
        after, before = (
            logits_of(each, batch)[:, :-1][wanted.to(each.device)].float().log_softmax(-1) for each in (model, original)
        )
        chosen = targets[wanted].to(after.device)[:, None]
        kl = (before.exp() * (before - after)).sum()
        terms = torch.stack([kl, -before.gather(1, chosen).sum(), -after.gather(1, chosen).sum()])
        sums += terms.to("cpu", torch.float64)
        its = by_language.setdefault(ref.language, [0.0, 0])
        its[0], its[1] = its[0] + float(kl), its[1] + len(chosen)
        num_tokens += len(chosen)
    kl_by_language = {language: its[0] / its[1] for language, its in sorted(by_language.items())}
    kl, ce_before, ce_after = (sums / num_tokens).tolist()
    return Cost(kl, kl_by_language, ce_before, ce_after, num_tokens)
