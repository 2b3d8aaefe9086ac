"""What streams say against qwen3-asr-causal's online processor: same weights, same settings, a decode a block.

Its own log-mel depends on how audio comes in chunks, so it is given ours. What it publishes differs from ours in one
way, which is checked: at the end of a segment whose hypothesis has changed its mind about published words, it goes on
at the word of the same number, and so doubles or drops words where their number has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex

from pipeline import text
from pipeline.engine.causal.batch import StreamBatch
from pipeline.engine.causal.roll import RollPolicy
from pipeline.engine.causal.settings import Settings
from pipeline.engine.causal.state import Update
from pipeline.engine.causal.tower import Geometry
from pipeline.engine.model import LoadedModel
from tests.engine.causal.recordings import heldout, joined
from tests.engine.causal.streams import loaded_from, text_of, transcribed
from tests.engine.causal.upstream import STUDENT, runtime, transcribe

pytestmark = pytest.mark.timeout(600)
AHEAD_S = 1e6


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return loaded_from(STUDENT)


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream commits by words in every script."""
    monkeypatch.setattr(text, "_UNIT", regex.compile(r"\s*\S+"))


def cut(pcm: np.ndarray, block_frames: int = 192) -> np.ndarray:
    """A recording of whole blocks and half of one: enough for the runtime, which counts the frames of a chunk and not
    those that wait from before, to see that they make a block too many for a segment."""
    block, rest = block_frames * 160, block_frames * 80
    return pcm[: (len(pcm) - rest) // block * block + rest]


def by_number(updates: Sequence[Update]) -> str:
    """What upstream's rule publishes of these hypotheses: words by their number, those that a block has committed. It
    holds the last blocks back until it ends the segment, with all the rest."""
    *before, _, _, last = updates
    assert last.is_last
    completed: list[str] = []
    emitted: list[str] = []
    committed, num_out = "", 0
    for update in before:
        committed += update.text
        if update.segment is not None:
            completed, committed = completed + update.hypothesis.split(), ""
        elif len(target := completed + committed.split()) >= num_out:
            emitted += target[num_out:]
            num_out = len(target)
    if updates[-2].segment is not None or updates[-3].segment is not None:
        raise NotImplementedError("a recording whose last blocks end a segment: choose another")
    target = completed + last.hypothesis.split()
    return " ".join(emitted + target[num_out:])


@pytest.mark.parametrize(
    ("name", "language", "code", "first"),
    [("english", "English", "en", 0), ("vietnamese", "Vietnamese", "vi", 0)],
)
def test_committed_text_is_that_of_the_runtime(
    loaded: LoadedModel, tmp_path: Path, name: str, language: str, code: str, first: int
) -> None:
    pcm, events = cut(joined(name, 80, first).pcm), list[dict[str, Any]]()
    theirs = transcribe(runtime(STUDENT, tmp_path, language=code), pcm, True, events.append)
    (updates,) = transcribed(
        StreamBatch(loaded, Settings(max_waiting_s=AHEAD_S, roll=RollPolicy(12.0, at="mark"))), [pcm], language
    )
    check_hypotheses(updates, events)
    assert by_number(updates).split() == theirs.split()
    ours = text_of(updates)
    print(f"{name} {first}: {'same text' if ours.split() == theirs.split() else difference(ours, theirs)}")


def check_hypotheses(updates: Sequence[Update], events: Sequence[dict[str, Any]]) -> None:
    """The hypothesis of every block, and what of its segment is committed while that is open; but in the last two, as
    upstream decodes once more without new audio, which makes its hypothesis stable."""
    new = [event for event in events if event["new_cached_steps"] or event["is_flush"]]
    published, committed = "", {}
    for update in updates:
        published = "" if update.segment else published + update.text
        committed[id(update)] = published.strip()
    for left, update, event in zip(reversed(range(len(new))), heard(updates), new, strict=True):
        assert update.hypothesis == event["segment_hypothesis"]
        assert update.segment or left < 2 or committed[id(update)] == event["segment_committed"]
        is_sentence = update.segment is not None and update.segment.why == "sentence"
        assert is_sentence == (event.get("segment_rollover_reason") == "punctuation")


def difference(ours: str, theirs: str) -> str:
    import difflib

    one, other = theirs.split(), ours.split()
    changes = difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
    return "; ".join(
        f"{' '.join(one[a:b])!r} -> {' '.join(other[c:d])!r}" for kind, a, b, c, d in changes if kind != "equal"
    )


@pytest.mark.parametrize(
    ("name", "language", "code", "block_frames"),
    [("chinese", "Chinese", "zh", 192), ("digits", "English", "en", 192), ("vietnamese", "Vietnamese", "vi", 96)],
)
def test_hypotheses_are_those_of_the_runtime_where_only_length_ends_a_segment(
    loaded: LoadedModel, tmp_path: Path, name: str, language: str, code: str, block_frames: int
) -> None:
    """Chinese among them, whose full stop upstream does not know, and whose sentences it takes for a word each."""
    pcm, events = cut(joined(name, 40).pcm, block_frames), list[dict[str, Any]]()
    asr = runtime(STUDENT, tmp_path, language=code, block_frames=block_frames)
    asr.segment_punct_rollover = False
    transcribe(asr, pcm, True, events.append)
    settings = Settings(Geometry(block_frames), max_waiting_s=AHEAD_S, roll=RollPolicy(at="fixed"))
    (updates,) = transcribed(StreamBatch(loaded, settings), [pcm], language)
    want = [event["segment_hypothesis"] for event in events if event["new_cached_steps"] or event["is_flush"]]
    assert [update.hypothesis for update in heard(updates)] == want


def test_recordings_of_fourteen_to_thirty_seconds_are_those_of_the_runtime(loaded: LoadedModel, tmp_path: Path) -> None:
    """All in one batch here, one by one there."""
    asr = runtime(STUDENT, tmp_path)
    clips = [cut(each.pcm) for each in heldout("windows")[:6]]
    said = transcribed(StreamBatch(loaded, Settings(max_waiting_s=AHEAD_S, roll=RollPolicy(12.0, at="mark"))), clips)
    for pcm, updates in zip(clips, said, strict=True):
        events: list[dict[str, Any]] = []
        transcribe(asr, pcm, True, events.append)
        check_hypotheses(updates, events)


def heard(updates: Sequence[Update]) -> list[Update]:
    """Those of new audio."""
    return [
        now
        for before, now in zip([None, *updates], updates, strict=False)
        if not before or now.heard_s > before.heard_s
    ]
