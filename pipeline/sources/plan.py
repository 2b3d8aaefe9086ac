"""From the inputs of a config to splits, and from a split to its samples: the one place that knows every source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from pipeline import storage
from pipeline.config import ConfigError, InputConfig
from pipeline.listing import FileInfo, has_glob, iter_files
from pipeline.sources import files, manifest, parquet, webdataset
from pipeline.sources.sample import AUDIO_SUFFIXES, Sample, is_hidden
from pipeline.units import Split

_SUFFIXES = {
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "parquet": (".parquet",),
    "manifest": (".jsonl", ".jsonl.gz", ".json", ".json.gz"),
    "files": tuple(sorted(f".{suffix}" for suffix in AUDIO_SUFFIXES)),
}
_LOOKED_FOR = {kind: ", ".join(suffixes) for kind, suffixes in _SUFFIXES.items()} | {
    "files": "audio files (.wav, .flac, .mp3, .ogg, .opus, .m4a, .webm and more)",
    "auto": ".tar, .tar.gz, .parquet, .jsonl or audio files (.wav, .flac, .mp3, .ogg, .opus, .m4a, .webm and more)",
}


def plan(inputs: Sequence[InputConfig], options: storage.Options, target_s: float) -> Iterator[Split]:
    """The splits of all inputs, lazily and in an order that depends on names alone; a split named twice comes once.

    `target_s` is `units.target_s`. Raises ConfigError for an input that holds nothing to read, or two kinds of it.
    """
    seen: set[str] = set()
    for index, config in enumerate(inputs):
        num_splits = 0
        for split in _plan_input(config, options, target_s, index):
            num_splits += 1
            if split.split_id not in seen:
                seen.add(split.split_id)
                yield split
        if num_splits == 0:
            raise ConfigError(
                f"inputs[{index}] {config.path}: nothing to read there; looked for {_LOOKED_FOR[config.kind]}"
            )


def samples(split: Split, options: storage.Options) -> Iterator[Sample]:
    """The samples of a split in its order: the same split gives the same samples."""
    read = {
        "webdataset": webdataset.samples,
        "files": files.samples,
        "parquet": parquet.samples,
        "manifest": manifest.samples,
    }
    return read[split.kind](split, options)


def _plan_input(config: InputConfig, options: storage.Options, target_s: float, index: int) -> Iterator[Split]:
    infos: Iterable[FileInfo] = iter_files(config.path, options)
    kind = config.kind if config.kind != "auto" else _kind_of(config.path, manifests=True)
    is_file = False  # one file by its own name, which is read as `kind` whatever its suffix
    if kind is None:
        kind, infos = _by_content(config, index, iter(infos))
    elif not has_glob(config.path):
        first = next(iter(infos), None)
        is_file = first is not None and first.url == storage.resolve(config.path)
        infos = chain([first] if first else [], infos)
    if not is_file:
        infos = (info for info in infos if _belongs(info, kind))
    if kind == "webdataset":
        return webdataset.plan(infos, options, index)
    if kind == "parquet":
        return parquet.plan(infos, config, options, target_s, index)
    if kind == "manifest":
        return manifest.plan(infos, options, target_s, index)
    return files.plan(infos, target_s, index, any_name=is_file)


def _by_content(config: InputConfig, index: int, infos: Iterator[FileInfo]) -> tuple[str, Iterable[FileInfo]]:
    """The first file that is tar, Parquet or audio says what a folder holds; one of another kind is a mistake.

    JSON in a folder is taken for sidecars: a manifest is named by its own path.
    """
    before: list[FileInfo] = []
    for info in infos:
        before.append(info)
        kind = _kind_of(info.url, manifests=False)
        if kind is not None and not is_hidden(info.url):
            return kind, _of_one_kind(kind, config, index, before, infos)
    return "files", ()


def _of_one_kind(
    kind: str, config: InputConfig, index: int, before: list[FileInfo], rest: Iterator[FileInfo]
) -> Iterator[FileInfo]:
    yield from (info for info in before if _belongs(info, kind))
    for info in rest:
        other = _kind_of(info.url, manifests=False)
        if other not in (None, kind) and not is_hidden(info.url):
            raise ConfigError(
                f"inputs[{index}] {config.path}: holds {kind} ({before[-1].url}) and {other} ({info.url}); "
                f"set its kind to one of them, or list both as inputs of their own"
            )
        if _belongs(info, kind):
            yield info


def _kind_of(name: str, manifests: bool) -> str | None:
    lowered = (name.partition("?")[0] if "://" in name else name).lower()
    for kind, suffixes in _SUFFIXES.items():
        if lowered.endswith(suffixes) and (manifests or kind != "manifest"):
            return kind
    return None


def _belongs(info: FileInfo, kind: str) -> bool:
    """Audio keeps its neighbours: files.plan finds sidecars among them."""
    return kind == "files" or (not is_hidden(info.url) and info.url.lower().endswith(_SUFFIXES[kind]))
