"""A causal tower's weights: one flat safetensors file that stands in for the audio tower of a base model.

Names are those of the tower alone (`conv2d1.weight`, `layers.0.fc1.bias`, ...), as `qfuxa/qwen3-asr-0.6b-streaming`
publishes them and qwen3_asr_causal 0.1.0 loads them (causal.py: `load_tower_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.engine.causal.tower_file import KEY, find_tower
from pipeline.engine.checkpoint import CheckpointError, content_hash
from pipeline.languages import NAMES, language_name

_PREFIX = "thinker.audio_tower."
_PUBLISHED = {"qfuxa/qwen3-asr-0.6b-streaming": "English"}  # by their model cards; the files do not say


@dataclass(frozen=True, slots=True)
class TowerFile:
    """`revision` is the commit of a Hub snapshot, else a hash of what is there; `notes` are what its maker wrote beside
    the weights; `languages` those that it was trained on, None where nobody says."""

    path: Path
    revision: str
    notes: Mapping[str, str]
    languages: frozenset[str] | None


def load_tower(reference: str, tower: nn.Module, base: str, revision: str | None = None) -> TowerFile:
    """Loads the tower that `reference` names (a file, a folder with one, a Hub id) over that of the model `base`.

    Raises CheckpointError unless it has exactly the base's weights, by name and shape.
    """
    path, commit = find_tower(reference, revision)
    try:
        with safe_open(path, framework="pt") as file:
            notes, names = dict(file.metadata() or {}), file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or cut short ({error}). Download it again") from error
    _require_fit(path, tensors, tower, base)
    tower.load_state_dict(tensors)
    named = notes.get("languages") or _PUBLISHED.get(reference, "")
    languages = frozenset(map(language_name, named.split(","))) & set(NAMES)
    return TowerFile(path, commit or content_hash(path.parent), notes, languages or None)


def save_tower(tower: nn.Module, path: Path, notes: Mapping[str, str]) -> None:
    """Writes the tower in the published layout, with `notes` beside the weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tower.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"} | dict(notes))


def _require_fit(path: Path, tensors: Mapping[str, Tensor], tower: nn.Module, base: str) -> None:
    own = tower.state_dict()
    if any(name.startswith(_PREFIX) for name in tensors):
        raise CheckpointError(f"{path} is a whole Qwen3-ASR checkpoint: it goes under engine.model, not {KEY}")
    misfits = [
        f"{name} is {list(tensors[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    missing, strange = [name for name in own if name not in tensors], sorted(set(tensors) - set(own))
    if not misfits and not missing and not strange:
        return
    sides = (misfits[:1], len(misfits), "of another shape"), (missing[:1], len(missing), "missing")
    parts = [f"{count} tensors {what} (such as {first[0]})" for first, count, what in sides if count]
    parts += [f"{len(strange)} that it does not know (such as {strange[0]})"] if strange else []
    raise CheckpointError(f"{path} is no tower of {base}: {', '.join(parts)}. Take the tower trained from this model")
