"""Names of files: an absolute local path (no `file://`) or a URL (`s3://bucket/key`)."""

from __future__ import annotations

import re
from pathlib import Path

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
S3 = ("s3", "s3a")


def protocol_of(path: str) -> str:
    """The protocol of a path or URL in lower case, "file" for local disk."""
    match = _URL.match(path)
    protocol = match[1].lower() if match else "file"
    return "file" if protocol == "local" else protocol


def is_local(path: str) -> bool:
    return protocol_of(path) == "file"


def is_s3(url: str) -> bool:
    return protocol_of(url) in S3


def resolve(path: str) -> str:
    """The one name of a file or folder: an absolute local path, or the URL, without a slash at the end."""
    if is_local(path):
        return str(Path(_URL.sub("", path, count=1)).expanduser().absolute())
    return path.rstrip("/")


def join(folder: str, name: str) -> str:
    """`name` in `folder`; a `name` that is absolute or a URL stays what it is."""
    if _URL.match(name) or name.startswith("/"):
        return resolve(name)
    if is_local(folder):
        return str(Path(folder) / name)
    return f"{folder.rstrip('/')}/{name}"


def folder_of(url: str) -> str:
    return url.rsplit("/", 1)[0] or "/"
