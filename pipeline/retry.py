"""How often a request to a remote store is made again: the one place that decides it, for every kind of request.

What may go better another time is tried again after an exponential wait with full jitter, or the longer one that the
store asks for: no answer, a broken one, an overloaded store. What the store means (not found, access denied, a
condition that does not hold) is raised at once. The layers below (s3fs, botocore) are told not to try again by
themselves, or their tries would multiply with these.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from pipeline import redact
from pipeline.config import RetryConfig

T = TypeVar("T")

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_num_retries = 0

_MEANT = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_TRANSIENT = (
    ConnectionError,
    TimeoutError,  # also asyncio's, a socket's and fsspec's
    boto.HTTPClientError,  # read timeouts, closed connections, bodies that break
    boto.ConnectionError,
    boto.IncompleteReadError,
    ResponseParserError,  # XML cut short, or a proxy's HTML
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
)
_PERMANENT = (boto.SSLError, boto.ProxyConnectionError, aiohttp.ClientSSLError)
_ERRNOS = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
_STATUSES = {408, 425, 429, 500, 502, 503, 504, 509}
_CODES = {
    "ConditionalRequestConflict",  # AWS: another conditional write of the key is under way
    "OperationAborted",
    "RequestTimeout",
    "InternalError",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "IncompleteBody",  # these three: the request was damaged on its way
    "BadDigest",
    "XAmzContentSHA256Mismatch",
}
"""S3's error codes whose status alone (400, 409, or 200 with an error inside) would not say so."""


class WrongLengthError(ConnectionError):
    """An answer that ended well and does not hold the bytes that were asked for."""


def call(policy: RetryConfig, name: str, request: Callable[[], T]) -> T:
    """`request()`, made again while it fails for what may pass, up to `policy.attempts` times in all.

    Raises what the last try raised, with a note when that was not the first. `name` (a URL) is for the log.
    """
    backoff = wait_random_exponential(multiplier=policy.first_wait_s, max=policy.max_wait_s)

    def wait_s(state: RetryCallState) -> float:
        answer = _answer(_error_of(state))
        return max(backoff(state), min(answer.retry_after_s, policy.max_wait_s) if answer is not None else 0.0)

    def count(state: RetryCallState) -> None:
        global _num_retries
        with _lock:
            _num_retries += 1
        error, wait = _error_of(state), state.upcoming_sleep
        _log.warning("%s: %s; try %d of %d in %.1f s", redact.text(name), describe(error), state.attempt_number + 1,
                     policy.attempts, wait)  # fmt: skip

    def give_up(state: RetryCallState) -> T:
        error = _error_of(state)
        if state.attempt_number > 1:
            error.add_note(f"given up after {state.attempt_number} tries")
        raise error

    return Retrying(
        stop=stop_after_attempt(policy.attempts),
        wait=wait_s,
        retry=retry_if_exception(is_transient),
        before_sleep=count,
        retry_error_callback=give_up,
    )(request)


def num_retries() -> int:
    """Requests that this process has made again so far."""
    return _num_retries


def is_transient(error: BaseException) -> bool:
    """Whether the same request may go better another time. A store's answer decides, else how the connection ended."""
    for each in _chain(error):
        if isinstance(each, _MEANT):
            return False
        answer = _Answer.behind(each)
        if answer is not None:
            return answer.status in _STATUSES or answer.code in _CODES
    return any(
        (isinstance(each, _TRANSIENT) and not isinstance(each, _PERMANENT))
        or (isinstance(each, OSError) and each.errno in _ERRNOS)
        for each in _chain(error)
    )


def error_code(error: BaseException) -> str:
    """The code in the store's answer ("NoSuchKey", or "404" where it has no body), "" where there was no answer."""
    answer = _answer(error)
    return answer.code if answer is not None else ""


def describe(error: BaseException) -> str:
    """The error in one line: the store's code and message, or its type and message, and what was noted on it."""
    answer = _answer(error)
    parts = [type(error).__name__, str(error)] if answer is None else [answer.code, answer.message]
    text = ": ".join(filter(None, parts))
    return redact.text(", ".join([" ".join(text.split()), *getattr(error, "__notes__", ())]))


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a store said when it did not do what it was asked. `retry_after_s` is 0 where it did not say, or named a
    date."""

    status: int
    code: str
    message: str
    retry_after_s: float

    @classmethod
    def behind(cls, error: BaseException) -> _Answer | None:
        """The answer that this very error stands for."""
        if isinstance(error, boto.ClientError):
            said, about = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
            status = about.get("HTTPStatusCode", 0)
            code, message = said.get("Code") or status, said.get("Message") or ""
            return cls(status, str(code), str(message), _seconds(about.get("HTTPHeaders", {}).get("retry-after")))
        if isinstance(error, aiohttp.ClientResponseError):
            wait = error.headers.get("Retry-After") if error.headers is not None else None
            return cls(error.status, str(error.status), error.message, _seconds(wait))
        return None


def _answer(error: BaseException) -> _Answer | None:
    return next(filter(None, map(_Answer.behind, _chain(error))), None)


def _seconds(value: str | None) -> float:
    return float(value) if value is not None and value.isdecimal() else 0.0


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, the newest first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _error_of(state: RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome is not None else None
    assert error is not None
    return error
