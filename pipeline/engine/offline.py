"""The engine for bulk archives: encoder batches without padding to the longest clip, and a decoder of slots that are
filled again as soon as a row ends.

Two threads of its own: an EncoderLane, and this one, which takes what is ready to a slot, prefills it there, then moves
all slots on by a token a step, and gives out results.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch

from pipeline.attempts import Watchdog
from pipeline.config import EngineConfig
from pipeline.engine.base import Batch, EngineError, EngineFailure, Observer, Result
from pipeline.engine.decoder import Choice, Fetch, SlotDecoder
from pipeline.engine.encoding import EncoderLane, smaller
from pipeline.engine.inbox import SEGMENT_ERRORS, Inbox, is_out_of_memory
from pipeline.engine.loops import LoopFinder
from pipeline.engine.model import MIN_SAMPLES, LoadedModel, load_model
from pipeline.engine.rows import Prompts, Row, fits
from pipeline.schema import Hypothesis, Segment

_REFILL_SHARE = 16  # a sixteenth of the slots free is worth a prefill
_FULL_SHARE = 7, 8  # of the slots taken are enough for a step while more rows are to come
_TURNS_PER_LOOK = 8  # between two looks for what was cancelled
_CLOSE_UP_FROM = 16  # slots


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Tokens on their way, of `rows` and their slots: after a prefill in the order of `rows`, after a step by slot."""

    fetch: Fetch
    rows: list[tuple[int, Row]]
    begin: bool


@dataclass(slots=True)
class Counts:
    """What the engine has done: decode steps, slots in them and those whose token was used; seconds at each kind of
    work and without any."""

    steps: int = 0
    row_steps: int = 0
    useful_row_steps: int = 0
    encode_s: float = 0.0
    prefill_ahead_s: float = 0.0  # the encoder's thread
    prefill_s: float = 0.0
    decode_s: float = 0.0
    idle_s: float = 0.0


class OfflineEngine:
    """Greedy decoding with qwen-asr's weights; see the module's text.

    Raises CheckpointError when the model is not one to run, ValueError for a language it does not know.
    """

    def __init__(
        self, config: EngineConfig, observe: Observer | None = None, loaded: LoadedModel | None = None
    ) -> None:
        """`loaded` stands for what the configuration names, as benchmarks want it."""
        self._config = config
        self._observe: Observer | None = None
        self._loaded = loaded or load_model(config)
        self.info = self._loaded.info
        thinker: Any = self._loaded.model.thinker
        self._thinker = thinker
        self._eos = frozenset(self._loaded.eos_token_ids)
        self._budget = self._positions_that_fit()
        self._decoder = SlotDecoder(thinker, 1, 64, self._loaded.int4, config.top_logprobs)
        self._loops = LoopFinder(1)
        self._lag = int(self._loaded.device.type == "cuda")  # steps that run before the host reads the first's tokens
        self.counts = Counts()
        self._watchdog = Watchdog(config.stall_timeout_s)
        self._threads = torch.get_num_threads()

        self._slots: list[Row | None] = [None]
        self._unread: deque[_Chosen] = deque()
        self._reported_at, self._reported_idle_s = time.monotonic(), 0.0
        self._num_turns = 0
        self._inbox = Inbox(Row)
        self._prompts = Prompts(self._loaded)
        self._lane = EncoderLane(
            self._loaded, config, self._inbox, lambda: max(1, len(self._slots) // 2), self._prefill_ahead
        )
        self._ready = self._lane.ready
        self._thread = threading.Thread(target=self._loop, name="asr-decoder", daemon=True)
        self._thread.start()
        (warm,) = self.submit([Segment("warm-up", np.zeros(MIN_SAMPLES, np.int16))]).result()
        if isinstance(warm, EngineFailure):  # a model that cannot run here must not become a failure of every segment
            raise EngineError(f"the model cannot run here: {warm}")
        self.counts, self._reported_idle_s = Counts(), 0.0
        self._lane.encode_s = self._lane.prefill_s = 0.0
        self._observe = observe  # who need not hear of that

    def submit(self, segments: Sequence[Segment]) -> Future[list[Result]]:
        """See AsrEngine. A cancelled future frees what its segments hold."""
        return self._inbox.submit(segments)

    def close(self) -> None:
        self._inbox.close()
        self._thread.join()

    # the thread

    def _loop(self) -> None:
        try:
            while self._wait():
                with self._watchdog.watch("a turn of the decoder"), self._lane.core:
                    self._turn()
        except BaseException as error:  # the end of the thread: those who wait for a result must hear of it
            self._inbox.fail(error, [*self._lane.rows, *(row for row in self._slots if row is not None)])
        self._lane.end()
        self.counts.encode_s, self.counts.prefill_ahead_s = self._lane.encode_s, self._lane.prefill_s

    def _wait(self) -> bool:
        """Until there is something to do. False when closed and drained.

        A step of many free slots costs as much as one of few: it waits for the encoder, which is the slower one then.
        """
        active = sum(row is not None for row in self._slots)
        is_full = active * _FULL_SHARE[1] >= len(self._slots) * _FULL_SHARE[0]
        inbox, lane = self._inbox, self._lane
        if not (self._ready or is_full or (active and not lane.has_more)):
            self._read_up_to(0)
            starves, began = not lane.has_more, time.monotonic()
            with inbox.changed:
                lane.is_waited_for = True
                inbox.changed.wait_for(
                    lambda: self._ready or lane.error or (not lane.has_more and (active or inbox.is_closed))
                )
                lane.is_waited_for = False
            if starves:
                self.counts.idle_s += time.monotonic() - began
        if lane.error is not None:
            raise lane.error
        return bool(self._ready or any(self._slots))

    def _turn(self) -> None:
        """A prefill where there is room, and a decode step."""
        self._num_turns += 1
        if self._num_turns % _TURNS_PER_LOOK == 0:
            self._drop_cancelled()
        self._share_threads()
        with self._inbox.changed:
            first = self._ready[0] if self._ready else None
        if first is not None:
            self._refill(first)
        if any(self._slots):
            self._step()
        else:
            self._read_up_to(0)

    def _share_threads(self) -> None:
        """On a CPU, of the engine's threads those that the encoder leaves."""
        threads = max(1, self._threads - self._lane.threads) if self._lane.is_busy else self._threads
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _refill(self, first: Row) -> None:
        """Prefills free slots from `_ready`, of which `first` is the next, once there are enough of them."""
        active = [row for row in self._slots if row is not None]
        if active and (first.alone or any(row.alone for row in active)):
            return  # until it is by itself
        self._make_room(first)
        free = [slot for slot, row in enumerate(self._slots) if row is None]
        batch = self._take_ready(len(free))
        if not batch:
            return
        began = time.monotonic()
        try:
            choice = self._prefill(free[: len(batch)], batch)
        except torch.AcceleratorError:
            raise
        except SEGMENT_ERRORS as error:
            self._start_over(batch, error)
            return
        for slot, row in zip(free, batch, strict=False):
            self._slots[slot] = row
            row.embeddings, row.ahead = None, None
        self._unread.append(_Chosen(Fetch(choice), list(zip(free, batch, strict=False)), begin=True))
        self._read_up_to(self._lag)
        self.counts.prefill_s += time.monotonic() - began
        self._report(batch)

    def _take_ready(self, num_free: int) -> list[Row]:
        """The next rows for so many free slots, all of them prefilled ahead or none; not yet any where too few slots
        are free."""
        ready, batch = self._ready, list[Row]()
        with self._inbox.changed:
            if num_free < min(len(ready), max(1, len(self._slots) // _REFILL_SHARE)):
                return []
            while ready and len(batch) < num_free and ready[0].expected_length <= self._decoder.width:
                if batch and (ready[0].ahead is None) != (batch[0].ahead is None):
                    break
                if not fits(batch, ready[0], self._config.prefill_tokens):
                    break
                batch.append(ready.popleft())
            self._inbox.changed.notify_all()  # the encoder may go on
        return batch

    def _make_room(self, row: Row) -> None:
        """Another shape of the cache when `row` needs a wider one, or when all rows left would have more slots in a
        narrower one."""
        need = row.expected_length
        active = any(each is not None for each in self._slots)
        if need > self._decoder.width or (not active and self._slots_at(need) > len(self._slots)):
            self._reshape(need)

    def _slots_at(self, width: int) -> int:
        width = -(-width // 64) * 64
        return max(1, min(self._config.slots, self._budget // width))

    def _reshape(self, width: int) -> None:
        """Slots of `width` positions, as many as fit; rows that do not fit any more start over."""
        num_slots = self._slots_at(width)
        active = [slot for slot, row in enumerate(self._slots) if row is not None]
        self._read_up_to(0)
        active = [slot for slot in active if self._slots[slot] is not None]
        keep, leave = active[:num_slots], active[num_slots:]
        self._lane.again([row for slot in leave if (row := self._slots[slot]) is not None])
        rows = [self._slots[slot] for slot in keep]
        self._decoder.resize(num_slots, width, keep)
        loops = LoopFinder(num_slots)
        loops.move(np.array(keep, np.int64), np.arange(len(keep)), self._loops)
        self._loops = loops
        self._slots = rows + [None] * (num_slots - len(rows))

    def _prefill(self, slots: list[int], rows: list[Row]) -> Choice:
        if rows[0].ahead is not None:
            return self._decoder.place(slots, [row.ahead for row in rows if row.ahead is not None])
        return self._decoder.prefill(slots, self._prompts.embeddings(rows), [row.num_positions for row in rows])

    def _prefill_ahead(self, rows: Sequence[Row]) -> None:
        """On the encoder's thread."""
        embeddings = self._prompts.embeddings(rows)
        prefilled = self._decoder.prefill_ahead(embeddings, [row.num_positions for row in rows])
        for row, each in zip(rows, prefilled, strict=True):
            row.ahead = each

    def _step(self) -> None:
        length = max(row.length for row in self._slots if row is not None) + len(self._unread)
        if length > self._decoder.width:
            self._reshape(length + length // 4)
            return
        if not self._ready and not self._lane.has_more:
            self._close_up()
        last = max(slot for slot, row in enumerate(self._slots) if row is not None)
        num_rows = self._decoder.num_rows_for(last + 1)
        began = time.monotonic()
        try:
            choice = self._decoder.step(num_rows, length)
        except torch.AcceleratorError:
            raise
        except SEGMENT_ERRORS as error:
            self._start_over([], error)
            return
        rows = [(slot, row) for slot, row in enumerate(self._slots[:num_rows]) if row is not None]
        self._unread.append(_Chosen(Fetch(choice), rows, begin=False))
        self.counts.steps += 1
        self.counts.row_steps += num_rows
        self._read_up_to(self._lag)
        self.counts.decode_s += time.monotonic() - began

    def _close_up(self) -> None:
        """Moves rows from the last slots to the first, when half of the slots of a step would be empty."""
        active = [slot for slot, row in enumerate(self._slots) if row is not None]
        if active[-1] + 1 < _CLOSE_UP_FROM or len(active) > (active[-1] + 1) // 2:
            return
        self._read_up_to(0)
        active = [slot for slot, row in enumerate(self._slots) if row is not None]
        free = [slot for slot in range(len(active)) if self._slots[slot] is None]
        sources = [slot for slot in active if slot >= len(active)]
        if sources:
            self._decoder.move(sources, free)
            self._loops.move(np.array(sources), np.array(free))
            for source, target in zip(sources, free, strict=True):
                self._slots[target], self._slots[source] = self._slots[source], None

    def _read_up_to(self, num_unread: int) -> None:
        """Takes the oldest tokens that were not read, until so many batches of them are left."""
        while len(self._unread) > num_unread:
            self._take_tokens(self._unread.popleft())

    def _take_tokens(self, chosen: _Chosen) -> None:
        choice = chosen.fetch.read()
        tokens, logprobs, begin, rows = choice.tokens.numpy(), choice.logprobs.tolist(), chosen.begin, chosen.rows
        top_ids, top_logprobs = choice.top_ids.numpy(), choice.top_logprobs.numpy()
        if begin:
            self._loops.begin(np.array([slot for slot, _ in rows]), tokens)
            looping = np.zeros(len(tokens), bool)
        else:
            looping = self._loops.add(tokens)
        for at, (slot, row) in enumerate(rows):
            if row.done:
                continue  # it ended in the step before, which was read after this one was on its way
            place = at if begin else slot
            token = int(tokens[place])
            row.token_ids.append(token)
            row.logprobs.append(logprobs[place])
            if self._config.top_logprobs:
                row.top_ids.append(top_ids[place])
                row.top_logprobs.append(top_logprobs[place])
            self.counts.useful_row_steps += not begin
            if token in self._eos:
                self._finish(slot, row, "stop")
            elif len(row.token_ids) == row.max_new_tokens:
                self._finish(slot, row, "length")
            elif looping[place]:
                self._finish(slot, row, "repetition")
            elif math.isnan(logprobs[place]):
                self._finish(slot, row, "stop")  # which result() makes a failure of

    def _finish(self, slot: int, row: Row, reason: str) -> None:
        row.done = True
        self._slots[slot] = None
        result = self._loaded.result(row.segment, row.language, row.token_ids, row.logprobs, reason)
        if self._config.top_logprobs and isinstance(result, Hypothesis):
            ids, logprobs = np.stack(row.top_ids).astype(np.int32), np.stack(row.top_logprobs)
            result = replace(result, top_ids=ids, top_logprobs=logprobs)
        self._inbox.deliver(row, result)

    def _start_over(self, batch: list[Row], error: BaseException) -> None:
        """After a prefill or a step failed: what was in slots begins again, with half the memory or one by one."""
        rows = batch + [row for row in self._slots if row is not None]
        out_of_memory = is_out_of_memory(error)
        self._unread.clear()
        self._slots = [None] * len(self._slots)
        parts = smaller(rows, error, self._inbox)
        del error  # its frames hold tensors
        if out_of_memory:
            self._budget = max(1, self._budget // 2)
            self._decoder.resize(1, 1)
            self._loops, self._slots = LoopFinder(1), [None]
        left = [row for part in parts for row in part]
        for row in left:
            row.alone = row.alone or not out_of_memory
        self._lane.again(left)

    def _drop_cancelled(self) -> None:
        self._lane.drop_cancelled()
        for slot, row in enumerate(self._slots):
            if row is not None and row.is_cancelled:
                row.done, self._slots[slot] = True, None

    def _report(self, batch: list[Row]) -> None:
        now = time.monotonic()
        if self._observe is not None:
            durations_s = [row.segment.duration_s for row in batch]
            num_waiting = len(self._inbox.waiting) + len(self._lane.rows)
            padded_s = max(durations_s) * len(batch)
            busy_s = now - self._reported_at - (self.counts.idle_s - self._reported_idle_s)
            self._observe(Batch(sum(durations_s), padded_s, busy_s, num_waiting))
        self._reported_at, self._reported_idle_s = now, self.counts.idle_s

    def _positions_that_fit(self) -> int:
        """Cache positions of all slots together: those that fit in `memory_share` of what is free now."""
        device = self._loaded.device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
        else:
            free = psutil.virtual_memory().available
        return max(1, int(self._config.memory_share * free) // SlotDecoder.bytes_per_position(self._thinker))
