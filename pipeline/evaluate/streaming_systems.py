"""What is replayed to under the streaming contract: our causal engine, and the offline one after the end of a talk."""

from __future__ import annotations

import asyncio
import itertools
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil
import torch

from pipeline.config import EngineConfig, SegmentationConfig
from pipeline.engine.base import EngineError, EngineFailure, EngineInfo, Result
from pipeline.engine.causal.batch import StreamBatch
from pipeline.engine.causal.commit import between
from pipeline.engine.causal.prompts import Prompts
from pipeline.engine.causal.settings import Settings
from pipeline.engine.causal.state import ClosedSegment, Stream
from pipeline.engine.causal.state import Update as Said
from pipeline.engine.decoder import SlotDecoder
from pipeline.engine.features import AudioEncoder
from pipeline.engine.flops import FlopMeter
from pipeline.engine.model import LoadedModel, load_model, padded
from pipeline.engine.offline import OfflineEngine
from pipeline.evaluate.contract import TAIL_S, Update
from pipeline.evaluate.replay import Minute, Replay, Talk, counted_minutes, num_minutes
from pipeline.metrics import error_counts, unit_name
from pipeline.rolling import Roller
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis, Segment
from pipeline.segment import segment_unit
from pipeline.units import Recording, Unit, UnitKey

_MINUTE = 60 * SAMPLE_RATE_HZ


class CausalSystem:
    """One stream of a StreamBatch. The engine holds its newest words back; the contract cuts the newest 250 ms of the
    whole hypothesis, at the end of a segment, too."""

    def __init__(self, name: str, loaded: LoadedModel, settings: Settings, info: EngineInfo) -> None:
        self.name = name
        self.about: dict[str, Any] = {"engine": asdict(info), "settings": asdict(settings)}
        self.lm_head = loaded.model.thinker.lm_head
        self._batch = StreamBatch(loaded, settings)
        self._numbers = itertools.count()
        self._stream: Stream | None = None

    def begin(self, language: str) -> None:
        if self._stream is not None:
            self._batch.drop(self._stream)
        self._stream = self._batch.open(str(next(self._numbers)), language)
        self._text = ""
        self._open_from, self._open_from_s = 0, 0.0  # of the text and the audio: where the open segment begins

    def hear(self, pcm: np.ndarray) -> list[Update]:
        assert self._stream is not None
        self._batch.push(self._stream, pcm)
        return self._turns()

    def end(self) -> list[Update]:
        assert self._stream is not None
        self._batch.end(self._stream)
        return self._turns()

    def _turns(self) -> list[Update]:
        updates = []
        while self._batch.has_work:
            updates += [self._as_update(said) for said in self._batch.turn()]
        return updates

    def _as_update(self, said: Said) -> Update:
        if said.error is not None:
            raise EngineError(f"the stream failed after {said.heard_s:.0f} s: {said.error}")
        self._text += said.text
        if said.segment is not None and said.heard_s - _end_s(said.segment) >= TAIL_S:
            self._open_from, self._open_from_s = len(self._text), _end_s(said.segment)  # it ended before the newest
        update = Update(
            at_s=0.0,
            heard_s=said.heard_s,
            text=self._text + between(self._text, said.tail) + said.tail,
            open_from=self._open_from,
            open_s=said.heard_s - self._open_from_s,
            held_from=len(self._text),
            is_final=said.is_last,
        )
        if said.segment is not None:
            self._open_from, self._open_from_s = len(self._text), _end_s(said.segment)
        return update


def _end_s(segment: ClosedSegment) -> float:
    return segment.offset_s + segment.duration_s


@dataclass(frozen=True, slots=True)
class _Decoded:
    """Samples `[start, end)` that were decoded, some of them more than once."""

    start: int
    end: int


class OfflineSystem:
    """The offline engine under the policy `sentence`, once a talk is over: no latency, and no contract to keep."""

    def __init__(self, name: str, config: EngineConfig, segmentation: SegmentationConfig | None = None) -> None:
        self.name = name
        self._config = config
        self._segmentation = segmentation or SegmentationConfig(policy="sentence")
        self._loaded = load_model(config)
        self._engine = OfflineEngine(config, loaded=self._loaded)
        self.about = {"engine": asdict(self._engine.info), "segmentation": self._segmentation.model_dump(mode="json")}

    def close(self) -> None:
        self._engine.close()

    def measure(self, talk: Talk, count_every: int | None = 10) -> Replay:
        """Minutes have what was decoded from their audio on; of their operations see `count`."""
        process = psutil.Process()
        began = time.perf_counter()
        decoded: list[_Decoded] = []
        texts = asyncio.run(self._texts(talk, decoded))
        took = time.perf_counter() - began
        text = ("" if unit_name(talk.language) == "CER" else " ").join(texts)
        rss = process.memory_info().rss
        minutes = [Minute(rss_bytes=rss) for _ in range(num_minutes(talk))]
        for number, minute in enumerate(minutes):
            minute.audio_s = min(_MINUTE, len(talk.pcm) - number * _MINUTE) / SAMPLE_RATE_HZ
            minute.compute_s = took * minute.audio_s / talk.duration_s  # stretches run at once: no minute's own
        if count_every is not None and self._loaded.device.type != "cuda":  # there graphs run, whose inside is unseen
            self._count(talk, decoded, minutes, count_every)
        return Replay(
            system=self.name,
            talk=talk.name,
            language=talk.language,
            audio_s=talk.duration_s,
            text=text,
            errors=error_counts(talk.text, text, talk.language),
            latencies_s=None,
            minutes=minutes,
            peak_rss_bytes=rss,
        )

    async def _texts(self, talk: Talk, decoded: list[_Decoded]) -> list[str]:
        recording = Recording(talk.name, talk.name, talk.pcm)
        unit = segment_unit(Unit(UnitKey("0" * 16, 0, 0, "z"), [recording]), self._segmentation)
        (recording,) = unit.recordings

        async def decode(start: int, end: int) -> Result:
            decoded.append(_Decoded(start, end))
            segment = Segment(f"{start}-{end}", recording.pcm[start:end], talk.language, self._config.context)
            future: Future[list[Result]] = self._engine.submit([segment])
            (result,) = await asyncio.wrap_future(future)
            return result

        options = self._segmentation
        roller: Roller[EngineFailure] = Roller(decode, recording.speech, options.min_s, options.max_s)
        stretches = await asyncio.gather(*(roller.roll(*span.bounds) for span in unit.spans))
        results = [window.result for windows in stretches for window in windows]
        if failed := [result for result in results if isinstance(result, EngineFailure)]:
            raise EngineError(f"{talk.name}: {failed[0]}")
        return [result.text for result in results if isinstance(result, Hypothesis)]

    def _count(self, talk: Talk, decoded: list[_Decoded], minutes: list[Minute], every: int) -> None:
        """Operations of what was decoded from counted minutes on, each by itself and without padding, as a share of the
        audio between its beginning and the next one's."""
        counter = _WindowCounter(self._loaded)
        spans = sorted({(each.start, each.end) for each in decoded})
        starts = sorted({start for start, _ in spans}) + [len(talk.pcm)]
        following = dict(itertools.pairwise(starts))
        for number in counted_minutes(len(minutes), len(talk.pcm) // _MINUTE, every):
            mine = [(start, end) for start, end in spans if start // _MINUTE == number]
            if not mine:
                continue
            meter = counter.count(talk, mine)
            advance_s = sum(following[start] - start for start in {start for start, _ in mine}) / SAMPLE_RATE_HZ
            share = minutes[number].audio_s / advance_s
            minutes[number].flops = round(meter.total * share)
            minutes[number].lm_head_flops = round(meter.lm_head * share)


class _WindowCounter:
    """The offline engine's forwards in this thread, as a counter sees one thread alone."""

    def __init__(self, loaded: LoadedModel) -> None:
        thinker: Any = loaded.model.thinker
        self._loaded, self._thinker = loaded, thinker
        self._encoder = AudioEncoder(thinker.audio_tower, loaded.device, loaded.dtype)
        self._decoder = SlotDecoder(thinker, 1, 64, loaded.int4)
        self._prompts = Prompts(loaded)

    def count(self, talk: Talk, spans: list[tuple[int, int]]) -> FlopMeter:
        meter = FlopMeter(self._thinker.lm_head)
        for start, end in spans:
            with meter, torch.inference_mode():
                self._decode(talk.pcm[start:end], talk.language)
        return meter

    def _decode(self, pcm: np.ndarray, language: str) -> None:
        config, prompt = self._loaded.config, self._prompts(language, "")
        embeddings, (num_audio,) = self._encoder([padded(pcm)])
        text = self._thinker.model.embed_tokens
        head, tail = (text(torch.tensor(ids, device=self._loaded.device)) for ids in (prompt.head, prompt.tail))
        x = torch.cat([head, embeddings[0, :num_audio].to(head.dtype), tail])[None]
        length = x.shape[1]
        most = min(config.max_new_tokens, 32 + int(config.max_new_tokens_per_s * len(pcm) / SAMPLE_RATE_HZ))
        if length + most > self._decoder.width:
            self._decoder.resize(1, length + most)
        choice = self._decoder.prefill([0], x, [length])
        for position in range(length, length + most):
            if int(choice.tokens[0]) in self._loaded.eos_token_ids:
                return
            choice = self._decoder.step(1, position + 1)
