"""CUDA graphs: work of one shape, recorded once and replayed without the cost of its launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pipeline.engine.windowed import transformer

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Replay(Protocol[T_co]):
    """Does its work again on what its inputs hold now; the next time overwrites what it gives."""

    def __call__(self) -> T_co: ...


class Graph(Generic[T]):
    """Records `work`, which never waits for the device, on this thread's stream; other threads may go on meanwhile."""

    def __init__(self, work: Callable[[], T]) -> None:
        here = torch.cuda.current_stream()
        aside = torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # libraries make their plans before the capture
            work()
        here.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = work()

    def __call__(self) -> T:
        self._graph.replay()
        return self._output


class WindowGraphs:
    """The audio tower's transformer with a graph for each of few numbers of windows, as `encode` takes one."""

    STEP, MOST = 8, 128

    def __init__(self, record: Callable[[Callable[[], Tensor]], Replay[Tensor]] = Graph) -> None:
        self._record = record
        self._graphs: dict[int, tuple[Tensor, Tensor, Replay[Tensor]]] = {}  # windows -> x, mask, graph

    def __call__(self, tower: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        """See windowed.transformer; the number of windows is rounded up, those beyond `MOST` go without a graph."""
        num_windows = len(x)
        rounded = -(-num_windows // self.STEP) * self.STEP
        if rounded > self.MOST:
            return transformer(tower, x, mask)
        if rounded not in self._graphs:
            held = x.new_zeros(rounded, *x.shape[1:])
            seen = torch.ones(rounded, 1, 1, x.shape[1], dtype=torch.bool, device=x.device)
            self._graphs[rounded] = held, seen, self._record(lambda: transformer(tower, held, seen))
        held, seen, replay = self._graphs[rounded]
        held[:num_windows] = x  # what is left of a batch before stays behind it: finite, and seen by nobody
        seen[:num_windows] = True if mask is None else mask
        return replay()[:num_windows].clone()
