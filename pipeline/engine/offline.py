"""The engine for bulk archives: encoder batches without padding to the longest clip, and a decoder of slots that are
filled again as soon as a row ends.

A thread of its own takes segments through four places:

    waiting -> sorted by length, a look-ahead of segments at a time and across submissions
            -> ready: encoded, in device memory
            -> a slot: prefilled, then a token a step
            -> its submission's results
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from pipeline.attempts import Watchdog
from pipeline.config import EngineConfig
from pipeline.engine.base import Batch, EngineError, EngineFailure, Observer, Result
from pipeline.engine.batching import SEGMENT_ERRORS, Submission, describe, is_out_of_memory
from pipeline.engine.decoder import Choice, Fetch, SlotDecoder
from pipeline.engine.features import AudioEncoder
from pipeline.engine.loops import LoopFinder
from pipeline.engine.mel import HOP
from pipeline.engine.model import MIN_SAMPLES, LoadedModel, SegmentError, audio_of, load_model
from pipeline.engine.windowed import num_audio_tokens
from pipeline.schema import Segment

_EXPECTED_TOKENS_PER_S = 10.0  # cache that a row gets to begin with; it grows when one writes more
_MIN_NEW_TOKENS = 32
_REFILL_SHARE = 16  # a sixteenth of the slots free is worth a prefill
_TURNS_PER_LOOK = 8  # between two looks for what was cancelled
_CLOSE_UP_FROM = 16  # slots


@dataclass(slots=True, eq=False)
class _Row:
    """A segment on its way. `head` and `tail` are the prompt's token ids around its audio; `num_positions` the whole
    prompt's length; `embeddings` float [num_audio_tokens, hidden] once it is encoded."""

    submission: Submission
    index: int
    segment: Segment
    language: str | None = None
    head: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    num_positions: int = 0
    max_new_tokens: int = 0
    embeddings: Tensor | None = None
    encoded: torch.cuda.Event | None = None  # when they are there, on CUDA
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alone: bool = False  # something failed with it: it is tried again by itself
    done: bool = False

    @property
    def length(self) -> int:
        """Positions that are filled once its newest token is fed."""
        return self.num_positions + len(self.token_ids)

    def reset(self) -> None:
        self.embeddings, self.encoded, self.token_ids, self.logprobs = None, None, [], []


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Tokens on their way, of `rows` and their slots: after a prefill in the order of `rows`, after a step by slot."""

    fetch: Fetch
    rows: list[tuple[int, _Row]]
    begin: bool


@dataclass(slots=True)
class Counts:
    """What the engine has done: decode steps, slots in them and those whose token was used; seconds at each kind of
    work and without any."""

    steps: int = 0
    row_steps: int = 0
    useful_row_steps: int = 0
    encode_s: float = 0.0
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
        self._config, self._observe = config, observe
        self._loaded = loaded or load_model(config)
        self.info = self._loaded.info
        thinker: Any = self._loaded.model.thinker
        self._thinker = thinker
        self._audio_token_id: int = thinker.config.audio_token_id
        self._encoder = AudioEncoder(thinker.audio_tower, self._loaded.device, self._loaded.dtype)
        self._eos = frozenset(self._loaded.eos_token_ids)
        self._budget = self._positions_that_fit()
        self._decoder = SlotDecoder(thinker, 1, 64, self._loaded.int4)
        self._loops = LoopFinder(1)
        # the encoder runs beside the decoder's steps
        self._side = torch.cuda.Stream(self._loaded.device) if self._loaded.device.type == "cuda" else None
        self._lag = int(self._loaded.device.type == "cuda")  # steps that run before the host reads the first's tokens
        self.counts = Counts()
        self._watchdog = Watchdog(config.stall_timeout_s)
        self._prompts: dict[str, tuple[list[int], list[int]]] = {}

        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[_Row] = deque()
        self._closed = False
        self._broken: BaseException | None = None

        # the thread's own
        self._sorted: deque[_Row] = deque()
        self._ready: deque[_Row] = deque()
        self._slots: list[_Row | None] = [None]
        self._unread: deque[_Chosen] = deque()
        self._reported_at = time.monotonic()
        self._num_turns = 0
        self._thread = threading.Thread(target=self._loop, name="asr-engine", daemon=True)
        self._thread.start()
        (warm,) = self.submit([Segment("warm-up", np.zeros(MIN_SAMPLES, np.int16))]).result()
        if isinstance(warm, EngineFailure):  # a model that cannot run here must not become a failure of every segment
            raise EngineError(f"the model cannot run here: {warm}")
        self.counts = Counts()

    def submit(self, segments: Sequence[Segment]) -> Future[list[Result]]:
        """See AsrEngine. A cancelled future frees what its segments hold."""
        future: Future[list[Result]] = Future()
        submission = Submission(future, [None] * len(segments), len(segments))
        rows = [_Row(submission, index, segment) for index, segment in enumerate(segments)]
        with self._changed:
            if self._broken is not None:
                raise EngineError(f"the engine broke earlier: {describe(self._broken)}") from self._broken
            if self._closed:
                raise EngineError("submit() after close(): the engine takes no more segments")
            self._waiting.extend(rows)
            self._changed.notify()
        if not rows:
            future.set_result([])
        return future

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # the thread

    def _loop(self) -> None:
        try:
            while self._take():
                with self._watchdog.watch("a turn of the engine"):
                    self._turn()
        except BaseException as error:  # the end of the thread: those who wait for a result must hear of it
            self._break(error)

    def _take(self) -> bool:
        """Fills `_sorted` when it is empty; waits when there is nothing else to do. False when closed and drained."""
        if self._sorted:
            return True
        busy = bool(self._ready or self._unread or any(self._slots))
        began = time.monotonic()
        with self._changed:
            if not busy:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self.counts.idle_s += time.monotonic() - began
            taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._config.look_ahead))]
            if not (busy or taken):
                return False
        rows = [row for row in taken if self._prepare(row)]
        self._sorted.extend(sorted(rows, key=lambda row: -row.num_positions))
        return True

    def _turn(self) -> None:
        """One batch through the encoder where slots wait for it, a prefill where there is room, and a decode step."""
        self._num_turns += 1
        if self._num_turns % _TURNS_PER_LOOK == 0:
            self._drop_cancelled()
        num_active = sum(row is not None for row in self._slots)
        if self._sorted and len(self._ready) < max(1, len(self._slots) // 4):
            self._encode()
        if self._ready:
            self._refill(num_active)
        if any(self._slots):
            self._step()
        else:
            self._read_up_to(0)

    def _prepare(self, row: _Row) -> bool:
        """Fills in the prompt; False when the segment is one that must not reach the model."""
        try:
            prompt, row.language = self._loaded.prompt(row.segment)
        except SegmentError as error:
            self._deliver(row, EngineFailure(row.segment.segment_id, error.code, str(error)))
            return False
        if prompt not in self._prompts:
            if len(self._prompts) >= 1000:
                self._prompts.clear()
            ids = self._loaded.processor.tokenizer(prompt)["input_ids"]
            at = ids.index(self._audio_token_id)
            self._prompts[prompt] = ids[:at], ids[at + 1 :]
        row.head, row.tail = self._prompts[prompt]
        num_frames = max(len(row.segment.pcm), MIN_SAMPLES) // HOP
        num_audio = int(num_audio_tokens(torch.tensor(num_frames)))
        row.num_positions = len(row.head) + num_audio + len(row.tail)
        by_length = _MIN_NEW_TOKENS + math.ceil(self._config.max_new_tokens_per_s * row.segment.duration_s)
        row.max_new_tokens = min(self._config.max_new_tokens, by_length)
        return True

    def _encode(self) -> None:
        """The next batch of `_sorted`, as many as a prefill takes, to `_ready`."""
        batch: list[_Row] = []
        while self._sorted and self._fits(batch, self._sorted[0]):
            batch.append(self._sorted.popleft())
        began = time.monotonic()
        self._encode_rows(batch)
        self.counts.encode_s += time.monotonic() - began

    def _fits(self, batch: list[_Row], row: _Row) -> bool:
        """Whether `batch`, padded to its longest, stays within `prefill_tokens` with `row`; one always does."""
        if not batch:
            return True
        longest = max(row.num_positions, *(each.num_positions for each in batch))
        return not (row.alone or batch[0].alone) and longest * (len(batch) + 1) <= self._config.prefill_tokens

    def _encode_rows(self, rows: list[_Row]) -> None:
        try:
            with torch.cuda.stream(self._side):  # nothing on a CPU
                embeddings, sizes = self._encoder(audio_of([row.segment for row in rows]))
                encoded = None if self._side is None else self._side.record_event()
            for row, each, size in zip(rows, embeddings, sizes.tolist(), strict=True):
                row.embeddings, row.encoded = each[:size], encoded
            self._ready.extend(rows)
            return
        except torch.AcceleratorError:
            raise
        except SEGMENT_ERRORS as error:
            failure = error
        parts = self._smaller(rows, failure)
        del failure  # its frames hold the tensors of the batch
        for part in parts:
            self._encode_rows(part)

    def _smaller(self, rows: list[_Row], error: BaseException) -> list[list[_Row]]:
        """What to try after `rows` failed together: halves when memory ran out, else one by one; a single row fails."""
        out_of_memory = is_out_of_memory(error)
        if out_of_memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(rows) == 1:
            code = "out_of_memory" if out_of_memory else "engine_error"
            self._deliver(rows[0], EngineFailure(rows[0].segment.segment_id, code, describe(error)))
            return []
        size = (len(rows) + 1) // 2 if out_of_memory else 1
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _refill(self, num_active: int) -> None:
        """Prefills free slots from `_ready`, once there are enough of them."""
        if num_active and (self._ready[0].alone or any(row is not None and row.alone for row in self._slots)):
            return  # until it is by itself
        self._make_room(self._ready[0])
        free = [slot for slot, row in enumerate(self._slots) if row is None]
        enough = min(len(self._ready), max(1, len(self._slots) // _REFILL_SHARE))
        if len(free) < enough:
            return
        batch: list[_Row] = []
        while self._ready and len(batch) < len(free) and self._fits(batch, self._ready[0]):
            if self._width_of(self._ready[0]) > self._decoder.width:
                break
            batch.append(self._ready.popleft())
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
            row.embeddings = None
        self._unread.append(_Chosen(Fetch(choice), list(zip(free, batch, strict=False)), begin=True))
        self._read_up_to(self._lag)
        self.counts.prefill_s += time.monotonic() - began
        self._report(batch)

    def _width_of(self, row: _Row) -> int:
        """Cache positions that a row gets to begin with."""
        expected = _MIN_NEW_TOKENS + math.ceil(_EXPECTED_TOKENS_PER_S * row.segment.duration_s)
        return row.num_positions + min(row.max_new_tokens, expected)

    def _make_room(self, row: _Row) -> None:
        """Another shape of the cache when `row` needs a wider one, or when all rows left would have more slots in a
        narrower one."""
        need = self._width_of(row)
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
        for slot in leave:
            self._again(self._slots[slot])
        rows = [self._slots[slot] for slot in keep]
        self._decoder.resize(num_slots, width, keep)
        loops = LoopFinder(num_slots)
        loops.move(np.array(keep, np.int64), np.arange(len(keep)), self._loops)
        self._loops = loops
        self._slots = rows + [None] * (num_slots - len(rows))

    def _prefill(self, slots: list[int], rows: list[_Row]) -> Choice:
        longest = max(row.num_positions for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        is_audio = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row.head)] = torch.tensor(row.head)
            ids[i, row.num_positions - len(row.tail) : row.num_positions] = torch.tensor(row.tail)
            is_audio[i, len(row.head) : row.num_positions - len(row.tail)] = True
        device = self._loaded.device
        with torch.inference_mode():
            for row in rows:
                if row.encoded is not None and row.embeddings is not None:
                    torch.cuda.current_stream(device).wait_event(row.encoded)
                    row.embeddings.record_stream(torch.cuda.current_stream(device))
            embeddings = self._thinker.model.embed_tokens(ids.to(device))
            audio = torch.cat([row.embeddings for row in rows if row.embeddings is not None])
            embeddings[is_audio.to(device)] = audio.to(embeddings.dtype)
        return self._decoder.prefill(slots, embeddings, [row.num_positions for row in rows])

    def _step(self) -> None:
        length = max(row.length for row in self._slots if row is not None) + len(self._unread)
        if length > self._decoder.width:
            self._reshape(length + length // 4)
            return
        if not self._ready and not self._sorted:
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
        tokens, logprobs = chosen.fetch.read()
        begin, rows = chosen.begin, chosen.rows
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
            self.counts.useful_row_steps += not begin
            if token in self._eos:
                self._finish(slot, row, "stop")
            elif len(row.token_ids) == row.max_new_tokens:
                self._finish(slot, row, "length")
            elif looping[place]:
                self._finish(slot, row, "repetition")
            elif math.isnan(logprobs[place]):
                self._finish(slot, row, "stop")  # which result() makes a failure of

    def _finish(self, slot: int, row: _Row, reason: str) -> None:
        row.done = True
        self._slots[slot] = None
        self._deliver(row, self._loaded.result(row.segment, row.language, row.token_ids, row.logprobs, reason))

    def _again(self, row: _Row | None) -> None:
        """Back to the beginning of the way."""
        if row is not None:
            row.reset()
            self._sorted.appendleft(row)

    def _start_over(self, batch: list[_Row], error: BaseException) -> None:
        """After a prefill or a step failed: what was in slots begins again, with half the memory or one by one."""
        rows = batch + [row for row in self._slots if row is not None]
        out_of_memory = is_out_of_memory(error)
        self._unread.clear()
        self._slots = [None] * len(self._slots)
        parts = self._smaller(rows, error)
        del error  # its frames hold tensors
        if out_of_memory:
            self._budget = max(1, self._budget // 2)
            self._decoder.resize(1, 1)
            self._loops, self._slots = LoopFinder(1), [None]
        for row in (row for part in reversed(parts) for row in reversed(part)):
            row.alone = row.alone or not out_of_memory
            self._again(row)

    def _drop_cancelled(self) -> None:
        for queue in (self._sorted, self._ready):
            if any(row.submission.future.cancelled() for row in queue):
                left = [row for row in queue if not row.submission.future.cancelled()]
                queue.clear()
                queue.extend(left)
        for slot, row in enumerate(self._slots):
            if row is not None and row.submission.future.cancelled():
                row.done, self._slots[slot] = True, None

    def _deliver(self, row: _Row, result: Result) -> None:
        submission = row.submission
        submission.results[row.index] = result
        submission.num_missing -= 1
        if submission.num_missing == 0 and submission.future.set_running_or_notify_cancel():
            submission.future.set_result([done for done in submission.results if done is not None])

    def _report(self, batch: list[_Row]) -> None:
        now = time.monotonic()
        if self._observe is not None:
            durations_s = [row.segment.duration_s for row in batch]
            num_waiting = len(self._waiting) + len(self._sorted) + len(self._ready)
            padded_s = max(durations_s) * len(batch)
            self._observe(Batch(sum(durations_s), padded_s, now - self._reported_at, num_waiting))
        self._reported_at = now

    def _break(self, error: BaseException) -> None:
        with self._changed:
            self._broken = error
            waiting = [*self._waiting, *self._sorted, *self._ready, *(row for row in self._slots if row is not None)]
            self._waiting.clear()
        for submission in {id(row.submission): row.submission for row in waiting}.values():
            if not submission.future.done():
                broken = EngineError(f"the engine broke: {describe(error)}")
                broken.__cause__ = error
                submission.future.set_exception(broken)

    def _positions_that_fit(self) -> int:
        """Cache positions of all slots together: those that fit in `memory_share` of what is free now."""
        device = self._loaded.device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
        else:
            free = psutil.virtual_memory().available
        return max(1, int(self._config.memory_share * free) // SlotDecoder.bytes_per_position(self._thinker))
