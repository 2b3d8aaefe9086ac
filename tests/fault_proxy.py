"""An HTTP/1.1 proxy that stands between a job and an object store and breaks what a plan says.

    with FaultProxy(server.port, seeded_plan(seed=1, share=0.15)) as proxy:
        ...  # speak with proxy.url as if it were the store
    print(proxy.injected)

A plan is asked once a request; requests and answers are held in memory whole. The proxy runs in a thread of its own.
Signatures stay valid, because the client signs for the host that it speaks with and that header travels unchanged.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self, get_args

Fault = Literal[
    "error_500",  # 500 InternalError; the store never hears of it
    "slow_down",  # 503 SlowDown with Retry-After, as S3 throttles
    "too_many",  # 429 with Retry-After
    "reset_before",  # the connection is reset without an answer, the store never hears of it
    "reset_middle",  # ... after half of the answer's body
    "partial",  # the connection ends well after half of the body that Content-Length promised
    "stall_before",  # silence instead of an answer
    "stall_middle",  # silence after half of the body
    "slow",  # the body in small pieces; it comes whole
    "lost",  # the store did it, and the connection is reset instead of its answer
    "lost_500",  # the store did it, and the answer is 500
    "cut_upload",  # the store gets half of the request's body and then a reset, and so does the client
]
Refusal = Literal[
    "gone",  # 404
    "denied",  # 403 AccessDenied: the store knows who asks
    "login",  # 401
    "expired",  # 400 ExpiredToken, as AWS answers
    "unknown_key",  # 403 InvalidAccessKeyId
]
FAULTS: tuple[Fault, ...] = get_args(Fault)
"""What may pass; a refusal never does."""
BODY_FAULTS: tuple[Fault, ...] = ("reset_middle", "partial", "stall_middle", "slow")
UPLOAD_FAULTS: tuple[Fault, ...] = ("lost", "lost_500", "cut_upload")
HARMLESS: tuple[Fault, ...] = ("slow",)
"""Faults after which no request has to be made again."""

_ANSWERS: dict[Fault | Refusal, tuple[str, str]] = {
    "error_500": ("500 Internal Server Error", "InternalError"),
    "slow_down": ("503 Slow Down", "SlowDown"),
    "too_many": ("429 Too Many Requests", "TooManyRequests"),
    "gone": ("404 Not Found", "NoSuchKey"),
    "denied": ("403 Forbidden", "AccessDenied"),
    "login": ("401 Unauthorized", "Unauthorized"),
    "expired": ("400 Bad Request", "ExpiredToken"),
    "unknown_key": ("403 Forbidden", "InvalidAccessKeyId"),
}
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST
_HEAD_LIMIT = 1 << 16
_SLOW_PIECES = 20


@dataclass(frozen=True, slots=True)
class Request:
    """What a plan is asked about. `seen` counts the requests before this one with the same method, target and range."""

    method: str
    target: str
    range: str
    has_body: bool
    seen: int


Plan = Callable[[Request], Fault | Refusal | None]


def no_faults(request: Request) -> None:
    return None


def in_order(faults: Iterable[Fault | Refusal | None], method: str = "") -> Plan:
    """These faults for the next requests (of one method, if given), then none."""
    left = iter(faults)
    return lambda request: next(left, None) if method in ("", request.method) else None


def seeded_plan(seed: int, share: float, faults: Sequence[Fault] = FAULTS, most_in_a_row: int = 3) -> Plan:
    """A fault for `share` of all requests, drawn by what is asked and how often it was: the order in which requests
    come changes nothing. No request meets more than `most_in_a_row` faults one after the other.
    """

    def plan(request: Request) -> Fault | None:
        *before, drawn = [draw(request, seen) for seen in range(max(request.seen - most_in_a_row, 0), request.seen + 1)]
        return None if len(before) == most_in_a_row and all(before) else drawn

    def draw(request: Request, seen: int) -> Fault | None:
        chance = random.Random(f"{seed} {request.method} {request.target} {request.range} {seen}")
        if chance.random() >= share:
            return None
        usable = [fault for fault in faults if _fits(fault, request)]
        return chance.choice(usable) if usable else None

    return plan


def _fits(fault: Fault, request: Request) -> bool:
    if fault in BODY_FAULTS:
        return request.method == "GET"
    return request.has_body if fault in UPLOAD_FAULTS else True


@dataclass(slots=True)
class _Message:
    """The bytes of a request's or an answer's head (with the empty line) and of its body."""

    first_line: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")

    def head(self, **changes: str) -> bytes:
        """With headers set, or left out where the value is empty."""
        names = {name.replace("_", "-"): value for name, value in changes.items()}
        kept = [(key, value) for key, value in self.headers if key.lower() not in names]
        lines = [self.first_line, *(f"{key}: {value}" for key, value in [*kept, *names.items()] if value)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


@dataclass
class FaultProxy:
    """A context manager. `plan` may be exchanged at any time; the counts are since the start: faults by kind, requests
    by method, bytes of answers' bodies."""

    upstream_port: int
    plan: Plan = no_faults
    stall_s: float = 30.0
    retry_after_s: int = 1
    slow_s: float = 1.0
    injected: Counter[Fault | Refusal] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    num_body_bytes: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def num_harmful(self) -> int:
        """Faults after which a request had to be made again."""
        return sum(count for fault, count in self.injected.items() if fault not in HARMLESS)

    def __enter__(self) -> Self:
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=_HEAD_LIMIT)

    async def _stop(self) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while await self._serve(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, or the proxy ends
        finally:
            self._connections.discard(task)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; False when the connection is over."""
        request = await _read_head(reader)
        method, target, _ = request.first_line.split(" ", 2)
        if request.header("expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.body = await reader.readexactly(int(request.header("content-length") or 0))
        key = (method, target, request.header("range"))
        asked = Request(*key, has_body=bool(request.body), seen=self._seen[key])
        self._seen[key] += 1
        self.requests[method] += 1
        fault = self.plan(asked)
        if fault is None:
            return await self._pass_on(request, writer)
        self.injected[fault] += 1
        if fault in _ANSWERS:
            _write_error(writer, method, fault, self.retry_after_s if fault in ("slow_down", "too_many") else 0)
            await writer.drain()
            return True
        if fault == "stall_before":
            await asyncio.sleep(self.stall_s)
            return False
        if fault == "cut_upload":
            await self._forward_half(request)
        elif fault == "lost_500":
            await self._forward(request)
            _write_error(writer, method, "error_500", 0)
            await writer.drain()
            return True
        elif fault == "lost":
            await self._forward(request)
        elif fault != "reset_before":
            return await self._pass_on(request, writer, fault)
        _reset(writer)
        return False

    async def _pass_on(
        self, request: _Message, writer: asyncio.StreamWriter, fault: Fault | Refusal | None = None
    ) -> bool:
        answer = await self._forward(request)
        writer.write(answer.head(connection=""))
        self.num_body_bytes += len(answer.body)
        half = len(answer.body) // 2
        if fault is None:
            writer.write(answer.body)
        elif fault == "slow":
            size = max(1, -(-len(answer.body) // _SLOW_PIECES))
            for start in range(0, len(answer.body), size):
                writer.write(answer.body[start : start + size])
                await writer.drain()
                await asyncio.sleep(self.slow_s / _SLOW_PIECES)
        else:
            writer.write(answer.body[:half])
            await writer.drain()
            if fault == "stall_middle":
                await asyncio.sleep(self.stall_s)
            if fault == "reset_middle":
                await asyncio.sleep(0.05)  # or the reset overtakes the bytes before it
                _reset(writer)
            return False
        await writer.drain()
        return True

    async def _forward(self, request: _Message) -> _Message:
        """The store's answer. Asked to close, it ends by closing, whatever its framing is."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream_port, limit=_HEAD_LIMIT)
        try:
            writer.write(request.head(connection="close", expect="") + request.body)
            await writer.drain()
            answer = await _read_head(reader)
            answer.body = await reader.read()
            return answer
        finally:
            writer.close()

    async def _forward_half(self, request: _Message) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        writer.write(request.head(connection="close", expect="") + request.body[: len(request.body) // 2])
        await writer.drain()
        await asyncio.sleep(0.05)
        _reset(writer)


async def _read_head(reader: asyncio.StreamReader) -> _Message:
    text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = text.strip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return _Message(first, [(name, value.strip()) for name, _, value in pairs])


def _write_error(writer: asyncio.StreamWriter, method: str, fault: Fault | Refusal, retry_after_s: int) -> None:
    status, code = _ANSWERS[fault]
    body = b"" if method == "HEAD" else f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    wait = f"Retry-After: {retry_after_s}\r\n" if retry_after_s else ""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\n{wait}Content-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
