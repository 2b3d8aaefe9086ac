"""What `shardscribe distill` leaves in its output folder:

OUT/shardscribe.yaml   the resolved configuration, and what it was run on; a run goes on only with the same
OUT/training.jsonl     losses of every so many steps, and held-out scores; OUT/tensorboard has the same
OUT/state              the newest two states, to go on from
OUT/best               the student of the best step so far, as fake-quant below
OUT/model              at the end, there whole or not at all: fake-quant, and for INT4 export and packed, as
                       `shardscribe quantize` writes them; the card README.md, and distill.json with its figures
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline import redact, storage
from pipeline.config import ConfigError
from pipeline.distill import state as states
from pipeline.distill.config import DistillConfig
from pipeline.distill.examples import ExampleRef
from pipeline.distill.log import entries
from pipeline.distill.loop import best_folder
from pipeline.distill.quantize import load
from pipeline.distill.quantized_output import make_readable, write_other_forms
from pipeline.engine.checkpoint import Checkpoint, resolve
from pipeline.engine.fake_quant import read_fake_quant
from pipeline.output import changed_keys
from pipeline.storage import is_local

_NO_RESULT = frozenset({"output", "log_every", "readers", "device", "ray.address", "ray.num_gpus", "ray.num_cpus"}) | {
    "ray.retries"
}
_VERSIONED = ("shardscribe", "torch", "transformers", "qwen-asr", "nvidia-modelopt", "ray")


class DistilledOutput:
    """Raises ConfigError unless the configuration's output is a local folder."""

    def __init__(self, config: DistillConfig) -> None:
        if not is_local(config.output):
            raise ConfigError(f"output: {config.output} is no local folder; write to one that all workers share")
        self._config = config
        self.folder = Path(config.output).expanduser().absolute()

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def claim(self, student: Checkpoint, teacher: Checkpoint | None, refs: Sequence[ExampleRef]) -> None:
        """Writes down what is trained on what, or makes sure that the training which is there is this one.

        Raises ConfigError when it is another, or when the folder holds something else.
        """
        document = {
            "student_revision": student.revision,
            "teacher_revision": None if teacher is None else teacher.revision,
            "labels": {"num_examples": len(refs), "hash": _hash_of(refs)},
            "config": self._public(),
        }
        file = self.folder / "shardscribe.yaml"
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        if not file.exists() and self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"output: {self.folder} holds something that is no training; name a new folder")
        if storage.commit(str(file), text.encode(), {}):
            return
        there = yaml.safe_load(file.read_text(encoding="utf-8"))
        if "student_revision" not in there:
            raise ConfigError(f"output: {self.folder} is the output of another job; name a new folder")
        changed = list(changed_keys(there["config"], document["config"], _NO_RESULT))
        for key, what in (
            ("student_revision", "the weights of the student"),
            ("teacher_revision", "the weights of the teacher"),
            ("labels", "the labels"),
        ):
            if there[key] != document[key]:
                changed.append(what)
        if changed:
            raise ConfigError(
                f"{self.folder} holds another training (changed: {', '.join(changed)}); write to a new output, or set "
                "that back to go on with this one"
            )

    def _public(self) -> dict[str, Any]:
        data = self._config.model_dump(mode="json", exclude={"storage"})
        for section in ("labels", "heldout"):
            data[section]["sources"] = [redact.names(source) for source in data[section]["sources"]]
        return data

    def finish(self, student: Checkpoint, teacher: Checkpoint | None, refs: Sequence[ExampleRef]) -> dict[str, Any]:
        """OUT/model from the best step, and the facts of its card."""
        state = states.newest(self.folder / "state")
        assert state is not None
        partial = self.folder / ".model.part"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        fake = partial / "fake-quant"
        shutil.copytree(best_folder(self.folder, state.best_step), fake)
        numbers = read_fake_quant(fake).numbers
        wrapper = load(resolve(str(fake), quantization="fake_quant"), torch.device("cpu"))
        write_other_forms(wrapper.model, student.path, partial, numbers == "int4")
        log = entries(self.folder / "training.jsonl")
        facts = {
            "student": redact.names(student.model_id),
            "student_revision": student.revision,
            "teacher": _teachers(self._config, teacher, refs),
            "numbers": numbers,
            "config": self._public(),
            "best_step": state.best_step,
            "labels": _by_language(refs),
            "heldout": [entry for entry in log if entry["kind"] == "heldout"],
            "versions": {name: version(name) for name in _VERSIONED},
        }
        (partial / "distill.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card(facts), encoding="utf-8")
        make_readable(partial)
        partial.rename(self.model)
        return facts


def card(facts: dict[str, Any]) -> str:
    """Markdown, from what distill.json holds."""
    config = facts["config"]
    loss = f"{config['alpha_kd']:g} KL + {1 - config['alpha_kd']:g} cross-entropy"
    learned = ", ".join(f"`{name}`" for name in config["trainable"])
    live = "live" if config["teacher"] else "as stored"
    labels = ", ".join(f"{name} {its['hours']:.2f} h" for name, its in facts["labels"].items())
    runs = (
        "`engine: {model: .../packed, quantization: int4}` runs it; `fake-quant` and `export` run the same way."
        if facts["numbers"] == "int4"
        else "`engine: {model: .../fake-quant, quantization: fake_quant}` runs it at full size."
    )
    languages = sorted({name for entry in facts["heldout"] for name in entry if name.startswith("error_rate/")})
    head = ["step", "cross-entropy", "KL", *(name.removeprefix("error_rate/") for name in languages)]
    rows = [
        [
            f"**{entry['step']}**" if entry["step"] == facts["best_step"] else str(entry["step"]),
            f"{entry['ce']:.4f}",
            f"{entry['kl']:.5f}" if "kl" in entry else "",
            *(f"{100 * entry[name]:.2f} %" for name in languages),
        ]
        for entry in facts["heldout"]
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
    return f"""# {facts["student"]}, distilled through its {facts["numbers"]} weights

Quantization-aware distillation from {facts["teacher"]} ({live}): {config["steps"]} steps of {config["accumulate"]} x
{config["ray"]["workers"]} batches of {config["batch_audio_s"]:g} s, {loss} at temperature {config["temperature"]:g},
AdamW at {config["learning_rate"]:g} with a cosine, seed {config["seed"]}. Learned: {learned}; scales and all else stood
still. {runs}

Labels: {labels}.

## Held-out speech

Teacher-forced cross-entropy of its texts and KL from the teacher, in nats a token; errors (WER, CER where a language
has no spaces) as the engine decodes it. In bold: the step that this is, chosen by errors.

{table}
"""


def _teachers(config: DistillConfig, teacher: Checkpoint | None, refs: Sequence[ExampleRef]) -> str:
    if teacher is not None:
        return f"`{redact.names(teacher.model_id)}`"
    return ", ".join(sorted({f"`{ref.teacher}`" for ref in refs}))


def _by_language(refs: Sequence[ExampleRef]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for ref in refs:
        its = found.setdefault(ref.language, {"num_examples": 0, "hours": 0.0})
        its["num_examples"] += 1
        its["hours"] += ref.duration_s / 3600
    return {name: {**its, "hours": round(its["hours"], 4)} for name, its in sorted(found.items())}


def _hash_of(refs: Sequence[ExampleRef]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for ref in refs:
        digest.update(f"{ref.example_id}\0{ref.text}\0{ref.duration_s}\n".encode())
    return digest.hexdigest()
