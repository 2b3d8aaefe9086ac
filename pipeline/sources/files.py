"""Plain audio files: splits are runs of consecutive files that fill a unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby

from pipeline import redact, storage
from pipeline.listing import FileInfo
from pipeline.sources.fetch import fetch
from pipeline.sources.sample import (
    AUDIO_SUFFIXES,
    SIDECAR_SUFFIXES,
    Filler,
    Sample,
    is_hidden,
    read_sentences,
    read_sidecars,
    suffix_of,
)
from pipeline.units import Split, estimated_seconds

_MAX_FILES = 5_000  # of a split, which travels as one row


def plan(infos: Iterable[FileInfo], target_s: float, input_index: int, any_name: bool = False) -> Iterator[Split]:
    """Items are `[url, num_bytes, suffixes of its sidecars]`. A file estimated longer than `target_s` is a split.

    Of `infos`, those with an audio suffix are read, or with `any_name` all.
    """
    filler = Filler(target_s, _MAX_FILES)
    folders = groupby(infos, key=lambda info: storage.folder_of(info.url))
    found = (pair for _, folder in folders for pair in _with_sidecars(list(folder), any_name))
    for _, run in groupby(found, key=lambda pair: filler.run_of(_seconds(pair[0]))):
        members = list(run)
        yield Split(
            "files",
            [[info.url, info.num_bytes, sidecars] for info, sidecars in members],
            sum(info.num_bytes for info, _ in members),
            sum(_seconds(info) for info, _ in members),
            input_index,
        )


def samples(split: Split, options: storage.Options) -> Iterator[Sample]:
    for url, num_bytes, suffixes in split.items:
        sidecars = [f"{url.rpartition('.')[0]}.{suffix}" for suffix in suffixes]
        beside = [(name, storage.read_bytes(name, options)) for name in sidecars]
        text, language = read_sidecars(beside)
        name = redact.names(url)
        yield Sample(
            recording_id=name,
            audio_filepath=name,
            estimated_s=estimated_seconds(url, num_bytes),
            open=partial(fetch, url, options),
            text_ref=text,
            language=language,
            sentences=read_sentences(beside),
        )


def _with_sidecars(folder: list[FileInfo], any_name: bool) -> Iterator[tuple[FileInfo, list[str]]]:
    """The audio files of one folder's listing with what the same listing shows beside them; nothing is looked up."""
    beside: dict[str, list[str]] = {}
    for info in folder:
        stem, _, suffix = info.url.rpartition(".")
        if suffix in SIDECAR_SUFFIXES:
            beside.setdefault(stem, []).append(suffix)
    for info in folder:
        if any_name or (suffix_of(info.name) in AUDIO_SUFFIXES and not is_hidden(info.name)):
            yield info, beside.get(info.url.rpartition(".")[0], [])


def _seconds(info: FileInfo) -> float:
    return estimated_seconds(info.name, info.num_bytes)
