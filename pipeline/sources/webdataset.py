"""WebDataset tar shards: one split a shard, read in one pass.

A plain tar on a store that can seek is walked by its headers: payloads of committed units are passed over. A gzipped
tar has to be read through, and its audio is kept aside (on disk when large) until its sidecars are known.
"""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, BinaryIO, Self, cast

from pipeline import redact, storage
from pipeline.listing import FileInfo
from pipeline.sources.sample import (
    AUDIO_SUFFIXES,
    SIDECAR_SUFFIXES,
    Sample,
    UniqueIds,
    is_hidden,
    read_sentences,
    read_sidecars,
    suffix_of,
)
from pipeline.units import Split, estimated_seconds

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_SIDECAR_BYTES = 16 << 20
_MAX_NAME_BYTES = 1 << 20  # of a long name or extended header, which tarfile reads whole
_MAX_SPOOLED_BYTES = 8 << 30  # a recording of 70 hours; what is larger is a bomb, or wants a local disk of its own
_PEEKED_MEMBERS = 20


@dataclass(slots=True)
class _Member:
    name: str
    num_bytes: int
    open: Callable[[], BinaryIO] | None
    error: str | None = None
    start: int | None = None  # its first byte in the tar, where its bytes are all there in a row

    @property
    def key(self) -> str:
        """WebDataset's: the path up to the first dot of the last component."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.split(".", 1)[0]


_DAMAGE = (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]


_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged header in mid-file for the end of the archive, and reads a name of any length; here they
    are errors."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except _DAMAGE as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        limit = _MAX_NAME_BYTES if self.type in _HEADERS else sys.maxsize >> 1
        if not 0 <= self.size <= limit:
            raise tarfile.ReadError(f"a header of {self.size} bytes at byte {tar.offset}")
        return super()._proc_member(tar)  # type: ignore[misc]


def plan(infos: Iterable[FileInfo], options: storage.Options, input_index: int) -> Iterator[Split]:
    """One split a shard, its length estimated as if all audio of the input were of the first shard's codec."""
    codec = ""
    for info in infos:
        codec = codec or _first_codec(info.url, options) or "flac"
        seconds = estimated_seconds(f"x.{codec}", info.num_bytes)
        yield Split("webdataset", [[info.url, info.num_bytes]], info.num_bytes, seconds, input_index)


def _first_codec(url: str, options: storage.Options) -> str | None:
    """The suffix of the first audio among a shard's first members; None too where the shard cannot be read: that is
    found out when it is read as a whole."""
    try:
        with storage.open_read(url, options) as file:
            mode = "r:*" if file.seekable() else "r|*"
            archive = tarfile.open(fileobj=file, mode=mode, tarinfo=_StrictTarInfo)  # type: ignore[call-overload]  # noqa: SIM115
            names = (
                info.name for info in islice(archive, _PEEKED_MEMBERS) if info.isfile() and not is_hidden(info.name)
            )
            return next((suffix_of(name) for name in names if suffix_of(name) in AUDIO_SUFFIXES), None)
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError):
        return None


def samples(split: Split, options: storage.Options) -> Iterator[Sample]:
    """A sample for each audio member, in the order of the tar, with the sidecars of its key.

    A key without audio and the point where a damaged tar breaks are samples with an error.
    """
    url = split.items[0][0]
    ids, shown = UniqueIds(), redact.names(url)
    with storage.open_read(url, options) as file:
        for key, members in groupby(_members(url, file), key=lambda member: member.key):
            yield from _key_samples(shown, key, list(members), ids)


def _key_samples(url: str, key: str, members: list[_Member], ids: UniqueIds) -> Iterator[Sample]:
    audio = [m for m in members if m.error or suffix_of(m.name) in AUDIO_SUFFIXES]
    others = [
        m for m in members if m.open and suffix_of(m.name) in SIDECAR_SUFFIXES and m.num_bytes <= _MAX_SIDECAR_BYTES
    ]
    if not audio:
        suffixes = ", ".join(sorted({f".{suffix_of(m.name)}" for m in members}))
        name = f"{url}/{key}"
        yield Sample(ids.claim(name), name, 0.0, error=f"no_audio: the key has no audio member, only {suffixes}")
    for member in audio:
        name = f"{url}/{member.name}"
        # names with dots share a key ("talk.v1.0001.wav"): a sidecar of the very same stem goes first
        stem = member.name.rpartition(".")[0]
        own = [m for m in others if m.name.rpartition(".")[0] == stem] or others
        beside = [(m.name, m.open().read()) for m in own if m.open]
        text, language = read_sidecars(beside)
        yield Sample(
            recording_id=ids.claim(name),
            audio_filepath=name,
            estimated_s=estimated_seconds(member.name, member.num_bytes),
            open=member.open,
            text_ref=text,
            language=language,
            place=None if member.start is None else (member.start, member.num_bytes),
            error=member.error,
            sentences=read_sentences(beside),
        )


def _members(url: str, file: BinaryIO) -> Iterator[_Member]:
    """The tar's files in order; where it is damaged, a last member says so."""
    try:
        if _is_gzip(file):
            with gzip.open(file) as unzipped:
                yield from _archive_members(cast(BinaryIO, unzipped), can_seek=False, local=True)
        else:
            yield from _archive_members(file, can_seek=file.seekable(), local=storage.is_local(url))
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError) as error:
        # the last two: tarfile does not check the numbers in an extended header
        yield _Member(
            "(damaged)", 0, None, f"damaged_tar: {redact.names(url)} breaks here, what follows is lost: {error}"
        )


def _archive_members(file: BinaryIO, can_seek: bool, local: bool) -> Iterator[_Member]:
    end = sys.maxsize
    if can_seek:
        end = file.seek(0, io.SEEK_END)
        file.seek(0)
    # never closed: `file` is the caller's, and openers outlive this generator
    archive = tarfile.open(fileobj=file, mode="r:" if can_seek else "r|", tarinfo=_StrictTarInfo)  # noqa: SIM115
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # or it keeps every header it has seen
        if not 0 <= info.size <= sys.maxsize >> 1:
            raise tarfile.ReadError(f"{info.name} says {info.size} bytes")
        if info.isdir() or is_hidden(info.name):
            continue
        if not info.isfile():
            yield _Member(info.name, 0, None, "no_audio: a link or a device, not a file")
            continue
        if info.offset_data + _stored_bytes(info) > end:
            raise tarfile.ReadError(f"the file ends inside {info.name}")
        # holes cost a bomb nothing: they are unpacked bytes wherever the tar lies
        if info.size > _MAX_SPOOLED_BYTES and (info.issparse() or not (can_seek and local)):
            limit = f"{_MAX_SPOOLED_BYTES >> 30} GiB are unpacked from a compressed, sparse or remote one"
            yield _Member(info.name, 0, None, f"too_large: {info.size / 2**30:.1f} GiB; up to {limit}")
            continue
        start = info.offset_data if can_seek and not info.issparse() else None
        yield _Member(info.name, info.size, _opener(archive, info, can_seek, local), start=start)


def _stored_bytes(info: tarfile.TarInfo) -> int:
    """Bytes of a member in the tar: of a sparse one, what lies between its holes."""
    stretches = cast("list[tuple[int, int]] | None", info.sparse)  # typeshed takes it for bytes
    return info.size if stretches is None else sum(num_bytes for _, num_bytes in stretches)


def _opener(archive: tarfile.TarFile, info: tarfile.TarInfo, can_seek: bool, local: bool) -> Callable[[], BinaryIO]:
    def payload() -> BinaryIO:
        return cast(BinaryIO, archive.extractfile(info))

    if not can_seek:
        kept = storage.spool(payload())
        return lambda: kept
    return payload if local else lambda: storage.spool(payload())


def _is_gzip(file: BinaryIO) -> bool:
    if not file.seekable():
        return False
    magic = file.read(len(_GZIP_MAGIC))
    file.seek(0)
    return magic == _GZIP_MAGIC
