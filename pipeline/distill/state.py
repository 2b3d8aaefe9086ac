"""The state of a training in OUT/state: one file a step, there whole or not at all; the newest two stay."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

_KEPT = 2


@dataclass(slots=True)
class State:
    """After `step` steps: weights that learn and their optimizer's, by name; the best step so far and how far it
    errs."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    best_step: int
    best_score: tuple[float, float]


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights that learn and the optimizer's state, whole and on the CPU; all workers have to ask together. On all but
    the first they may be empty."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    learning = {name.removeprefix("module.") for name, each in model.named_parameters() if each.requires_grad}
    return {name: cast(Tensor, tensor) for name, tensor in weights.items() if name in learning}, state


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_state_dict(
        model, optimizer, model_state_dict=dict(state.weights), optim_state_dict=state.optimizer, options=options
    )


def save(folder: Path, state: State) -> None:
    """The newest two stay."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".step-{state.step:08d}.part"
    torch.save(asdict(state), partial)
    partial.rename(folder / f"step-{state.step:08d}.pt")
    for old in _files(folder)[:-_KEPT]:
        old.unlink()


def newest_file(folder: Path) -> Path | None:
    return max(_files(folder), default=None)


def newest(folder: Path) -> State | None:
    file = newest_file(folder)
    return State(**torch.load(file, map_location="cpu", weights_only=True)) if file else None


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))
