"""What can go wrong with a store, in words that say what would be right and hold no secret."""

from __future__ import annotations

import calendar
import errno
import re
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)
from botocore.parsers import ResponseParserError

from pipeline import redact, retry
from pipeline.urls import is_local, is_s3, protocol_of

_CREDENTIAL_CODES = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "SignatureDoesNotMatch",
    "RequestTimeTooSkewed",
}
_CREDENTIAL_ERRORS = (
    NoCredentialsError,
    CredentialRetrievalError,
    PartialCredentialsError,
    TokenRetrievalError,
    SSOError,
)
_NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_NO_NAME = {errno.ENAMETOOLONG, errno.ELOOP}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class StorageError(OSError):
    """A store that cannot do what was asked; the message names the URL and what would be right, and holds no secret."""

    def __init__(self, message: str) -> None:
        super().__init__(redact.text(message))


class FileUnavailableError(StorageError):
    """One file that cannot be read, now or later. `code` is `missing_file` (a folder, too), `permission_denied`, or
    `unreachable` (its store answers for others and not for it).

    What a remote store refuses or fails to do is an error of the store until `sources.fetch` has found out that it
    is only this file.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.code, str(self))


class AccessDeniedError(StorageError):
    """A store that knows these credentials and refuses this request."""


class CredentialsError(StorageError):
    """Credentials that are missing, unknown or have expired: nothing will be read until there are others."""


class UnreachableError(StorageError):
    """A request that failed, every time it was made, for what may pass."""


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns what a filesystem raises into a StorageError that names the URL and the way out."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, BotoCoreError, ResponseParserError, aiohttp.ClientError) as error:
        # a traceback shows the whole chain of causes
        chain = "".join(traceback.format_exception(error))
        raise _explained(url, error) from (error if redact.text(chain) == chain else None)


def _explained(url: str, error: Exception) -> StorageError:
    said, code = retry.describe(error), retry.error_code(error)
    if code in _CREDENTIAL_CODES or isinstance(error, _CREDENTIAL_ERRORS) or _is_login(url, code):
        state = "no credentials found" if isinstance(error, NoCredentialsError) else f"credentials refused ({said})"
        return CredentialsError(
            f"{url}: {state}: they are missing, unknown or have expired. What is committed stays; run the same command "
            f"again with new ones. {_credentials_hint(url)}"
        )
    if isinstance(error, _NO_FILE) or code in ("404", "410") or getattr(error, "errno", None) in _NO_NAME:
        return FileUnavailableError("missing_file", f"{url}: no such file or folder ({said})")
    if isinstance(error, PermissionError) and is_local(url):
        return FileUnavailableError("permission_denied", f"{url}: this user may not read or write it")
    if isinstance(error, PermissionError) or code in ("401", "403"):
        return AccessDeniedError(f"{url}: access denied ({said}). {_credentials_hint(url)}")
    if retry.is_transient(error):
        return UnreachableError(f"{url}: {said}")
    if is_local(url) and isinstance(error, OSError) and error.errno in _FULL:
        return StorageError(f"{url}: {said}; {_room(url)}")
    return StorageError(f"{url}: {said}")


def _is_login(url: str, code: str) -> bool:
    """401 says that nobody is known; on HTTP a store also says 403 when the time of a signed URL is over."""
    if is_local(url) or is_s3(url):
        return False
    expiry = _signed_until(url)
    return code in ("401", "403") and expiry is not None and expiry < time.time()


def _signed_until(url: str) -> float | None:
    """When a presigned URL expires, in seconds since the epoch; None for any other."""
    query = {key.lower(): value for key, value in parse_qsl(urlsplit(url).query)}
    for signer in ("x-amz", "x-goog"):
        date, lifetime = query.get(f"{signer}-date", ""), query.get(f"{signer}-expires", "")
        if re.fullmatch(r"\d{8}T\d{6}Z", date) and lifetime.isdecimal():
            return calendar.timegm(time.strptime(date, "%Y%m%dT%H%M%SZ")) + int(lifetime)
    return None


def _room(url: str) -> str:
    """What is left on the disk of a local file."""
    folder = next(folder for folder in Path(url).parents if folder.exists())
    return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there. Make room and run the same command again"


def _credentials_hint(url: str) -> str:
    if is_s3(url):
        return (
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or an instance role; for a public bucket "
            "storage.options.s3.anon: true; for a store that is not AWS storage.options.s3.endpoint_url"
        )
    return f"Give this process credentials for {protocol_of(url)}://"
