"""Files by path or URL: read, write, and commit once, on local disk, S3 and any other fsspec filesystem.

A name is an absolute local path (no `file://`) or a URL (`s3://bucket/key`). `options` are fsspec options by protocol,
and under `retry` the fields of a `RetryConfig`, as `config.StorageConfig.access` gives them. Listing lives in
`listing.py`.

Every request to a remote store goes through `ask`, which makes it again as the policy says. s3fs, botocore and aiohttp
are told not to; what another protocol's package repeats by itself (gcsfs does) comes on top.
"""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar, cast

import aiohttp
import fsspec
from aiobotocore.httpsession import AIOHTTPSession
from fsspec.spec import AbstractBufferedFile

from pipeline import redact, retry
from pipeline.config import RetryConfig
from pipeline.storage_errors import AccessDeniedError as AccessDeniedError
from pipeline.storage_errors import CredentialsError as CredentialsError
from pipeline.storage_errors import FileUnavailableError as FileUnavailableError
from pipeline.storage_errors import StorageError as StorageError
from pipeline.storage_errors import UnreachableError as UnreachableError
from pipeline.storage_errors import explained as explained
from pipeline.urls import S3
from pipeline.urls import folder_of as folder_of
from pipeline.urls import is_local as is_local
from pipeline.urls import is_s3 as is_s3
from pipeline.urls import join as join
from pipeline.urls import protocol_of as protocol_of
from pipeline.urls import resolve as resolve

Options = Mapping[str, Mapping[str, Any]]
T = TypeVar("T")

_COPY_BYTES = 1 << 20
_SPOOL_BYTES = 64 << 20
_BLOCK_BYTES = 8 << 20
_SINGLE_PUT_BYTES = 5 << 30  # S3's limit for one PUT
_CONNECT_TIMEOUT_S = 10.0
_NO_BODY = {"400", "401", "403"}
_SLOWEST_UPLOAD = 100_000  # bytes a second; below it an upload counts as stalled


class _OneTrySession(AIOHTTPSession):  # type: ignore[misc]
    """aiohttp sends a request again by itself when a kept connection breaks. Of a commit whose answer was lost nobody
    would know, then, whose object the second one found."""

    async def _get_session(self, proxy_url: str | None) -> aiohttp.ClientSession:
        session = await super()._get_session(proxy_url)
        session._retry_connection = False
        return cast(aiohttp.ClientSession, session)


def retry_policy(options: Options) -> RetryConfig:
    return RetryConfig(**options.get("retry", {}))


def filesystem(url: str, options: Options) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the URL's path in it."""
    protocol = protocol_of(url)
    arguments = dict(options.get(protocol, {}))
    redact.remember(arguments)
    if protocol in S3:
        # botocore 1.36 and later sends checksums as trailers that stores other than AWS often refuse
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        timeout_s = retry_policy(options).timeout_s
        arguments["config_kwargs"] = {
            **arguments.get("config_kwargs", {}),
            "connect_timeout": min(_CONNECT_TIMEOUT_S, timeout_s),
            "read_timeout": timeout_s,
            "retries": {"total_max_attempts": 1},
            "http_session_cls": _OneTrySession,
        }
    elif protocol in ("http", "https"):
        timeout = aiohttp.ClientTimeout(sock_connect=_CONNECT_TIMEOUT_S, sock_read=retry_policy(options).timeout_s)
        arguments["client_kwargs"] = {"timeout": timeout, **arguments.get("client_kwargs", {})}
    try:
        fs, path = cast(tuple[Any, str], fsspec.core.url_to_fs(url, **arguments))
    except ImportError as error:
        raise StorageError(f"{url}: reading {protocol}:// needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise StorageError(
            f"{url}: {error}. Use a local path, s3://, or another protocol of fsspec, with its options under "
            f"storage.options.{protocol}"
        ) from error
    if protocol in S3:
        fs.retries = 1  # s3fs has it as an attribute and no argument
    return fs, path


def ask(url: str, options: Options, request: Callable[[], T]) -> T:
    """A request to the remote store of `url`, made again as the policy says; its errors are explained."""
    with explained(url):
        return retry.call(retry_policy(options), url, request)


def open_read(url: str, options: Options) -> BinaryIO:
    """The file for reading. Local files and most stores can seek; look at `seekable()` before you do.

    A remote file that can seek is read in blocks of 8 MiB, each of them made sure to be whole and asked for again on
    its own; one that cannot is one request.
    """
    if is_local(url):
        with explained(url):
            return Path(url).open("rb")
    fs, path = filesystem(url, options)
    # whole blocks, three of them: going back to a tar member after a look at what follows it costs no second
    # request (fsspec's "bytes" cache fetched 2.4 times the size of a tar of 300 kB members)
    cache = {"cache_type": "blockcache", "cache_options": {"maxblocks": 3}}
    file = ask(
        url, options, partial(said_why, fs, path, partial(fs.open, path, "rb", block_size=_BLOCK_BYTES, **cache))
    )
    if isinstance(file, AbstractBufferedFile) and file.size is not None:
        file.cache.fetcher = _whole_blocks(url, options, file.cache.fetcher, file.size)
    return cast(BinaryIO, file)


def said_why(fs: Any, path: str, look: Callable[[], T]) -> T:
    """`look()`, a request about `path` that may fail without a reason; then raises the store's own.

    An answer to S3's HEAD has no body: "403" may be about this object or about the credentials. Over HTTP, fsspec takes
    every failure for a file that is not there.
    """
    try:
        return look()
    except FileNotFoundError as error:
        reason = error.__cause__
        if not isinstance(reason, aiohttp.ClientError | TimeoutError):
            raise
    except OSError as error:
        if is_s3(fs.unstrip_protocol(path)) and retry.error_code(error) in _NO_BODY:
            bucket, key, _ = fs.split_path(path)  # what follows raises with the code
            fs.cat_file(path, 0, 1) if key else fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
        raise
    reason.__context__ = None  # or what it came out as would still decide whether it is tried again
    raise reason


def _whole_blocks(
    url: str, options: Options, fetch: Callable[[int, int], bytes], size: int
) -> Callable[[int, int], bytes]:
    """`fetch(start, end)` through `ask`, with its answer's length looked at."""

    def once(start: int, end: int) -> bytes:
        try:
            data = fetch(start, end)
        except (IndexError, TypeError) as error:
            # s3fs 2026.9 looks for "pre-conditions" in the message of an error, which may have none
            raise error.__context__ or error  # noqa: B904
        if len(data) != end - start:
            raise retry.WrongLengthError(f"{len(data):,} bytes instead of {end - start:,} from {start:,} on")
        return data

    return lambda start, end: ask(url, options, partial(once, start, min(end, size)))


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
    if is_local(url):
        with explained(url):
            return Path(url).exists()
    fs, path = filesystem(url, options)
    fs.invalidate_cache()
    return bool(ask(url, options, partial(said_why, fs, path, partial(fs.exists, path))))


def read_bytes(url: str, options: Options) -> bytes:
    if is_local(url):
        with explained(url):
            return Path(url).read_bytes()
    fs, path = filesystem(url, options)
    return bytes(ask(url, options, partial(fs.cat_file, path)))


def write_bytes(url: str, data: bytes, options: Options) -> None:
    """Writes or replaces a file; a reader sees the old one or the new one, never a part."""
    if is_local(url):
        with explained(url), _partial_file(Path(url), data) as partial_file:
            partial_file.replace(url)
        return
    fs, path = filesystem(url, options)
    ask(url, options, partial(_put, fs, path, data, retry_policy(options).timeout_s))


def commit(url: str, data: bytes | Path, options: Options) -> bool:
    """Puts an object in place whole, unless one is there: of many writers one wins. False: it was already there.

    `data` is the bytes or a local file that holds them. A remote object goes up in one request. When an answer is lost,
    the next try finds the object of the one before; it is read back, so that this still is True.
    """
    if is_local(url):
        with explained(url):
            return _commit_local(Path(url), data)
    body = data if isinstance(data, bytes) else data.read_bytes()
    fs, path = filesystem(url, options)
    timeout_s = retry_policy(options).timeout_s
    num_tries = 0

    def create() -> bool:
        nonlocal num_tries
        num_tries += 1
        return (_create_s3 if is_s3(url) else _create)(fs, path, body, timeout_s)

    return ask(url, options, create) or (num_tries > 1 and read_bytes(url, options) == body)


def _put(fs: Any, path: str, body: bytes, timeout_s: float, **kwargs: Any) -> None:
    if is_s3(fs.unstrip_protocol(path)):
        # aiohttp's read timeout begins after the last byte of the body: a store that takes none would hold us forever
        kwargs |= {"chunksize": _SINGLE_PUT_BYTES, "timeout": timeout_s + len(body) / _SLOWEST_UPLOAD}
    else:
        fs.makedirs(fs._parent(path), exist_ok=True)
    fs.pipe_file(path, body, **kwargs)


def _create(fs: Any, path: str, body: bytes, timeout_s: float) -> bool:
    # fsspec's own "create" is a check and then a write, too, where a store knows no better
    if fs.exists(path):
        return False
    try:
        _put(fs, path, body, timeout_s, **({"mode": "create"} if _knows_create(fs) else {}))
    except FileExistsError:
        return False
    return True


def _create_s3(fs: Any, path: str, body: bytes, timeout_s: float) -> bool:
    """One PUT with `If-None-Match: *`; where the store does not know that, a look and a PUT."""
    try:
        _put(fs, path, body, timeout_s, mode="create")
        return True
    except OSError as error:
        code = retry.error_code(error)
        if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412"):
            return False
        if code not in ("NotImplemented", "501"):
            raise
    fs.invalidate_cache(path)
    if fs.exists(path):
        return False
    _put(fs, path, body, timeout_s)
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


def _knows_create(fs: Any) -> bool:
    return "mode" in inspect.signature(getattr(fs, "_pipe_file", fs.pipe_file)).parameters
