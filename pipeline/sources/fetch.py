"""Fetches one recording, and tells a recording that cannot be had from a store that is away or knows nobody here.

The first is a row with its reason and the job goes on; the second ends the job before it fails thousands of recordings
that are fine, and the same command goes on another day.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import urlsplit

from pipeline import storage
from pipeline.storage import AccessDeniedError, FileUnavailableError, UnreachableError

MAX_IN_A_ROW = 3  # failures of a store that has given this process nothing yet, or not even what it gave before


@dataclass(slots=True)
class _Store:
    """What this process knows of a host or bucket: a URL that it gave, and the failures in a row since."""

    given: str | None = None
    num_failed: int = 0


_lock = threading.Lock()
_stores: dict[str, _Store] = {}


def fetch(url: str, options: storage.Options) -> BinaryIO:
    """`storage.fetch`, whose refusals and failures are this file's (FileUnavailableError: `permission_denied`,
    `unreachable`) while its store does better by others. Credentials that have expired never are."""
    if storage.is_local(url):
        return storage.fetch(url, options)
    store = _store_of(url)
    try:
        file = storage.fetch(url, options)
    except (AccessDeniedError, UnreachableError) as error:
        if _is_the_stores(store, options, error):
            raise type(error)(
                f"{error}. Nor could {_before(store)} be read from there: this is not about one recording. What is "
                "committed stays; run the same command again when that is mended"
            ) from error
        code = "permission_denied" if isinstance(error, AccessDeniedError) else "unreachable"
        raise FileUnavailableError(code, str(error)) from error
    with _lock:
        store.given, store.num_failed = url, 0
    return file


def _is_the_stores(store: _Store, options: storage.Options, error: storage.StorageError) -> bool:
    """Whether the store fails as such: it no longer shows what it gave before, or nothing else is known of it."""
    with _lock:
        store.num_failed += 1
        given = store.given
        if given is None:
            return store.num_failed >= MAX_IN_A_ROW
    return not _answers(given, options, with_data=isinstance(error, UnreachableError))


def _before(store: _Store) -> str:
    return "what it gave before" if store.given else f"the {store.num_failed - 1} recordings before"


def _answers(url: str, options: storage.Options, with_data: bool) -> bool:
    """Raises CredentialsError where that is the reason why not."""
    try:
        with storage.open_read(url, options) as file:
            file.read(1 if with_data else 0)
    except (AccessDeniedError, UnreachableError):
        return False
    except FileUnavailableError:
        return True
    return True


def _store_of(url: str) -> _Store:
    place = urlsplit(url)
    with _lock:
        return _stores.setdefault(f"{place.scheme}://{place.netloc}", _Store())
