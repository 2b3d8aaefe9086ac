"""The causal tower that comes with the package: what it was made from, and how well it hears."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.config import EngineConfig
from pipeline.engine.causal.batch import StreamBatch
from pipeline.engine.causal.load import Causal, load_causal
from pipeline.engine.causal.state import ClosedSegment, Resume, Update
from pipeline.engine.causal.weights import load_tower
from pipeline.engine.checkpoint import resolve
from pipeline.metrics import ErrorCounts, error_counts
from tests.engine.causal.recordings import Recording, heldout
from tests.engine.causal.streams import at_random, text_of, transcribed
from tests.engine.causal.test_parity import AHEAD_S


@pytest.fixture(scope="module")
def windows() -> list[Recording]:
    """14 to 28 s each; those of a language together."""
    return sorted(heldout("windows"), key=lambda item: item.language)


def heard(items: Sequence[Recording], tower: str, **streams: object) -> list[list[Update]]:
    causal = loaded(tower, **streams)
    found: list[list[Update]] = []
    for language in dict.fromkeys(item.language for item in items):
        clips = [item.pcm for item in items if item.language == language]
        found += transcribed(StreamBatch(causal.loaded, causal.settings), clips, language)
    return found


def loaded(tower: str, **streams: object) -> Causal:
    options = {"name": "causal", "model": "embedded/student", "tower": tower, "dtype": "float32"}
    own = {"max_waiting_s": AHEAD_S, "repetition_penalty": 1, "no_repeat_ngram": 0}
    return load_causal(EngineConfig.model_validate(options | {"streams": own | streams}))


def errors(items: Sequence[Recording], said: Sequence[Sequence[Update]]) -> ErrorCounts:
    total = ErrorCounts()
    for item, updates in zip(items, said, strict=True):
        total += error_counts(item.text, "".join(update.text for update in updates), item.language)
    return total


def segments(said: Sequence[Sequence[Update]]) -> list[ClosedSegment]:
    return [update.segment for updates in said for update in updates if update.segment is not None]


def test_it_belongs_to_the_student_and_says_what_it_knows() -> None:
    checkpoint = resolve("embedded/student")
    model = load_causal(EngineConfig(name="causal", model="embedded/student", tower="embedded/tower"))
    assert model.languages == {"English", "Vietnamese", "Chinese"}
    found = load_tower("embedded/tower", model.loaded.model.thinker.audio_tower, "embedded/student")
    assert found.notes["base_model"] == "embedded/student" and found.notes["base_revision"] == checkpoint.revision
    assert found.notes["block_frames"] == "96,192" and found.notes["left_steps"] == "195"


def test_it_hears_better_than_the_tower_that_it_was_made_from(windows: list[Recording]) -> None:
    """And segments that end at sentences are better than those that end wherever they are long enough."""
    rates: dict[str, float] = {}
    said: dict[str, list[list[Update]]] = {}
    for name, tower, roll in (("ours", "embedded/tower", "sentence"), ("fixed", "embedded/tower", "fixed"),
                              ("untrained", "offline", "sentence")):  # fmt: skip
        said[name] = heard(windows, tower, roll=roll)
        rates[name] = errors(windows, said[name]).rate
    print({name: f"{100 * rate:.1f} %" for name, rate in rates.items()})
    assert rates["ours"] < 0.8 * rates["untrained"] and rates["ours"] < rates["fixed"]
    why: dict[str, list[ClosedSegment]] = defaultdict(list)
    for segment in segments(said["ours"]):
        why[segment.why].append(segment)
    for segment in (*why["sentence"], *why["clause"], *why["cap"]):
        assert 7.0 - 0.08 <= segment.duration_s <= 16.0
    assert len(why["sentence"]) > len(why["cap"]) + len(why["clause"])


def test_what_is_out_is_never_later_than_the_next_segment(windows: list[Recording]) -> None:
    for updates in heard(windows[:6], "embedded/tower"):
        text = ""
        for update in updates:
            text += update.text
        for segment in segments([updates]):
            waits = np.array(segment.published_s) - segment.offset_s
            assert (np.diff(waits) >= 0).all() and waits.max(initial=0.0) <= segment.duration_s + 4.0
        assert "".join(text.split()) == "".join("".join(s.text.split()) for s in segments([updates]))


def test_no_batch_and_no_chunks_change_a_text_where_segments_end_at_pauses(windows: list[Recording]) -> None:
    causal, clips = loaded("embedded/tower"), [item.pcm for item in windows if item.language == "English"][:6]
    alone = [transcribed(StreamBatch(causal.loaded, causal.settings), [pcm])[0] for pcm in clips]
    for seed in range(3):
        together = at_random(StreamBatch(causal.loaded, causal.settings), clips, random.Random(seed))
        for one, other in zip(alone, together, strict=True):
            assert text_of(one) == text_of(other)
            assert [s.duration_s for s in segments([one])] == [s.duration_s for s in segments([other])]


def test_a_stream_goes_on_behind_a_pause(windows: list[Recording]) -> None:
    """After each segment, in a batch that knows nothing of it but where it stood."""
    causal, pcm = loaded("embedded/tower"), np.concatenate([item.pcm for item in windows[-3:]])
    whole = transcribed(StreamBatch(causal.loaded, causal.settings), [pcm], "Vietnamese")[0]
    text, resume, num_segments = "", Resume(), 0
    has_ended = False
    while not has_ended:
        batch = StreamBatch(causal.loaded, causal.settings)
        stream = batch.open("a", "Vietnamese", resume=resume)
        batch.push(stream, pcm[resume.first_sample :])
        batch.end(stream)
        closed: list[Update] = []
        while not closed:
            updates = batch.turn()
            text += "".join(update.text for update in updates)
            closed = [update for update in updates if update.segment is not None]
        num_segments += 1
        has_ended, resume = closed[0].is_last, closed[0].resume or resume
    assert num_segments >= 3 and text == text_of(whole)
