"""The streaming contract: what of a live transcript may be shown, and when.

At every update but the last one what a hypothesis says of the newest 250 ms of audio is hidden, and text is published
only where the hypothesis goes on from what is out; what is out is never rewritten, at the end of the stream neither.
As qwen3_asr_causal publishes its figures (github.com/QuentinFuxa/Qwen3-ASR-causal, docs/streaming_contract.md).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from pipeline.text import tokens

TAIL_S = 0.25
_LONGEST_WORD = 64  # characters


@dataclass(frozen=True, slots=True)
class Update:
    """A system's whole transcript so far, `at_s` seconds after the stream began, of `heard_s` seconds of audio.

    `open_from` is the index in `text` where what belongs to the newest `open_s` seconds of audio begins: a system that
    closes segments says where the open one stands, others have 0 and `heard_s`. `word_ends_s` are the ends of the
    words (`str.split`) of that open text, seconds of the stream, where a system aligns them. From index `held_from` on
    a system holds its text back itself; None: it stands by all of it.
    """

    at_s: float
    heard_s: float
    text: str
    open_from: int = 0
    open_s: float = 0.0
    word_ends_s: Sequence[float] = ()
    held_from: int | None = None
    is_final: bool = False

    @property
    def offered(self) -> str:
        """What the system stands by, its newest 250 ms included."""
        return self.text if self.is_final else self.text[: self.held_from].rstrip()


@dataclass(frozen=True, slots=True)
class Published:
    """`text` that was published at `at_s`."""

    text: str
    at_s: float


@dataclass(slots=True)
class Contract:
    """Publishes what updates allow, in order. `num_refused` counts updates that did not go on from what was out."""

    published: list[Published] = field(default_factory=list)
    num_refused: int = 0
    _text: str = ""

    @property
    def text(self) -> str:
        return self._text

    def take(self, update: Update) -> str:
        """What of an update is new to the public."""
        shown = update.text if update.is_final else without_tail(update)
        if shown.startswith(self._text):
            new = shown[len(self._text) :]
        elif update.is_final:
            new = _after(self._text, shown)
        else:
            # a shorter beginning of what is out is no change of mind
            self.num_refused += not self._text.startswith(shown)
            return ""
        if new:
            self.published.append(Published(new, update.at_s))
            self._text += new
        return new


def without_tail(update: Update) -> str:
    """An update's text without what it says of the newest 250 ms: by its words' ends where it has them, else the share
    of the open text that they are of the open audio. Cut at words (characters where they are not spaced), and where the
    system holds back."""
    closed, open_text = update.text[: update.open_from], update.text[update.open_from :]
    limit_s = update.heard_s - TAIL_S
    if update.word_ends_s:
        keep = bisect_right(update.word_ends_s, limit_s)
        end = _end_of_word(open_text, keep)
    else:
        open_s = update.open_s or update.heard_s
        end = int(len(open_text) * max(0.0, 1 - TAIL_S / open_s)) if open_s > 0 else 0
        if " " in open_text.strip() and end < len(open_text):
            end = open_text.rfind(" ", 0, end + 1)
    return (closed + open_text[: max(end, 0)])[: update.held_from].rstrip()


def _end_of_word(text: str, count: int) -> int:
    at = 0
    for word in text.split()[:count]:
        at = text.index(word, at) + len(word)
    return at


def _after(published: str, final: str) -> str:
    """What a final text has behind what is out, where it does not begin with it: behind the words of it that match the
    last published ones."""
    said, heard = published.split(), final.split()
    blocks = SequenceMatcher(None, said, heard, autojunk=False).get_matching_blocks()
    last = max((block for block in blocks if block.size), key=lambda block: block.a + block.size, default=None)
    keep = len(said) if last is None else last.b + last.size + (len(said) - last.a - last.size)
    rest = " ".join(heard[keep:])
    return f" {rest}" if rest and published else rest


@dataclass(frozen=True, slots=True)
class SpokenWord:
    """A word (`text.tokens`: a character where they are not spaced) of a reference, and when it ends."""

    word: str
    end_s: float


def spoken_words(sentences: Sequence[dict[str, object]]) -> list[SpokenWord]:
    """Of sentences with `text`, `offset` and `duration` in seconds: their words share the time by their length."""
    words = []
    for sentence in sentences:
        found = tokens(str(sentence["text"]))
        total, at = sum(map(len, found)), 0
        for word in found:
            at += len(word)
            end_s = float(sentence["offset"]) + float(sentence["duration"]) * at / total  # type: ignore[arg-type]
            words.append(SpokenWord(word, end_s))
    return words


def latencies(published: Sequence[Published], spoken: Sequence[SpokenWord]) -> list[float]:
    """Seconds from the end of a word to its publication, of published words that the reference has in this place."""
    said: list[tuple[str, float]] = []
    last = ""  # the word that the next part may go on
    for part in published:
        text = last + part.text
        said += [(word, part.at_s) for word in tokens(text)[len(tokens(last)) :]]
        last = text[text.rfind(" ") + 1 :][-_LONGEST_WORD:]
    if not said or not spoken:
        return []
    import jiwer

    words = " ".join(word.word for word in spoken), " ".join(word for word, _ in said)
    return [
        said[chunk.hyp_start_idx + i][1] - spoken[chunk.ref_start_idx + i].end_s
        for chunk in jiwer.process_words(*words).alignments[0]
        if chunk.type == "equal"
        for i in range(chunk.ref_end_idx - chunk.ref_start_idx)
    ]
