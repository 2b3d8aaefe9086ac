"""Batches for training, in an order that follows from the seed alone, read ahead by threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.distill.audio import Loader
from pipeline.distill.collate import NO_LOSS, collate
from pipeline.distill.config import TrainingConfig
from pipeline.distill.examples import ExampleRef
from pipeline.distill.loss import Likeliest
from pipeline.distill.sampling import batches
from pipeline.distill.stored import StoredTeacher
from pipeline.storage import Options

B = TypeVar("B")
MakeBatch = Callable[[int, Sequence[ExampleRef]], B]


@dataclass(frozen=True, slots=True)
class Batch:
    """`tensors` as `collate` gives them, on the CPU; `targets` int64 [N] the tokens that the model is asked for;
    `likeliest` what was stored of their teacher, in that order, where there is no live one."""

    refs: Sequence[ExampleRef]
    tensors: dict[str, Tensor]
    targets: Tensor
    likeliest: Likeliest | None


class Reader:
    """Makes batches of examples; one a thread, as it keeps open what it reads."""

    def __init__(self, processor: Any, dtype: torch.dtype, with_stored: bool, options: Options) -> None:
        self._processor, self._dtype = processor, dtype
        self._loader = Loader(options)
        self._stored = StoredTeacher(options) if with_stored else None

    def __call__(self, number: int, refs: Sequence[ExampleRef]) -> Batch:
        """Raises StorageError and ConfigError that name the example which cannot be had."""
        tensors = collate([self._loader.load(ref) for ref in refs], self._processor, self._dtype, as_written=True)
        labels = tensors["labels"][:, 1:]
        stored = None if self._stored is None else _joined([self._stored.likeliest(ref) for ref in refs])
        return Batch(refs, tensors, labels[labels != NO_LOSS], stored)


def _joined(parts: Sequence[Likeliest]) -> Likeliest:
    """With as many tokens a place as all have."""
    num_top = min(part.ids.shape[1] for part in parts)
    ids, logprobs = (
        torch.cat([tensor[:, :num_top] for tensor in each])
        for each in zip(*((part.ids, part.logprobs) for part in parts), strict=True)
    )
    return Likeliest(ids, logprobs)


def feed(
    refs: Sequence[ExampleRef], config: TrainingConfig, make_reader: Callable[[], MakeBatch[B]], rank: int, skip: int
) -> Generator[B]:
    """The batches of worker `rank` without end, epoch after epoch, from the one after `skip` on. Every thread has a
    reader of its own, which makes a batch of its number (from 0) and its examples."""
    local = threading.local()

    def read(number: int, drawn: Sequence[ExampleRef]) -> B:
        if not hasattr(local, "reader"):
            local.reader = make_reader()
        made: B = local.reader(number, drawn)
        return made

    drawn = islice(enumerate(_without_end(refs, config, rank)), skip, None)
    pool = ThreadPoolExecutor(config.readers, thread_name_prefix="reader")
    ahead: deque[Future[B]] = deque(pool.submit(read, *each) for each in islice(drawn, 2 * config.readers))
    try:
        while True:
            batch = ahead.popleft().result()
            ahead.append(pool.submit(read, *next(drawn)))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _without_end(refs: Sequence[ExampleRef], config: TrainingConfig, rank: int) -> Iterator[list[ExampleRef]]:
    for epoch in count():
        yield from batches(refs, config.batch_audio_s, config.seed, epoch, rank, config.ray.workers, config.balance)
