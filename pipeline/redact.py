"""Takes secrets out of what people read: errors, logs, tracebacks, the names in rows, the copy of the configuration.

`names` knows a secret by its place in a URL and changes nothing else; `text` also knows the values that this process
was given: `storage.options` and AWS's environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "REDACTED"

_IN_AUTHORITY = re.compile(r"(?<=://)[^/?#\s'\"@]*(?:@[^/?#\s'\"@]*)*@")
_SIGNING = (
    r"(?:X-Amz|X-Goog)-[\w-]+|AWSAccessKeyId|GoogleAccessId|Key-Pair-Id|Policy"
    r"|[\w.%-]*(?:sig|signature|token|secret|password|passwd|pwd|credentials?|auth|api_?-?key|access_?-?key)"
)
_VALUE = r"[^&#;\s'\"]*?(?=[:,.)]*(?:[&#;\s'\"]|$))"  # not the colon of a message after the URL
_IN_QUERY = re.compile(rf"([?&;](?:{_SIGNING})=){_VALUE}", re.IGNORECASE)
_ENVIRONMENT = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_PUBLIC = {"endpoint_url", "region_name", "region", "profile", "project", "account_name", "host"}
_MIN_LENGTH = 4  # a shorter value hides nothing and would be found everywhere

_given: set[str] = set()


def remember(options: Mapping[str, Any]) -> None:
    """Every text in the options of a filesystem is a secret from now on, but for what names a place."""
    _given.update(value for value in _texts(options) if len(value) >= _MIN_LENGTH)


def printable(text: str) -> str:
    """`text` as UTF-8 can hold it: half characters, as JSON and odd file names bring them, are spelled out."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def names(text: str) -> str:
    """`text`, printable, without the user and password of its URLs and what signs their queries: a presigned URL keeps
    its name when it is signed anew."""
    text = printable(text)
    return _IN_QUERY.sub(rf"\g<1>{HIDDEN}", _IN_AUTHORITY.sub(f"{HIDDEN}@", text)) if "://" in text else text


def text(text: str) -> str:
    """`text` without what `names` finds and without the secrets that this process was given."""
    text = names(text)
    given = {*_given, *(os.environ.get(name, "") for name in _ENVIRONMENT)}
    for secret in sorted(given, key=len, reverse=True):  # one may hold another
        if len(secret) >= _MIN_LENGTH and secret in text:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    return text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            if key not in _PUBLIC:
                yield from _texts(below)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _texts(below)
