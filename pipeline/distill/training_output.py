"""What every training leaves in its output folder:

OUT/shardscribe.yaml   the resolved configuration, and what it was run on; a run goes on only with the same
OUT/training.jsonl     losses of every so many steps, and held-out scores; OUT/tensorboard has the same
OUT/state              the newest two states, to go on from
OUT/best               what the best step so far gives
OUT/model              at the end, there whole or not at all: what it was for, and its card README.md
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from pipeline import redact, storage
from pipeline.config import ConfigError
from pipeline.distill import state as states
from pipeline.distill.config import TrainingConfig
from pipeline.distill.examples import ExampleRef
from pipeline.distill.log import entries
from pipeline.distill.loop import best_folder
from pipeline.output import changed_keys
from pipeline.storage import is_local

_NO_RESULT = frozenset(
    ("output", "log_every", "readers", "device", "ray.address", "ray.num_gpus", "ray.num_cpus", "ray.retries")
)
_VERSIONED = ("shardscribe", "torch", "transformers", "qwen-asr", "nvidia-modelopt", "ray")
_SPEECH = ("labels", "speech", "heldout")

Facts = dict[str, Any]
Fill = Callable[[Path, Path], Facts]


class TrainingOutput:
    """Raises ConfigError unless the configuration's output is a local folder."""

    def __init__(self, config: TrainingConfig) -> None:
        if not is_local(config.output):
            raise ConfigError(f"output: {config.output} is no local folder; write to one that all workers share")
        self._config = config
        self.folder = Path(config.output).expanduser().absolute()

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def claim(self, revisions: Mapping[str, str | None], refs: Sequence[ExampleRef]) -> None:
        """Writes down what is trained on what, or makes sure that the training which is there is this one; `revisions`
        are those of the models, by what they are called.

        Raises ConfigError when it is another, or when the folder holds something else.
        """
        document: Facts = {
            "revisions": dict(revisions),
            "examples": {"number": len(refs), "hash": _hash_of(refs)},
            "config": self._public(),
        }
        file = self.folder / "shardscribe.yaml"
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        if not file.exists() and self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"output: {self.folder} holds something that is no training; name a new folder")
        if storage.commit(str(file), text.encode(), {}):
            return
        there = yaml.safe_load(file.read_text(encoding="utf-8"))
        if "revisions" not in there or there["revisions"].keys() != document["revisions"].keys():
            raise ConfigError(f"output: {self.folder} is the output of another job; name a new folder")
        changed = list(changed_keys(there["config"], document["config"], _NO_RESULT))
        changed += [f"the weights of the {name}" for name in changed_keys(there["revisions"], document["revisions"])]
        changed += ["the examples"] * (there["examples"] != document["examples"])
        if changed:
            raise ConfigError(
                f"{self.folder} holds another training (changed: {', '.join(changed)}); write to a new output, or set "
                "that back to go on with this one"
            )

    def finish(self, refs: Sequence[ExampleRef], fill: Fill, card: Callable[[Facts], str]) -> Facts:
        """OUT/model from the best step: `fill` makes of what is in its first folder what belongs in its second, and
        says what only it knows. Returns all facts, which the card is made of."""
        state = states.newest(self.folder / "state")
        assert state is not None
        partial = self.folder / ".model.part"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        facts = fill(best_folder(self.folder, state.best_step), partial) | {
            "config": self._public(),
            "best_step": state.best_step,
            "examples": _by_language(refs),
            "heldout": [entry for entry in entries(self.folder / "training.jsonl") if entry["kind"] == "heldout"],
            "versions": {name: version(name) for name in _VERSIONED},
        }
        (partial / "training.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card(facts), encoding="utf-8")
        for weights in partial.rglob("*.safetensors"):  # which safetensors lets nobody else read
            weights.chmod((partial / "README.md").stat().st_mode)
        partial.rename(self.model)
        return facts

    def _public(self) -> dict[str, Any]:
        data = self._config.model_dump(mode="json", exclude={"storage"})
        for section in _SPEECH:
            if section in data:
                data[section]["sources"] = [redact.names(source) for source in data[section]["sources"]]
        return data


def absolute(config: Any, models: Sequence[str]) -> Any:
    """A configuration with whole paths, as workers of Ray Train are in another folder; `models` are keys that may name
    a local folder."""
    changed: dict[str, Any] = {"output": storage.resolve(config.output)}
    for key in models:
        model = getattr(config, key)
        if model is not None and (path := Path(model).expanduser()).exists():
            changed[key] = str(path.absolute())
    for key in _SPEECH:
        if section := getattr(config, key, None):
            changed[key] = section.model_copy(update={"sources": [storage.resolve(each) for each in section.sources]})
    return config.model_copy(update=changed)


def heldout_table(facts: Facts, losses: Mapping[str, str]) -> str:
    """Markdown: a row a step that was judged, with `losses` (titles by name) and error rates; the best in bold."""
    rates = sorted({name for entry in facts["heldout"] for name in entry if name.startswith("error_rate/")})
    there = {name: title for name, title in losses.items() if name in facts["heldout"][0]}
    rows = [["step", *there.values(), *(name.removeprefix("error_rate/") for name in rates)]]
    rows += [["---"] * len(rows[0])]
    rows += [
        [
            f"**{entry['step']:,}**" if entry["step"] == facts["best_step"] else f"{entry['step']:,}",
            *(f"{entry[name]:.4f}" for name in there),
            *(f"{100 * entry[name]:.2f} %" for name in rates),
        ]
        for entry in facts["heldout"]
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def speech_text(facts: Facts) -> str:
    return ", ".join(f"{name} {its['hours']:.2f} h" for name, its in facts["examples"].items())


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
