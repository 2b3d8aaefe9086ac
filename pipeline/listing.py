"""What is there: files by folder, glob or brace range, lazily and in an order that never changes.

A million local files list in seconds (os.scandir, one folder at a time) and S3 prefixes page by page, so that a plan
starts at once and memory holds one folder, never the whole input.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from fsspec.utils import glob_translate

from pipeline import storage
from pipeline.storage import FileUnavailableError, Options, StorageError, explained

_MAGIC = re.compile(r"[*?\[]")
_ONE_BY_ONE = 16
"""Remote names of one folder are looked up singly up to this many, and by listing the folder beyond."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file: its absolute local path or URL, and its size."""

    url: str
    num_bytes: int

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def expand(path: str) -> Iterator[str]:
    """The names that a brace pattern stands for, in the order written: `{000..127}` counts, `{a,b}` lists."""
    try:
        yield from braceexpand(path)
    except ValueError as error:
        raise StorageError(f"{path}: a brace is open or closed without its other half") from error


def has_glob(path: str) -> bool:
    if storage.protocol_of(path) in ("http", "https"):
        path = path.partition("?")[0]  # a query, as presigned URLs have
    return _MAGIC.search(path) is not None


def iter_files(path: str, options: Options) -> Iterator[FileInfo]:
    """Every file that `path` stands for: a file, a folder (all that is under it), a glob, braces around any of these.

    A local path that exists is taken as written, whatever characters it holds. Within a folder, files come in the order
    of their names. A literal name that is not there raises FileUnavailableError; a glob may match nothing.
    """
    path = storage.resolve(path)
    if storage.is_local(path) and Path(path).exists():
        yield from _iter_literal(path, options)
        return
    for folder, alternatives in groupby(expand(path), key=storage.folder_of):
        names = list(alternatives)
        listed: dict[str, FileInfo] = {}
        if len(names) > _ONE_BY_ONE and not storage.is_local(path) and not has_glob(folder):
            listed = {info.url: info for info in _iter_folder(folder, options, recursive=False)}
        for name in names:
            if name in listed:
                yield listed[name]
            elif has_glob(name):
                yield from _iter_glob(name, options)
            else:
                yield from _iter_literal(name, options)


def file_names(folder: str, options: Options) -> list[str]:
    """The names of the files right in `folder`, sorted, as they are now; none when it does not exist."""
    folder = storage.resolve(folder)
    try:
        return sorted(info.name for info in _iter_folder(folder, options, recursive=False))
    except FileUnavailableError:
        if storage.is_s3(folder):  # a prefix always exists: here it is the bucket that does not
            raise
        return []


def _iter_literal(url: str, options: Options) -> Iterator[FileInfo]:
    if storage.is_local(url):
        with explained(url):
            is_folder, num_bytes = Path(url).is_dir(), Path(url).stat().st_size
    else:
        fs, path = storage.filesystem(url, options)
        info = storage.ask(url, options, partial(storage.said_why, fs, path, partial(fs.info, path)))
        is_folder, num_bytes = info["type"] == "directory", info["size"] or 0
    if is_folder:
        yield from _iter_folder(url, options)
    else:
        yield FileInfo(url, num_bytes)


def _iter_folder(url: str, options: Options, recursive: bool = True) -> Iterator[FileInfo]:
    if storage.is_local(url):
        yield from _walk(url, None if recursive else 1)
        return
    fs, path = storage.filesystem(url, options)
    if storage.is_s3(url):
        yield from _s3_objects(fs, url, options, "" if recursive else "/", f"{fs.split_path(path)[1]}/".lstrip("/"))
        return
    fs.invalidate_cache()
    found = storage.ask(url, options, partial(fs.find, path, detail=True, maxdepth=None if recursive else 1))
    yield from _infos(fs, found)


def _iter_glob(pattern: str, options: Options) -> Iterator[FileInfo]:
    literal = _MAGIC.split(pattern, maxsplit=1)[0]
    folder = literal.rsplit("/", 1)[0]
    rest = pattern[len(folder) + 1 :]
    depth = None if "**" in rest else rest.count("/") + 1
    matches = re.compile(glob_translate(pattern)).match
    if storage.is_local(pattern):
        if Path(folder or "/").is_dir():
            yield from (info for info in _walk(folder or "/", depth) if matches(info.url))
        return
    fs, path = storage.filesystem(pattern, options)
    if storage.is_s3(pattern):
        prefix = fs.split_path(fs._strip_protocol(literal + "x"))[1][:-1]
        objects = _s3_objects(fs, pattern, options, "/" if depth == 1 else "", prefix)
        yield from (info for info in objects if matches(info.url))
        return
    fs.invalidate_cache()
    found = storage.ask(pattern, options, partial(fs.glob, path, detail=True))
    yield from _infos(fs, {name: info for name, info in found.items() if info["type"] == "file"})


def _walk(folder: str, depth: int | None) -> Iterator[FileInfo]:
    """Files of `folder` by name, then its folders by name, `depth` levels down."""
    files, folders = [], []
    with explained(folder), os.scandir(folder) as entries:
        for entry in entries:  # names only: a DirEntry that knows its size takes 700 bytes
            if entry.is_dir():
                folders.append((entry.name, entry.is_symlink()))
            elif entry.is_file() or entry.is_symlink():
                files.append(entry.name)
    files.sort()
    root = folder.rstrip("/")
    for name in files:
        yield FileInfo(f"{root}/{name}", _size(f"{root}/{name}"))
    del files
    for name, is_link in sorted(folders) if depth is None or depth > 1 else ():
        below = f"{root}/{name}"
        if is_link and Path(folder).resolve().is_relative_to(Path(below).resolve()):
            continue  # a link to a folder above: following it would never end
        yield from _walk(below, None if depth is None else depth - 1)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 (a Path for each of a million files takes seconds)
    except FileNotFoundError:  # a link to nothing, or deleted just now: whoever opens it says so
        return 0


def _s3_objects(fs: Any, url: str, options: Options, delimiter: str, prefix: str) -> Iterator[FileInfo]:
    """The objects under a key prefix, one page of 1,000 at a time: `fs.find` would hold them all."""
    bucket = fs.split_path(fs._strip_protocol(url))[0]
    request = {"Bucket": bucket, "Prefix": prefix} | ({"Delimiter": delimiter} if delimiter else {})
    scheme = storage.protocol_of(url)
    while True:
        page = storage.ask(url, options, partial(fs.call_s3, "list_objects_v2", **request))
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):
                yield FileInfo(f"{scheme}://{bucket}/{item['Key']}", item["Size"])
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _infos(fs: Any, found: dict[str, dict[str, Any]]) -> Iterator[FileInfo]:
    for name in sorted(found):
        yield FileInfo(fs.unstrip_protocol(name), found[name]["size"] or 0)
