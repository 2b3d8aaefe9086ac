"""The transcribe step with an engine of ours in place of a model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict

import numpy as np
import pytest

from pipeline.attempts import Ledger
from pipeline.config import EngineConfig, SegmentationConfig
from pipeline.engine.base import EngineError, EngineFailure, Result
from pipeline.schema import SAMPLE_RATE_HZ, Hypothesis, Segment
from pipeline.transcribe import Transcriber
from pipeline.units import Recording, Span, TranscribedUnit, Unit, UnitKey
from tests.rows import INFO, hypothesis

SECOND = SAMPLE_RATE_HZ


class FakeEngine:
    """Answers with the segment's name, at once; keeps what it was given."""

    info = INFO

    def __init__(self, answer: Callable[[Segment], Result] = lambda segment: hypothesis(segment.segment_id)) -> None:
        self.answer = answer
        self.submissions: list[list[Segment]] = []

    def submit(self, segments: Sequence[Segment]) -> Future[list[Result]]:
        self.submissions.append(list(segments))
        future: Future[list[Result]] = Future()
        future.set_result([self.answer(segment) for segment in segments])
        return future

    def close(self) -> None: ...


def transcriber(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine, **options: object) -> Transcriber:
    monkeypatch.setattr("pipeline.transcribe.create_engine", lambda *_: engine)
    return Transcriber(EngineConfig.model_validate(options), SegmentationConfig(), Ledger())


def recording(name: str, seconds: float, seed: int = 0, **fields: object) -> Recording:
    pcm = np.random.default_rng(seed).integers(-9, 9, int(seconds * SECOND)).astype(np.int16)
    return Recording(name, f"in/{name}.wav", pcm, **fields)  # type: ignore[arg-type]


def unit(*recordings: Recording, window_s: float = 2.0) -> Unit:
    """A unit whose recordings are cut every `window_s` seconds."""
    window = int(window_s * SECOND)
    spans = [
        Span(index, start, min(window, len(each.pcm) - start))
        for index, each in enumerate(recordings)
        for start in range(0, len(each.pcm), window)
    ]
    return Unit(UnitKey("a" * 16, 0, 0, "z"), list(recordings), spans)


def run(transcriber: Transcriber, unit: Unit) -> TranscribedUnit:
    return asyncio.run(transcriber(unit))  # type: ignore[arg-type]


def text_of(row_hypothesis: Hypothesis | None) -> str:
    assert row_hypothesis is not None
    return row_hypothesis.text


def test_rows_are_the_spans_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    speech = [(0, SECOND), (3 * SECOND, 4 * SECOND)]
    given = unit(recording("a", 5, 1, text_ref="ref", channel=1, speech=speech), recording("b", 3, 2, offset_s=60.5))
    done = run(transcriber(monkeypatch, engine, context="hotwords"), given)
    assert done.key == given.key and done.audio_s == 8.0 and done.engine == asdict(INFO) and done.busy_s >= 0
    assert [(row.recording_id, row.offset, row.duration) for row in done.segments] == [
        ("a", 0.0, 2.0), ("a", 2.0, 2.0), ("a", 4.0, 1.0), ("b", 60.5, 2.0), ("b", 62.5, 1.0),
    ]  # fmt: skip
    ids = [row.segment_id for row in done.segments]
    assert ids == ["a@0-2000", "a@2000-4000", "a@4000-5000", "b@60500-62500", "b@62500-63500"]
    assert [text_of(row.hypothesis) for row in done.segments] == ids, "each row has the answer to its own audio"
    assert {(row.audio_filepath, row.channel, row.text_ref) for row in done.segments[:3]} == {("in/a.wav", 1, "ref")}
    assert [row.speech_ratio for row in done.segments] == [0.5, 0.5, 0.0, 0.0, 0.0]
    assert [row.speech for row in done.segments[:3]] == [[(0, SECOND)], [(SECOND, 2 * SECOND)], []]
    assert done.decoded_s == 8.0 and {row.error for row in done.segments} == {None}
    (submitted,) = engine.submissions
    assert {segment.context for segment in submitted} == {"hotwords"}
    for segment, span in zip(submitted, given.spans, strict=True):
        expected = given.recordings[span.recording].pcm[span.start : span.start + span.num_samples]
        np.testing.assert_array_equal(segment.pcm, expected)
        assert np.shares_memory(segment.pcm, expected), "audio is not copied on its way to the engine"


@pytest.mark.parametrize(
    ("options", "of_vietnamese", "of_unknown"),
    [
        ({}, None, None),
        ({"trust_input_language": True}, "Vietnamese", None),
        ({"language": "English"}, "English", "English"),
        ({"language": "English", "trust_input_language": True}, "English", "English"),
    ],
)
def test_the_inputs_language_is_forced_when_trusted_only(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], of_vietnamese: str | None, of_unknown: str | None
) -> None:
    engine = FakeEngine()
    run(transcriber(monkeypatch, engine, **options), unit(recording("a", 1, language="vi"), recording("b", 1)))
    assert [segment.language for segment in engine.submissions[0]] == [of_vietnamese, of_unknown]


def test_a_segment_that_fails_is_a_row_among_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(segment: Segment) -> Result:
        if segment.segment_id.startswith("b"):
            return EngineFailure(segment.segment_id, "out_of_memory", "even alone")
        return hypothesis("fine")

    done = run(transcriber(monkeypatch, FakeEngine(answer)), unit(*(recording(name, 1) for name in "abc")))
    assert [(row.recording_id, row.error) for row in done.segments] == [
        ("a", None), ("b", "out_of_memory: even alone"), ("c", None),
    ]  # fmt: skip
    assert [row.hypothesis is None for row in done.segments] == [False, True, False]
    assert done.segments[1].duration == 1.0, "the failed stretch keeps its place in time"


def test_a_truncated_recording_gives_its_good_part_and_one_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    error = "truncated: MP3 breaks near 3.00 s"
    cut = recording("cut", 3, offset_s=10.0, error=error, text_ref="ref", language="vi-VN")
    done = run(transcriber(monkeypatch, FakeEngine()), unit(cut, recording("whole", 1)))
    failures = [row for row in done.segments if row.error is not None]
    assert [(row.recording_id, row.offset, row.duration) for row in done.segments if row.error is None] == [
        ("cut", 10.0, 2.0), ("cut", 12.0, 1.0), ("whole", 0.0, 1.0),
    ]  # fmt: skip
    (failure,) = failures
    assert (failure.recording_id, failure.error) == ("cut", "truncated: MP3 breaks near 3.00 s")
    assert (failure.offset, failure.duration, failure.hypothesis) == (13.0, 0.0, None), "where the good part ends"
    assert (failure.text_ref, failure.speech_ratio) == ("ref", None)
    languages = [(row.recording_id, row.language_ref) for row in done.segments]
    assert set(languages) == {("cut", "Vietnamese"), ("whole", None)}, "as the input names it, of failed rows, too"


def test_a_recording_without_audio_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    unread = recording("unread", 0, error="not_audio: nobody can read it")
    done = run(transcriber(monkeypatch, FakeEngine()), unit(recording("empty", 0), unread, recording("good", 1)))
    rows = {row.recording_id: row for row in done.segments}
    assert len(rows) == len(done.segments) == 3, "every recording ends as a row"
    assert rows["empty"].error == "no_samples: no audio in it" and rows["empty"].segment_id == "empty@failed"
    assert rows["unread"].error == "not_audio: nobody can read it" and rows["good"].error is None


def test_an_empty_unit_is_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(transcriber(monkeypatch, FakeEngine()), unit())
    assert done.segments == [] and done.audio_s == 0.0


def test_ids_are_unique_in_a_unit_and_across_the_parts_of_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    step = transcriber(monkeypatch, FakeEngine())
    first = unit(recording("a", 7), recording("a#ch1", 7), recording("a~2", 7, error="corrupt: x"), window_s=0.5)
    second = unit(recording("a", 5, offset_s=7.0, error="truncated: y"), window_s=0.5)
    ids = [row.segment_id for each in (first, second) for row in run(step, each).segments]
    assert len(set(ids)) == len(ids) == 14 * 3 + 1 + 10 + 1


def test_units_wait_for_their_own_answers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two units in flight, the later one answered first."""
    futures: list[Future[list[Result]]] = []

    class Slow(FakeEngine):
        def submit(self, segments: Sequence[Segment]) -> Future[list[Result]]:
            self.submissions.append(list(segments))
            futures.append(Future())
            return futures[-1]

    engine = Slow()
    step = transcriber(monkeypatch, engine)

    async def both() -> list[str]:
        finished: list[str] = []

        async def one(name: str) -> None:
            done = await step(unit(recording(name, 1)))
            finished.append(text_of(done.segments[0].hypothesis))

        tasks = [asyncio.create_task(one(name)) for name in ("early", "late")]
        while len(futures) < 2:
            await asyncio.sleep(0)
        futures[1].set_result([hypothesis("late")])
        await tasks[1]
        futures[0].set_result([hypothesis("early")])
        await tasks[0]
        return finished

    assert asyncio.run(both()) == ["late", "early"]


def test_a_broken_engine_is_not_a_failed_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FakeEngine):
        def submit(self, segments: Sequence[Segment]) -> Future[list[Result]]:
            future: Future[list[Result]] = Future()
            future.set_exception(EngineError("the engine broke: CUDA error"))
            return future

    with pytest.raises(EngineError, match="CUDA error"):
        run(transcriber(monkeypatch, Broken()), unit(recording("a", 1)))


class FakeEngines:
    """`create_engine` that gives the first engine, then the second."""

    def __init__(self, *engines: FakeEngine) -> None:
        self._engines = list(engines)

    def __call__(self, *_: object) -> FakeEngine:
        return self._engines.pop(0)


def two(
    monkeypatch: pytest.MonkeyPatch, first: FakeEngine, second: FakeEngine, ledger: Ledger, **options: object
) -> Transcriber:
    monkeypatch.setattr("pipeline.transcribe.create_engine", FakeEngines(first, second))
    segmentation = SegmentationConfig.model_validate(options)
    agree_with = EngineConfig(model="second", language="English", context="other")
    return Transcriber(EngineConfig(context="hotwords"), segmentation, ledger, None, agree_with)


def test_a_second_model_hears_every_segment_that_has_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(segment: Segment) -> Result:
        if segment.segment_id.startswith("silent"):
            return hypothesis("")
        return (
            EngineFailure(segment.segment_id, "not_finite", "x") if "bad" in segment.segment_id else hypothesis("one")
        )

    def other(segment: Segment) -> Result:
        return (
            EngineFailure(segment.segment_id, "not_finite", "x") if "odd" in segment.segment_id else hypothesis("two")
        )

    first, second = FakeEngine(answer), FakeEngine(other)
    given = unit(*(recording(name, 1) for name in ("a", "silent", "bad", "odd")), recording("cut", 1, goes_on=True))
    done = run(two(monkeypatch, first, second, Ledger()), given)
    opinions = {row.recording_id: row.second.text if row.second else None for row in done.segments}
    assert opinions == {"a": "two", "silent": None, "bad": None, "odd": None, "cut": "two"}
    (heard,) = second.submissions
    assert [segment.segment_id for segment in heard] == ["a@0-1000", "odd@0-1000", "cut@0-1000"]
    assert {(segment.language, segment.context) for segment in heard} == {("English", "other")}
    assert {segment.context for segment in first.submissions[0]} == {"hotwords"}
    assert done.agree_with == asdict(INFO) and done.decoded_s == 5.0, "the first engine's"
    assert {row.recording_id: row.is_whole for row in done.segments} == {
        "a": True, "silent": True, "bad": True, "odd": True, "cut": False,
    }  # fmt: skip


def test_what_kills_the_process_of_the_second_model_costs_its_opinion_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger()
    given = unit(recording("a", 1), recording("killer", 1))
    for work in (given.key.name, *["killer@0-1000 second"] * 3):
        ledger.begin(work)
    second = FakeEngine(lambda segment: hypothesis("two"))
    done = run(two(monkeypatch, FakeEngine(lambda segment: hypothesis("one")), second, ledger), given)
    assert [row.second is not None for row in done.segments] == [True, False]
    assert [text_of(row.hypothesis) for row in done.segments] == ["one", "one"]
