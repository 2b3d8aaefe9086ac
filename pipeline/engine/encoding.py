"""The first half of the offline engine: a thread that turns waiting segments into encoded rows, ahead of the decoder.

waiting -> sorted by length, a look-ahead of segments at a time and across submissions
        -> ready: encoded, in device memory
        -> on a CPU, when enough are ready: prefilled, too, so that both threads always have work
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from pipeline.attempts import Watchdog
from pipeline.config import EngineConfig
from pipeline.engine.base import EngineFailure
from pipeline.engine.features import AudioEncoder
from pipeline.engine.inbox import SEGMENT_ERRORS, Inbox, describe, is_out_of_memory
from pipeline.engine.mel import HOP
from pipeline.engine.model import MIN_SAMPLES, LoadedModel, SegmentError, audio_of
from pipeline.engine.rows import MIN_NEW_TOKENS, Row, fits
from pipeline.engine.windowed import num_audio_tokens

_BATCH_POSITIONS = 2048  # of one batch on a CPU, whose decoder would starve behind a larger one


class EncoderLane:
    """Encodes as far ahead as `num_ahead` says. An error of its thread is in `error`, and the decoder's to raise."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        inbox: Inbox[Row],
        num_ahead: Callable[[], int],
        prefill: Callable[[Sequence[Row]], None],
    ) -> None:
        """`prefill` gives rows their `ahead`."""
        self._loaded, self._config, self._inbox, self._num_ahead = loaded, config, inbox, num_ahead
        self._audio_token_id: int = loaded.model.thinker.config.audio_token_id
        self.encoder = AudioEncoder(loaded.model.thinker.audio_tower, loaded.device, loaded.dtype)
        on_cuda = loaded.device.type == "cuda"
        self._stream = torch.cuda.Stream(loaded.device) if on_cuda else None  # beside the decoder's steps
        self._max_positions = config.prefill_tokens if on_cuda else min(config.prefill_tokens, _BATCH_POSITIONS)
        self._all_threads = torch.get_num_threads()
        self.threads = max(1, self._all_threads // 3)  # beside a decoder that has something to do, on a CPU
        self.is_waited_for = False
        # on a CPU with one thread, one of the two works at a time
        self.core = threading.Lock() if self._all_threads == 1 and not on_cuda else nullcontext()
        self._watchdog = Watchdog(config.stall_timeout_s)
        self._prompts: dict[str, tuple[list[int], list[int]]] = {}
        self._prefill = prefill
        self._goes_ahead = not on_cuda and self._all_threads > 1
        self.encode_s = self.prefill_s = 0.0
        self.error: BaseException | None = None
        # what follows is under inbox.changed
        self.ready: deque[Row] = deque()
        self._sorted: deque[Row] = deque()
        self._batch: list[Row] = []  # being encoded or prefilled
        self._ended = False
        self._thread = threading.Thread(target=self._loop, name="asr-encoder", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        return bool(self._batch)

    @property
    def has_more(self) -> bool:
        """Whether rows may become ready."""
        return bool(self._batch or self._sorted or self._inbox.waiting)

    @property
    def rows(self) -> list[Row]:
        """All that it holds."""
        return [*self._sorted, *self._batch, *self.ready]

    def again(self, rows: Sequence[Row]) -> None:
        """Back to the beginning of the way, before all others."""
        with self._inbox.changed:
            for row in reversed(rows):
                row.reset()
                self._sorted.appendleft(row)
            self._inbox.changed.notify_all()

    def drop_cancelled(self) -> None:
        with self._inbox.changed:
            for queue in (self._sorted, self.ready):
                if any(row.is_cancelled for row in queue):
                    left = [row for row in queue if not row.is_cancelled]
                    queue.clear()
                    queue.extend(left)
            self._inbox.changed.notify_all()

    def end(self) -> None:
        with self._inbox.changed:
            self._ended = True
            self._inbox.changed.notify_all()
        self._thread.join()

    def _loop(self) -> None:
        try:
            while (work := self._take()) is not None:
                torch.set_num_threads(self._all_threads if self.is_waited_for else self.threads)
                with self._watchdog.watch("a batch of the encoder"), self.core:
                    work(self._batch)
        except BaseException as error:  # the end of the thread: the decoder must hear of it
            with self._inbox.changed:
                self.error = error
                self._inbox.changed.notify_all()

    def _take(self) -> Callable[[list[Row]], None] | None:
        """The next batch to `_batch`, and what to do with it. Waits until there is one and the decoder has use for it;
        None at the end."""
        inbox = self._inbox
        with inbox.changed:
            self._batch = []
            inbox.changed.notify_all()
            while True:
                inbox.changed.wait_for(lambda: self._ended or self._is_behind() or self._to_prefill())
                if self._ended:
                    return None
                if not self._is_behind():
                    self._batch = self._to_prefill()
                    for row in self._batch:
                        self.ready.remove(row)
                    return self._prefill_ahead
                if not self._sorted:
                    self._look_ahead()
                while self._sorted and fits(self._batch, self._sorted[0], self._max_positions):
                    row = self._sorted.popleft()
                    if not row.is_cancelled:
                        self._batch.append(row)
                if self._batch:
                    return self._encode_all
                inbox.changed.notify_all()  # who waits for rows that are cancelled must see that none are left

    def _is_behind(self) -> bool:
        return bool(self._sorted or self._inbox.waiting) and len(self.ready) < self._num_ahead()

    def _to_prefill(self) -> list[Row]:
        """The last three quarters of the rows that could be: the decoder takes from the other end."""
        if not self._goes_ahead:
            return []
        rows = [row for row in self.ready if row.ahead is None and row.may_go_ahead]
        batch: list[Row] = []
        for row in reversed(rows[(len(rows) + 3) // 4 :]):
            if not fits(batch, row, self._max_positions):
                break
            batch.append(row)
        return batch[::-1]

    def _look_ahead(self) -> None:
        waiting = self._inbox.waiting
        taken = [waiting.popleft() for _ in range(min(len(waiting), self._config.look_ahead))]
        rows = [row for row in taken if not row.is_cancelled and self._prepare(row)]
        self._sorted.extend(sorted(rows, key=lambda row: -row.num_positions))

    def _prepare(self, row: Row) -> bool:
        """Fills in the prompt; False when the segment is one that must not reach the model."""
        try:
            prompt, row.language = self._loaded.prompt(row.segment)
        except SegmentError as error:
            self._inbox.deliver(row, EngineFailure(row.segment.segment_id, error.code, str(error)))
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
        by_length = MIN_NEW_TOKENS + math.ceil(self._config.max_new_tokens_per_s * row.segment.duration_s)
        row.max_new_tokens = min(self._config.max_new_tokens, by_length)
        return True

    def _prefill_ahead(self, rows: list[Row]) -> None:
        began = time.monotonic()
        try:
            self._prefill(rows)
        except torch.AcceleratorError:
            raise
        except SEGMENT_ERRORS:  # the decoder's own attempt says what becomes of them
            for row in rows:
                row.may_go_ahead = False
        with self._inbox.changed:
            self.ready.extend(rows)
            self._inbox.changed.notify_all()
        self.prefill_s += time.monotonic() - began

    def _encode_all(self, rows: list[Row]) -> None:
        began = time.monotonic()
        self._encode(rows)
        self.encode_s += time.monotonic() - began

    def _encode(self, rows: list[Row]) -> None:
        try:
            with torch.cuda.stream(self._stream):  # nothing on a CPU
                embeddings, sizes = self.encoder(audio_of([row.segment for row in rows]))
                encoded = None if self._stream is None else self._stream.record_event()
            for row, each, size in zip(rows, embeddings, sizes.tolist(), strict=True):
                row.embeddings, row.encoded = each[:size], encoded
            with self._inbox.changed:
                self.ready.extend(rows)
                self._inbox.changed.notify_all()
            return
        except torch.AcceleratorError:
            raise
        except SEGMENT_ERRORS as error:
            failure = error
        parts = smaller(rows, failure, self._inbox)
        del failure  # its frames hold the tensors of the batch
        for part in parts:
            self._encode(part)


def smaller(rows: list[Row], error: BaseException, inbox: Inbox[Row]) -> list[list[Row]]:
    """What to try after `rows` failed together: halves when memory ran out, else one by one; a single row fails."""
    out_of_memory = is_out_of_memory(error)
    if out_of_memory and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(rows) == 1:
        code = "out_of_memory" if out_of_memory else "engine_error"
        inbox.deliver(rows[0], EngineFailure(rows[0].segment.segment_id, code, describe(error)))
        return []
    size = (len(rows) + 1) // 2 if out_of_memory else 1
    return [rows[start : start + size] for start in range(0, len(rows), size)]
