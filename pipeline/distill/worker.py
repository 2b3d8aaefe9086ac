"""One of the processes that train together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what is kept."""


@dataclass(frozen=True, slots=True)
class Worker:
    """Number `rank` of `world` on `device`; torch.distributed is up where there are several."""

    rank: int
    world: int
    device: torch.device

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all workers."""
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(sums)
        found: list[float] = sums.tolist()
        return found

    def all_of(self, names: Sequence[str]) -> list[str]:
        """Those of all workers."""
        gathered: list[Any] = [names]
        if self.world > 1:
            gathered = [None] * self.world
            dist.all_gather_object(gathered, list(names))
        return [name for each in gathered for name in each]
