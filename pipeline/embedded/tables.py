"""The table of what quantizing the embedded student costs and what distillation wins back, on the held-out sets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.audio import decode
from pipeline.config import InputConfig
from pipeline.distill.audio import Example
from pipeline.distill.collate import NO_LOSS, collate
from pipeline.distill.examples import ExampleRef
from pipeline.distill.forward import Listener
from pipeline.distill.quantize import load
from pipeline.embedded.evaluation import HELDOUT_FOLDER, transcribe
from pipeline.engine.checkpoint import resolve
from pipeline.engine.quantized import read
from pipeline.evaluate.stats import Interval, bootstrap, spread
from pipeline.languages import language_name
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.sources.plan import plan, samples

TEACHER, STUDENT = "embedded/teacher", "embedded/student"
SETS = {
    "english": "English WER",
    "vietnamese": "Vietnamese WER",
    "chinese": "Chinese CER",
    "digits": "human digits WER",
}
_CPU = torch.device("cpu")
_BATCH = 16


@dataclass(frozen=True, slots=True)
class System:
    """A model of the table: `kind` is "teacher", "student", "rtn", "awq" or "qad", `bits` of its decoder's weights;
    `folder` what holds its fake quantization and, of 4 bits, its packed form."""

    name: str
    kind: str
    bits: int
    seed: int | None
    folder: Path | None

    @property
    def engine(self) -> dict[str, Any]:
        if self.folder is None:
            return {"model": TEACHER if self.kind == "teacher" else STUDENT}
        if self.bits == 4:  # in the kernels that run it
            return {"model": str(self.folder / "packed"), "quantization": "int4"}
        return {"model": str(self.folder / "fake-quant"), "quantization": "fake_quant"}


@dataclass(frozen=True, slots=True)
class Measured:
    """By set, an entry a recording: errors and reference words (characters), and sums over the `tokens` of the
    teacher-forced reference: cross-entropy `ce`, KL divergence from the student in 16 bit `kl` and from the teacher
    `kl_teacher`. `decoder_bytes`: the linear layers of the text model."""

    errors: dict[str, list[int]]
    words: dict[str, list[int]]
    tokens: dict[str, list[int]]
    ce: dict[str, list[float]]
    kl: dict[str, list[float]]
    kl_teacher: dict[str, list[float]]
    decoder_bytes: int


class Bench:
    """Measures systems on the held-out sets in `folder`; the teacher's and the student's log-probabilities are kept."""

    def __init__(self, folder: Path = HELDOUT_FOLDER) -> None:
        self._folder = folder
        self._sets = {name: _batches(folder / f"{name}.tar") for name in SETS}
        self._student, self._teacher = (self._logprobs(load(resolve(name), _CPU)) for name in (STUDENT, TEACHER))

    def measure(self, system: System) -> Measured:
        errors: dict[str, list[int]] = {name: [] for name in SETS}
        words: dict[str, list[int]] = {name: [] for name in SETS}
        for answer in transcribe(system.engine, self._folder):
            if answer.set_name in SETS:
                errors[answer.set_name].append(answer.counts.num_errors)
                words[answer.set_name].append(answer.counts.num_reference)
        if system.folder is None:
            checkpoint = resolve(system.engine["model"])
        else:
            checkpoint = resolve(str(system.folder / "fake-quant"), quantization="fake_quant")
        wrapper = load(checkpoint, _CPU)
        found = self._logprobs(wrapper)
        tokens, ce, kl, kl_teacher = ({name: [] for name in SETS} for _ in range(4))  # type: ignore[var-annotated]
        for name, batches in self._sets.items():
            for i, batch in enumerate(batches):
                mine, student, teacher = (each[name][i] for each in (found, self._student, self._teacher))
                tokens[name] += batch.sizes
                ce[name] += _sums(-mine.gather(1, batch.targets[:, None])[:, 0], batch.sizes)
                kl[name] += _sums((student.exp() * (student - mine)).sum(-1), batch.sizes)
                kl_teacher[name] += _sums((teacher.exp() * (teacher - mine)).sum(-1), batch.sizes)
        return Measured(errors, words, tokens, ce, kl, kl_teacher, _decoder_bytes(system, wrapper))

    def _logprobs(self, wrapper: Any) -> dict[str, list[Tensor]]:
        """By set, of every batch: float32 [N, vocabulary]."""
        listener = Listener(wrapper.model.thinker)
        with torch.no_grad():
            return {
                name: [listener(batch.tensors).float().log_softmax(-1) for batch in batches]
                for name, batches in self._sets.items()
            }


@dataclass(frozen=True, slots=True)
class _Batch:
    tensors: dict[str, Tensor]
    targets: Tensor
    sizes: list[int]  # tokens of each recording


def _batches(shard: Path) -> list[_Batch]:
    (split,) = plan([InputConfig(path=str(shard))], {}, 1e9)
    examples = []
    for sample in samples(split, {}):
        assert sample.open is not None and sample.text_ref is not None and sample.language is not None
        with sample.open() as file:
            pcm = np.concatenate([block[:, 0] for block in decode(file)])
        duration_s = len(pcm) / SAMPLE_RATE_HZ
        language = language_name(sample.language)
        ref = ExampleRef(
            sample.recording_id, sample.audio_filepath, 0.0, duration_s, sample.text_ref, language, sample.recording_id
        )
        examples.append(Example(ref, pcm))
    examples.sort(key=lambda example: example.ref.duration_s)
    processor, made = load(resolve(STUDENT), _CPU).processor, []
    for i in range(0, len(examples), _BATCH):
        tensors = collate(examples[i : i + _BATCH], processor, torch.bfloat16)
        wanted = tensors["labels"][:, 1:] != NO_LOSS
        made.append(_Batch(tensors, tensors["labels"][:, 1:][wanted], wanted.sum(1).tolist()))
    return made


def _sums(values: Tensor, sizes: Sequence[int]) -> list[float]:
    return [float(part.sum()) for part in values.split(list(sizes))]


def _decoder_bytes(system: System, wrapper: Any) -> int:
    """Of 3 and 2 bits what their integers and 16-bit scales would take: there is no packed form of them."""
    if system.bits == 4 and system.folder is not None:
        return sum(weight.num_bytes for weight in read(system.folder / "packed").linears.values())
    layers = wrapper.model.thinker.model.layers
    linears: list[Any] = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    num_weights: int = sum(module.weight.numel() for module in linears)
    if system.folder is None:
        return 2 * num_weights
    num_scales: int = sum(module.weight_quantizer.amax.numel() for module in linears)
    return num_weights * system.bits // 8 + 2 * num_scales


def read_or_measure(system: System, folder: Path, bench: Bench | None) -> tuple[Measured, Bench | None]:
    """From `folder` where it is there; else by `bench`, which is made when it is first needed."""
    file = folder / f"{system.name}.json"
    if file.exists():
        return Measured(**json.loads(file.read_text())), bench
    bench = bench or Bench()
    found = bench.measure(system)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(found)))
    return found, bench


def to_markdown(measured: dict[str, tuple[System, Measured]]) -> str:
    """The table, then what distillation wins back, with 95 % intervals from a bootstrap over recordings."""
    groups: dict[tuple[str, int], list[Measured]] = {}
    for system, its in measured.values():
        groups.setdefault((system.kind, system.bits), []).append(its)
    head = ["model", *SETS.values(), "cross-entropy", "KL to the student", "KL to the teacher", "decoder bytes"]
    rows = [[_title(*group), *_cells(its)] for group, its in groups.items()]
    lines = ["\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])]
    student = groups["student", 16]
    for bits in sorted({bits for kind, bits in groups if kind == "qad"}, reverse=True):
        lines.append(_won_back(bits, student * len(groups["awq", bits]), groups["awq", bits], groups["qad", bits]))
    return "\n\n".join(lines) + "\n"


def _title(kind: str, bits: int) -> str:
    names = {"rtn": "RTN", "awq": "AWQ", "qad": "AWQ + QAD"}
    return kind if kind == "teacher" else "student bf16" if kind == "student" else f"student INT{bits} {names[kind]}"


def _cells(seeds: list[Measured]) -> list[str]:
    cells = [_text([100 * sum(m.errors[name]) / sum(m.words[name]) for m in seeds], "{:.2f}", " %") for name in SETS]
    cells.append(_text([_mean(m.ce, m.tokens) for m in seeds], "{:.4f}"))
    cells += [_text([_mean(of, m.tokens) for m in seeds for of in [getattr(m, key)]], "{:.5f}")
              for key in ("kl", "kl_teacher")]  # fmt: skip
    return [*cells, f"{seeds[0].decoder_bytes:,}"]


def _text(values: Sequence[float], form: str, unit: str = "") -> str:
    mean, deviation = spread(values)
    return form.format(mean) + (f" ± {form.format(deviation)}" if len(values) > 1 else "") + unit


def _mean(sums: dict[str, list[float]], tokens: dict[str, list[int]]) -> float:
    return sum(sum(sums[name]) for name in SETS) / sum(sum(tokens[name]) for name in SETS)


def _won_back(bits: int, student: list[Measured], awq: list[Measured], qad: list[Measured]) -> str:
    """Lost: AWQ less the student; won back: AWQ less QAD; of the seeds together, a recording drawn with all of them."""
    head = ["set", "measure", "lost by AWQ", "won back by QAD", "share", "over half at 95 %"]
    rows = []
    for name in SETS:
        for title, key, weights, unit, form in (
            ("errors", "errors", "words", 100.0, "{:+.2f} %"),
            ("cross-entropy", "ce", "tokens", 1.0, "{:+.4f}"),
            ("KL to the student", "kl", "tokens", 1.0, "{:+.5f}"),
            ("KL to the teacher", "kl_teacher", "tokens", 1.0, "{:+.5f}"),
        ):
            sums = [np.array([getattr(m, key)[name] for m in each], float).sum(0) for each in (student, awq, qad)]
            weight = np.array([getattr(m, weights)[name] for m in student], float).sum(0)
            lost, won = sums[1] - sums[0], sums[1] - sums[2]
            share = won.sum() / lost.sum() if lost.sum() > 0 else float("nan")
            margin = bootstrap(won - lost / 2, weight)
            rows.append([
                SETS[name], title, _with_interval(lost, weight, unit, form), _with_interval(won, weight, unit, form),
                f"{100 * share:.0f} %" if np.isfinite(share) else "nothing lost",
                "yes" if margin is not None and margin[0] > 0 else "no",
            ])  # fmt: skip
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
    return f"INT{bits}, {len(awq)} seeds:\n\n{table}"


def _with_interval(sums: np.ndarray, weight: np.ndarray, unit: float, form: str) -> str:
    interval: Interval | None = bootstrap(sums, weight)
    value = form.format(unit * sums.sum() / weight.sum())
    if interval is None:
        return value
    low, high = (form.format(unit * bound).replace(" %", "") for bound in interval)
    return f"{value} ({low} to {high})"
