"""Files by path or URL: read, write, and commit once, on local disk, S3 and any other fsspec filesystem.

A name is an absolute local path (no `file://`) or a URL (`s3://bucket/key`). `options` are fsspec options by protocol,
as `config.StorageConfig.options` holds them. Listing lives in `listing.py`.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import fsspec
from botocore.exceptions import BotoCoreError, NoCredentialsError

Options = Mapping[str, Mapping[str, Any]]

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_S3 = ("s3", "s3a")
_COPY_BYTES = 1 << 20
_SPOOL_BYTES = 64 << 20
_BLOCK_BYTES = 8 << 20
_SINGLE_PUT_BYTES = 5 << 30  # S3's limit for one PUT


class StorageError(OSError):
    """A store that cannot do what was asked; the message names the URL and what would be right."""


class FileUnavailableError(StorageError):
    """One file that cannot be read, now or later: missing, a folder, or (on local disk) not readable.

    `code` is `missing_file` or `permission_denied`. Refusals by a remote store are plain StorageErrors: they mostly are
    an expired token, and the file is fine.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def protocol_of(path: str) -> str:
    """The protocol of a path or URL in lower case, "file" for local disk."""
    match = _URL.match(path)
    protocol = match[1].lower() if match else "file"
    return "file" if protocol == "local" else protocol


def is_local(path: str) -> bool:
    return protocol_of(path) == "file"


def is_s3(url: str) -> bool:
    return protocol_of(url) in _S3


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


def filesystem(url: str, options: Options) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the URL's path in it."""
    protocol = protocol_of(url)
    if protocol in _S3:
        # botocore 1.36 and later sends checksums as trailers that stores other than AWS often refuse
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **options.get(protocol, {})))
    except ImportError as error:
        raise StorageError(f"{url}: reading {protocol}:// needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise StorageError(
            f"{url}: {error}. Use a local path, s3://, or another protocol of fsspec, with its options under "
            f"storage.options.{protocol}"
        ) from error


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns what a filesystem raises into a StorageError that names the URL and the way out."""
    try:
        yield
    except StorageError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise FileUnavailableError("missing_file", f"{url}: no such file or folder ({error})") from error
    except PermissionError as error:
        if is_local(url):
            raise FileUnavailableError("permission_denied", f"{url}: this user may not read or write it") from error
        raise StorageError(f"{url}: access denied ({error}). {_credentials_hint(url)}") from error
    except NoCredentialsError as error:
        raise StorageError(f"{url}: no credentials found. {_credentials_hint(url)}") from error
    except (OSError, BotoCoreError) as error:
        raise StorageError(f"{url}: {type(error).__name__}: {error}") from error


def _credentials_hint(url: str) -> str:
    if is_s3(url):
        return (
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or an instance role; for a public bucket "
            "storage.options.s3.anon: true; for a store that is not AWS storage.options.s3.endpoint_url"
        )
    return f"Give this process credentials for {protocol_of(url)}://"


def open_read(url: str, options: Options) -> BinaryIO:
    """The file for reading. Local files and most stores can seek; look at `seekable()` before you do."""
    with explained(url):
        if is_local(url):
            return Path(url).open("rb")
        fs, path = filesystem(url, options)
        # whole blocks, three of them: going back to a tar member after a look at what follows it costs no second
        # request (fsspec's "bytes" cache fetched 2.4 times the size of a tar of 300 kB members)
        cache = {"cache_type": "blockcache", "cache_options": {"maxblocks": 3}}
        return cast(BinaryIO, fs.open(path, "rb", block_size=_BLOCK_BYTES, **cache))


def fetch(url: str, options: Options) -> BinaryIO:
    """The whole file as a local seekable one: itself when it is local, else a copy (see `spool`).

    Decoders get this and never a remote file: libsndfile takes a failing read for the end of the file.
    """
    if is_local(url):
        return open_read(url, options)
    with explained(url), open_read(url, options) as file:
        return spool(file)


def spool(reader: IO[bytes]) -> BinaryIO:
    """A seekable copy of `reader` from its position on: in memory up to 64 MB, on disk (unlinked) beyond."""
    copy = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115 (the caller closes it)
    shutil.copyfileobj(reader, copy, _COPY_BYTES)
    copy.seek(0)
    return cast(BinaryIO, copy)


def exists(url: str, options: Options) -> bool:
    with explained(url):
        if is_local(url):
            return Path(url).exists()
        fs, path = filesystem(url, options)
        fs.invalidate_cache()
        return bool(fs.exists(path))


def read_bytes(url: str, options: Options) -> bytes:
    with explained(url):
        if is_local(url):
            return Path(url).read_bytes()
        fs, path = filesystem(url, options)
        return bytes(fs.cat_file(path))


def write_bytes(url: str, data: bytes, options: Options) -> None:
    """Writes or replaces a file; a reader sees the old one or the new one, never a part."""
    with explained(url):
        if is_local(url):
            with _partial_file(Path(url), data) as partial:
                partial.replace(url)
            return
        fs, path = filesystem(url, options)
        _make_parent(fs, path)
        fs.pipe_file(path, data)


def commit(url: str, data: bytes | Path, options: Options) -> bool:
    """Puts an object in place whole, unless one is there: of many writers one wins. False: it was already there.

    `data` is the bytes or a local file that holds them. A remote object goes up in one request.
    """
    with explained(url):
        if is_local(url):
            return _commit_local(Path(url), data)
        body = data if isinstance(data, bytes) else data.read_bytes()
        fs, path = filesystem(url, options)
        if is_s3(url):
            return _commit_s3(fs, path, body)
        # fsspec's own "create" is a check and then a write, too, where a store knows no better
        if fs.exists(path):
            return False
        _make_parent(fs, path)
        create = {"mode": "create"} if _knows_create(fs) else {}
        try:
            fs.pipe_file(path, body, **create)
        except FileExistsError:
            return False
        return True


def _commit_local(target: Path, data: bytes | Path) -> bool:
    with _partial_file(target, data) as partial:
        try:
            os.link(partial, target)
        except FileExistsError:
            return False
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return True


@contextmanager
def _partial_file(target: Path, data: bytes | Path) -> Iterator[Path]:
    """`data` on disk beside `target`, under a name with a dot in front that dataset readers pass over."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                with data.open("rb") as source:
                    shutil.copyfileobj(source, file, _COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _commit_s3(fs: Any, path: str, body: bytes) -> bool:
    """One PUT with `If-None-Match: *`. s3fs repeats a request whose answer was lost, so that a False can also mean that
    this very call wrote the object."""
    for wait_s in (0.1, 0.4, 1.6, None):
        try:
            fs.pipe_file(path, body, mode="create", chunksize=_SINGLE_PUT_BYTES)
            return True
        except OSError as error:
            code = _s3_error_code(error)
            if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412"):
                return False
            if code in ("NotImplemented", "501"):
                break
            if code not in ("ConditionalRequestConflict", "409") or wait_s is None:
                raise
            time.sleep(wait_s)  # AWS: another conditional write is under way; ask again
    fs.invalidate_cache(path)
    if fs.exists(path):
        return False
    fs.pipe_file(path, body, chunksize=_SINGLE_PUT_BYTES)
    return True


def _s3_error_code(error: OSError) -> str:
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _knows_create(fs: Any) -> bool:
    return "mode" in inspect.signature(getattr(fs, "_pipe_file", fs.pipe_file)).parameters


def _make_parent(fs: Any, path: str) -> None:
    if not is_s3(fs.unstrip_protocol(path)):
        fs.makedirs(fs._parent(path), exist_ok=True)
