"""What is tried again, how long it waits, and what is said in the end."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec.exceptions import FSTimeoutError
from hypothesis import given, settings
from hypothesis import strategies as st
from s3fs.errors import translate_boto_error
from s3fs.utils import FileExpired

from pipeline import retry
from pipeline.config import RetryConfig
from pipeline.retry import WrongLengthError


def s3_error(status: int, code: str = "", message: str | None = None, **headers: str) -> Exception:
    """What s3fs raises for an answer of S3's."""
    answer = {
        "Error": {"Code": code or str(status), "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers},
    }
    return translate_boto_error(boto.ClientError(answer, "GetObject"))


def http_error(status: int) -> Exception:
    return aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        *(s3_error(status) for status in (408, 429, 500, 502, 503, 504)),
        s3_error(503, "SlowDown"),
        s3_error(400, "RequestTimeout"),
        s3_error(400, "XAmzContentSHA256Mismatch"),
        s3_error(409, "ConditionalRequestConflict"),
        http_error(503),
        ConnectionResetError(104, "reset"),
        ConnectionRefusedError(111, "refused"),
        OSError(errno.EHOSTUNREACH, "no route"),
        TimeoutError(),
        FSTimeoutError(),
        WrongLengthError("3 bytes instead of 4"),
        boto.ReadTimeoutError(endpoint_url="http://h"),
        boto.ConnectTimeoutError(endpoint_url="http://h"),
        boto.EndpointConnectionError(endpoint_url="http://h"),
        boto.ConnectionClosedError(endpoint_url="http://h"),
        boto.ResponseStreamingError(error="broke"),
        boto.IncompleteReadError(actual_bytes=3, expected_bytes=4),
        ResponseParserError("XML ends"),
        aiohttp.ClientPayloadError("not enough"),
        aiohttp.ServerDisconnectedError(),
    ],
    ids=repr,
)
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    assert retry.is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        *(s3_error(status) for status in (301, 400, 401, 403, 404, 405, 409, 411, 412, 416, 501)),
        s3_error(403, "SignatureDoesNotMatch"),
        s3_error(404, "NoSuchBucket"),
        s3_error(412, "PreconditionFailed"),
        http_error(403),
        FileExpired("bucket/key", "etag"),
        FileNotFoundError("bucket/key"),
        FileExistsError("bucket/key"),
        PermissionError("Forbidden"),
        boto.NoCredentialsError(),
        boto.SSLError(endpoint_url="https://h", error="self-signed certificate"),
        OSError(errno.ENOSPC, "no space left on device"),
        ValueError("a mistake of ours"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_what_the_store_means_is_not(error: BaseException) -> None:
    assert not retry.is_transient(error)


def test_what_an_error_came_from_decides_where_it_says_nothing_itself() -> None:
    for cause, transient in ((s3_error(403), False), (s3_error(503), True), (TimeoutError(), True)):
        wrapped = OSError("wrapped")
        wrapped.__cause__ = cause
        assert retry.is_transient(wrapped) == transient


class Sleeps:
    """Stands in for time.sleep: what was waited, without waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waited: list[float] = []
        monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=self.waited.append))


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> Sleeps:
    return Sleeps(monkeypatch)


def failing(*errors: BaseException | None) -> Any:
    """A request that fails in these ways, one a call; None: it works and returns the number of calls."""
    left: Iterator[tuple[int, BaseException | None]] = iter(enumerate(errors, 1))

    def request() -> int:
        number, error = next(left)
        if error is not None:
            raise error
        return number

    return request


def test_it_goes_on_until_it_works_and_counts(sleeps: Sleeps) -> None:
    before = retry.num_retries()
    request = failing(TimeoutError(), s3_error(503), ConnectionResetError(), None)
    assert retry.call(RetryConfig(), "s3://b/k", request) == 4
    assert retry.num_retries() - before == 3 == len(sleeps.waited)
    assert retry.call(RetryConfig(), "s3://b/k", failing(None)) == 1
    assert retry.num_retries() - before == 3, "a first try is no retry"


def test_it_gives_up_after_so_many_tries_and_says_so(sleeps: Sleeps) -> None:
    with pytest.raises(OSError) as caught:
        retry.call(RetryConfig(attempts=3), "s3://b/k", failing(*[s3_error(503, "SlowDown", "too\nfast")] * 5))
    assert retry.describe(caught.value) == "SlowDown: too fast, given up after 3 tries"
    assert len(sleeps.waited) == 2
    with pytest.raises(TimeoutError) as once:
        retry.call(RetryConfig(attempts=1), "s3://b/k", failing(TimeoutError("late")))
    assert retry.describe(once.value) == "TimeoutError: late", "one try is not worth a note"


def test_what_is_not_tried_again_is_raised_at_once(sleeps: Sleeps) -> None:
    with pytest.raises(PermissionError) as caught:
        retry.call(RetryConfig(), "s3://b/k", failing(TimeoutError(), s3_error(403, "AccessDenied"), None))
    assert len(sleeps.waited) == 1 and retry.describe(caught.value) == "AccessDenied"


def test_the_wait_is_at_least_what_the_store_asks_for(sleeps: Sleeps) -> None:
    policy = RetryConfig(first_wait_s=0.001, max_wait_s=7)
    slow, slower = s3_error(503, "SlowDown", **{"retry-after": "5"}), s3_error(429, **{"retry-after": "3600"})
    undated = s3_error(503, **{"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"})
    retry.call(policy, "s3://b/k", failing(slow, slower, undated, None))
    assert sleeps.waited[:2] == [5, 7], "an hour is cut to max_wait_s"
    assert sleeps.waited[2] <= 0.004


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 10), st.floats(0.01, 3), st.floats(0.01, 60))
def test_waits_double_up_to_a_bound(attempts: int, first_wait_s: float, max_wait_s: float) -> None:
    policy = RetryConfig(attempts=attempts, first_wait_s=first_wait_s, max_wait_s=max_wait_s)
    with pytest.MonkeyPatch.context() as patch:
        waited = Sleeps(patch).waited
        retry.call(policy, "s3://b/k", failing(*[TimeoutError()] * (attempts - 1), None))
    assert len(waited) == attempts - 1
    for number, wait in enumerate(waited):
        assert 0 <= wait <= min(first_wait_s * 2**number, max_wait_s) + 1e-9


def test_many_at_once_do_not_wait_alike(sleeps: Sleeps) -> None:
    for _ in range(50):
        retry.call(RetryConfig(), "s3://b/k", failing(TimeoutError(), None))
    assert max(sleeps.waited) - min(sleeps.waited) > 0.2, "full jitter: drawn between 0 and 0.5 s"


def test_every_retry_is_logged_in_one_line(sleeps: Sleeps, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pipeline.retry"):
        retry.call(RetryConfig(attempts=4), "s3://b/k", failing(s3_error(503, "SlowDown"), None))
    (record,) = caplog.records
    assert record.getMessage().startswith("s3://b/k: SlowDown; try 2 of 4 in 0.")


def test_a_request_is_interrupted_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        retry.call(RetryConfig(first_wait_s=30), "s3://b/k", failing(KeyboardInterrupt(), None))
    assert time.monotonic() - began < 1
