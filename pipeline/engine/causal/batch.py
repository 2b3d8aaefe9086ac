"""Many streams in one model: each is at its own age, and what is to do for several is done at once.

A turn either hears the next block of some streams (log-mel, tower, and one pass of the decoder that checks their last
hypotheses) or moves all that are decoding one token on. Which streams meet in a turn changes no text. One thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.engine.base import EngineFailure
from pipeline.engine.causal.convolutions import FRAMES_PER_STEP
from pipeline.engine.causal.decoder import Addition, StreamDecoder
from pipeline.engine.causal.penalties import Penalties
from pipeline.engine.causal.prompts import Prompts
from pipeline.engine.causal.roll import Cut, find_cut
from pipeline.engine.causal.settings import Settings
from pipeline.engine.causal.slots import Slots
from pipeline.engine.causal.state import ClosedSegment, Resume, Stream, StreamError, Update, check_audio, new_stream
from pipeline.engine.causal.stream_mel import StreamMel
from pipeline.engine.causal.tower import StreamTower
from pipeline.engine.causal.tower_file import untrained
from pipeline.engine.inbox import SEGMENT_ERRORS, describe, is_out_of_memory
from pipeline.engine.model import LoadedModel
from pipeline.schema import SAMPLE_RATE_HZ

_HEAR_SHARE = 4  # a quarter of the streams with something to do is worth a pass
_EXPECTED_PROMPT = 64


class StreamBatch:
    """Open streams of one model, whose tower was trained on `languages` (None: all). `clock` gives seconds."""

    def __init__(
        self,
        loaded: LoadedModel,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        languages: frozenset[str] | None = None,
    ) -> None:
        self._loaded, self._settings, self._languages = loaded, settings, languages
        thinker: Any = loaded.model.thinker
        self._prompts = Prompts(loaded)
        self._audio_token_id: int = thinker.config.audio_token_id
        self._eos = frozenset(loaded.eos_token_ids)
        penalties = Penalties(settings.repetition_penalty, settings.no_repeat_ngram, self._prompts.never_said)
        self._mel = StreamMel(thinker.audio_tower.config.num_mel_bins, loaded.device)
        self._tower = StreamTower(thinker.audio_tower, settings.geometry, settings.slots)
        self._decoder = StreamDecoder(thinker, settings.slots, self._width(_EXPECTED_PROMPT), penalties, loaded.int4)
        self._streams: dict[str, Stream] = {}
        self._slots = Slots(settings.slots, settings.geometry.block_frames, settings.park_after_s, clock)
        self._decoding: list[Stream] = []
        self._updates: list[Update] = []

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def num_waiting(self) -> int:
        """Streams that have something to do and no slot."""
        return len(self._slots.waiting)

    @property
    def num_in_slots(self) -> int:
        return sum(holder is not None for holder in self._slots.holders)

    @property
    def bytes_per_slot(self) -> int:
        """What a stream in a slot holds on the device: keys and values of the tower and of the decoder."""
        return self._tower.bytes_per_slot + self._decoder.bytes_per_slot

    def open(
        self, stream_id: str, language: str | None = None, context: str = "", resume: Resume | None = None
    ) -> Stream:
        """A new stream, or one that goes on at `resume`. Raises StreamError."""
        if stream_id in self._streams:
            raise StreamError("bad_stream", f"stream {stream_id!r} is open already")
        if len(self._streams) >= self._settings.max_streams:
            raise StreamError("too_many_streams", f"{len(self._streams)} are open, which is max_streams")
        prompt = self._prompts(language, context)
        if prompt.language is not None and self._languages is not None and prompt.language not in self._languages:
            raise StreamError("unsupported_language", untrained(prompt.language, self._languages))
        self._require_width(len(prompt.head) + len(prompt.tail))
        stream = new_stream(stream_id, prompt, self._settings.commit, resume or Resume())
        self._slots.touch(stream)
        self._streams[stream_id] = stream
        return stream

    def room(self, stream: Stream) -> int:
        """Samples that `stream` takes now."""
        return max(0, int(self._settings.max_waiting_s * SAMPLE_RATE_HZ) - stream.waiting_samples)

    def push(self, stream: Stream, pcm: np.ndarray, sample_rate_hz: int = SAMPLE_RATE_HZ) -> None:
        """More audio of a stream: int16 [n], any n. Raises StreamError, and then has taken none of it."""
        check_audio(pcm, sample_rate_hz)
        if stream.audio.is_ended or stream.is_done:
            raise StreamError("ended", f"stream {stream.stream_id!r} has ended and takes no more audio")
        if len(pcm) > self.room(stream):
            raise StreamError(
                "overrun", f"stream {stream.stream_id!r} has more than {self._settings.max_waiting_s} s waiting"
            )
        stream.audio.append(pcm)
        self._slots.look(stream)

    def end(self, stream: Stream) -> None:
        """No more audio comes: what is held back will be said."""
        stream.audio.is_ended = True
        self._slots.look(stream)

    def drop(self, stream: Stream) -> None:
        """Forgets a stream at once."""
        self._forget(stream)

    def turn(self) -> list[Update]:
        """Does some of what there is to do: what streams have said with it. Nothing when `has_work` is False."""
        if given := self._slots.give():
            self._tower.reset(given)
        batch = self._chosen()
        streams, work = (batch, self._hear) if batch else (list(self._decoding), self._step)
        if streams:
            try:
                work(streams)
            except torch.AcceleratorError:
                raise
            except SEGMENT_ERRORS as error:
                self._fail_or_retry([stream for stream in streams if not stream.is_done], error)
        updates, self._updates = self._updates, []
        return updates

    @property
    def has_work(self) -> bool:
        """False when only more audio, or time, gives a turn something to do."""
        slots = self._slots
        return bool(self._decoding or slots.ready() or (slots.waiting and slots.to_give() is not None))

    def _chosen(self) -> list[Stream]:
        """Whom to hear now: nobody while it is better to go on decoding."""
        ready = self._slots.ready()
        if any(each.alone for each in self._decoding):
            return []
        alone = [each for each in ready if each.alone]
        if alone:
            return [] if self._decoding else alone[:1]
        if self._decoding and len(ready) * _HEAR_SHARE < len(ready) + len(self._decoding):
            return []
        return ready[: self._settings.batch]

    def _leave_slot(self, stream: Stream) -> None:
        if stream.is_decoding:
            stream.is_decoding = False
            self._decoding.remove(stream)
        self._slots.leave(stream)

    def _forget(self, stream: Stream) -> None:
        self._leave_slot(stream)
        self._slots.forget(stream)
        stream.is_done = True
        self._streams.pop(stream.stream_id, None)

    def _hear(self, batch: Sequence[Stream]) -> None:
        """The next block of each, and the decoder's pass over it."""
        geometry = self._settings.geometry
        streams, num_frames = [], []
        for stream in batch:
            frames = stream.frames_to_hear(geometry.block_frames)
            if frames == 0:
                self._end(stream)
                continue
            is_full = frames == geometry.block_frames
            if is_full and self._settings.roll.ends_before(stream.num_heard_steps, geometry.block_steps):
                self._roll(stream, "", "cap")
            if stream.slot is not None:
                streams.append(stream)
                is_new = stream.segment.num_frames == stream.segment.num_heard
                num_frames.append(frames if is_new else geometry.block_frames)
        if streams:
            self._encode(streams, num_frames)
        new = [stream for stream in streams if stream.segment.num_frames > stream.segment.num_heard]
        if new:
            self._read(new)

    def _encode(self, streams: list[Stream], num_frames: list[int]) -> None:
        geometry = self._settings.geometry
        windows = [each.audio.window(each.next_frame, count) for each, count in zip(streams, num_frames, strict=True)]
        mel, peaks = self._mel(windows, [each.segment.loudest for each in streams])
        if mel.shape[1] < geometry.block_frames:
            mel = torch.nn.functional.pad(mel, (0, 0, 0, geometry.block_frames - mel.shape[1]))
        steps = [count // FRAMES_PER_STEP for count in num_frames]
        embeddings = self._tower.encode(_slots(streams), mel, steps)
        for stream, rows, count, size, peak in zip(streams, embeddings, num_frames, steps, peaks, strict=True):
            segment = stream.segment
            segment.embeddings.append(rows[:size])
            segment.num_frames += count
            segment.loudest = peak

    def _read(self, streams: Sequence[Stream]) -> None:
        """The decoder's pass over what was encoded."""
        additions = [self._addition(stream) for stream in streams]
        audio = [rows for stream in streams for rows in stream.segment.embeddings]
        found = self._decoder.extend(additions, torch.cat(audio))
        for stream, addition, one in zip(streams, additions, found, strict=True):
            segment = stream.segment
            segment.embeddings = []
            segment.num_cached = len(stream.prompt.head) + segment.num_steps
            segment.token_ids, segment.logprobs = list(addition.draft[: one.num_accepted]), one.logprobs[:-1]
            stream.is_decoding = True
            self._decoding.append(stream)
            self._say(stream, one.token, one.logprobs[-1])

    def _addition(self, stream: Stream) -> Addition:
        segment, prompt = stream.segment, stream.prompt
        assert stream.slot is not None
        audio = [self._audio_token_id] * sum(map(len, segment.embeddings))
        head = [] if segment.num_cached else prompt.head
        draft = segment.draft[: self._settings.max_new_tokens - 1]
        return Addition(stream.slot, segment.num_cached, [*head, *audio, *prompt.tail, *draft], draft)

    def _step(self, streams: Sequence[Stream]) -> None:
        tokens, logprobs = self._decoder.step(_slots(streams))
        for stream, token, logprob in zip(streams, tokens, logprobs, strict=True):
            self._say(stream, token, logprob)

    def _say(self, stream: Stream, token: int, logprob: float) -> None:
        """The next token of a stream's hypothesis."""
        if math.isnan(logprob):
            self._tower.clear(_slots([stream]))
            self._decoder.clear(_slots([stream]))
            self._fail(stream, "not_finite", f"the model's logits are NaN in {self._loaded.info.dtype}")
            return
        segment = stream.segment
        segment.token_ids.append(token)
        segment.logprobs.append(logprob)
        is_end = token in self._eos
        if not is_end and len(segment.token_ids) < self._settings.max_new_tokens:
            return
        stream.is_decoding = False
        self._decoding.remove(stream)
        segment.draft = segment.token_ids[:-1] if is_end else segment.token_ids
        segment.finish_reason = "stop" if is_end else "length"
        self._take(stream)

    def _take(self, stream: Stream) -> None:
        """A hypothesis is whole."""
        segment = stream.segment
        segment.language, segment.text, segment.text_raw = self._prompts.said(segment.draft)
        segment.num_before, segment.num_heard = segment.num_heard, segment.num_frames
        segment.heard_peak = segment.loudest
        stream.furthest = max(stream.furthest, stream.num_heard)
        stream.alone = False
        self._slots.touch(stream)
        language = stream.prompt.language or segment.language
        if (cut := self._cut_of(stream, language)) is not None:
            self._cut(stream, cut)
            return
        text = stream.publish(segment.committer.take(segment.text))
        if self._settings.roll.ends_after(stream.num_heard_steps, segment.text, language):
            self._roll(stream, text, "sentence")
        else:
            tail = segment.committer.tail()
            self._update(stream, text, tail, segment.text)

    def _cut_of(self, stream: Stream, language: str | None) -> Cut | None:
        """Where the open segment ends, within what was heard of it; None where it goes on. It is looked for in what the
        hypothesis before had heard, and said as this one does: beyond, a model often goes on by itself."""
        segment, roll = stream.segment, self._settings.roll
        if roll.at != "sentence" or segment.num_before < roll.min_steps * FRAMES_PER_STEP:
            return None
        pcm = stream.audio.samples(segment.first_frame, segment.num_before)
        text = segment.committer.confirmed(segment.text)
        is_last_chance = roll.ends_before(stream.num_heard_steps, self._settings.geometry.block_steps)
        num_published = len(segment.committer.published)
        return find_cut(text, language, pcm, roll.min_steps, num_published, is_last_chance)

    def _cut(self, stream: Stream, cut: Cut) -> None:
        """The open segment ends there; what is left of its audio and text is the next one's."""
        segment = stream.segment
        segment.token_ids, segment.text_raw = self._prompts.head(
            segment.token_ids, segment.text_raw, segment.text, cut.num_chars
        )
        segment.logprobs = segment.logprobs[: len(segment.token_ids)]
        segment.text, segment.num_heard = segment.text[: cut.num_chars], cut.num_steps * FRAMES_PER_STEP
        segment.finish_reason = "sentence"
        self._roll(stream, "", "sentence" if cut.is_sentence else "clause")

    def _roll(self, stream: Stream, text: str, why: str) -> None:
        """The open segment ends, after `text` of it; another stream may have the slot, if one waits."""
        hypothesis = stream.segment.text
        rest, closed = stream.close(self._settings.commit, why)
        assert stream.slot is not None
        self._tower.reset([stream.slot])
        if self._slots.waiting or not self._slots.is_ready(stream):
            self._leave_slot(stream)
            self._slots.look(stream)
        self._update(stream, text + rest, "", hypothesis, closed)

    def _update(
        self, stream: Stream, text: str, tail: str, hypothesis: str, closed: ClosedSegment | None = None
    ) -> None:
        heard_s, resume = stream.heard_s, stream.resume
        self._updates.append(Update(stream.stream_id, text, tail, hypothesis, heard_s, closed, resume=resume))

    def _end(self, stream: Stream) -> None:
        """The stream is over, and all of it heard."""
        hypothesis = stream.segment.text
        text, closed = stream.close(self._settings.commit, "end") if stream.segment.num_heard else ("", None)
        self._forget(stream)
        self._updates.append(Update(stream.stream_id, text, "", hypothesis, stream.heard_s, closed, is_last=True))

    def _fail(self, stream: Stream, code: str, detail: str) -> None:
        error = EngineFailure(stream.stream_id, code, detail)
        self._updates.append(Update(stream.stream_id, "", "", "", stream.heard_s, error=error))
        self._forget(stream)

    def _fail_or_retry(self, streams: Sequence[Stream], error: BaseException) -> None:
        """One stream fails; of several each is heard again by itself."""
        if len(streams) == 1:
            code = "out_of_memory" if is_out_of_memory(error) else "engine_error"
            self._fail(streams[0], code, describe(error))
            return
        for stream in streams:
            self._leave_slot(stream)
            stream.alone = True
            self._slots.look(stream)

    def _width(self, prompt_length: int) -> int:
        """Cache positions of a slot."""
        most_steps = max(self._settings.roll.max_steps, self._settings.geometry.block_steps)
        return prompt_length + most_steps + self._settings.geometry.block_steps + self._settings.max_new_tokens

    def _require_width(self, prompt_length: int) -> None:
        if self._width(prompt_length) > self._decoder.width:
            slots = self._settings.slots
            self._decoder.resize(slots, self._width(prompt_length), range(slots))


def _slots(streams: Sequence[Stream]) -> list[int]:
    return [stream.slot for stream in streams if stream.slot is not None]
