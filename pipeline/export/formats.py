"""The formats by name: what of each row they need, and who writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.export.folder import Folder, Writer
from pipeline.export.hf import HfWriter
from pipeline.export.jsonl import JsonlWriter
from pipeline.export.lhotse import LhotseWriter
from pipeline.export.nemo import NemoTarWriter, NemoWriter
from pipeline.export.rows import LIGHT
from pipeline.export.subtitles import SubtitleWriter
from pipeline.export.webdataset import WebdatasetWriter
from pipeline.schema import TRANSCRIPTS

Format = Literal["nemo", "hf", "lhotse", "webdataset", "srt", "vtt", "jsonl"]
FORMATS: tuple[Format, ...] = get_args(Format)
Audio = Literal["copy", "reference", "none"]


@dataclass(frozen=True, slots=True)
class Kind:
    """`audio` says what becomes of it: the first is the default. `only_kept` is whether rows that a filter caught are
    left out unless asked for, `only_heard` whether failed rows have no place."""

    audio: tuple[Audio, ...]
    only_kept: bool
    only_heard: bool
    columns: tuple[str, ...]
    writer: Callable[[Folder, Audio], Writer]


def _nemo(folder: Folder, audio: Audio) -> Writer:
    return NemoTarWriter(folder) if audio == "copy" else NemoWriter(folder)


_SUBTITLED = (*LIGHT, "words", "sentences")
KINDS: dict[Format, Kind] = {
    "nemo": Kind(("reference", "copy"), True, True, LIGHT, _nemo),
    "hf": Kind(("copy",), True, True, LIGHT, lambda folder, _: HfWriter(folder)),
    "lhotse": Kind(("copy",), True, True, LIGHT, lambda folder, _: LhotseWriter(folder)),
    "webdataset": Kind(("copy",), True, True, LIGHT, lambda folder, _: WebdatasetWriter(folder)),
    "srt": Kind(("none",), False, True, _SUBTITLED, lambda folder, _: SubtitleWriter(folder, "srt")),
    "vtt": Kind(("none",), False, True, _SUBTITLED, lambda folder, _: SubtitleWriter(folder, "vtt")),
    "jsonl": Kind(("none",), False, False, tuple(TRANSCRIPTS.names), lambda folder, _: JsonlWriter(folder)),
}
