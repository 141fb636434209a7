"""A proxy in front of an S3 server that plays the faults of networks and servers, on the requests that a test names.

It reads HTTP requests from sockets and sends them on to the server as they are (the client has signed the proxy's
own host, so signatures hold). What happens to a request is a `Fault`: a function that is given its `Exchange`.

    with FaultProxy(server.endpoint_url) as proxy:
        proxy.play(reset_after, "create", "runs/", times=1)
"""

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Self
from urllib.parse import parse_qs, unquote, urlsplit

SERVER_SECONDS = 60.0
"""How long the server behind the proxy may take; of a test that hangs this makes one that fails."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the proxy tells requests apart.

    Attributes:
        operation: "get", "put", "create" (a put with If-None-Match), "list" or "delete".
        key: the key without the bucket; of a listing its prefix.
        head: the request line and the headers, as they are sent on.
        body_bytes: how long its body is.
        waits: whether the client sends the body only when it is told to continue.
    """

    operation: str
    key: str
    head: bytes
    body_bytes: int
    waits: bool

    def fits(self, operation: str, key: str) -> bool:
        """Whether it is such an operation (a pattern) on a key in which `key` (a pattern) is found."""
        return bool(re.fullmatch(operation, self.operation) and re.search(key, self.key))


class Exchange:
    """One request on its way, and what a fault may do with it."""

    def __init__(self, request: Request, client: socket.socket, reader: BinaryIO, server: tuple[str, int]) -> None:
        self.request = request
        self.is_over = False
        """Whether the client's connection is done with."""
        self._client = client
        self._reader = reader
        self._server = server
        self._body: bytes | None = None

    def body(self) -> bytes:
        """All that the client sends after the headers."""
        if self._body is None:
            if self.request.waits:
                self._client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._body = self._reader.read(self.request.body_bytes)
        return self._body

    def forward(self, body_bytes: int | None = None) -> bytes:
        """Send the request to the server and return its whole answer; with `body_bytes`, break off after so many."""
        body = self.body()
        with socket.create_connection(self._server, SERVER_SECONDS) as server:
            server.sendall(self.request.head + body[:body_bytes])
            if body_bytes is not None:
                _reset(server)
                return b""
            answer = http.client.HTTPResponse(server, method=self.request.head.split(b" ", 1)[0].decode())
            answer.begin()
            content = answer.read()
            names = [name for name in answer.headers if name.lower() not in HOP_BY_HOP]
            lines = [
                f"HTTP/1.1 {answer.status} {answer.reason}",
                *(f"{name}: {answer.headers[name]}" for name in names),
            ]
            if answer.status != 204:
                lines.append(f"content-length: {len(content)}")
            return "\r\n".join([*lines, "", ""]).encode("latin-1") + content

    def answer(self, raw: bytes) -> None:
        """Send these bytes to the client."""
        self._client.sendall(raw)

    def close(self) -> None:
        """End the client's connection in good order."""
        self.is_over = True

    def reset(self) -> None:
        """End the client's connection with a reset."""
        self.is_over = True
        self._reader.close()
        _reset(self._client)

    def wait_until_the_client_leaves(self) -> None:
        """Say nothing until the client has closed the connection."""
        self.body()
        self._reader.read(1)
        self.is_over = True


Fault = Callable[[Exchange], None]
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


def pass_on(exchange: Exchange) -> None:
    """No fault at all."""
    exchange.answer(exchange.forward())


def reset_before(exchange: Exchange) -> None:
    """The request never arrives."""
    exchange.reset()


def reset_after(exchange: Exchange) -> None:
    """The request arrives and is served; its answer is lost."""
    exchange.forward()
    exchange.reset()


def cut_body(exchange: Exchange) -> None:
    """The body of a put breaks off halfway to the server."""
    exchange.forward(len(exchange.body()) // 2)
    exchange.reset()


def cut_answer(exchange: Exchange) -> None:
    """The answer breaks off in the middle of its body, and is shorter than its content-length."""
    head, content = _split(exchange.forward())
    exchange.answer(head + content[: len(content) // 2])
    exchange.close()


def shorten_answer(exchange: Exchange) -> None:
    """The answer lacks the second half of its body, and its content-length says that all is well."""
    head, content = _split(exchange.forward())
    exchange.answer(_with_length(head, content[: len(content) // 2]))


def empty_answer(exchange: Exchange) -> None:
    """The answer has its status and no body, and its content-length says that all is well."""
    head, _ = _split(exchange.forward())
    exchange.answer(_with_length(head, b""))


def duplicate(exchange: Exchange) -> None:
    """The request is delivered twice; the client gets the first answer."""
    answer = exchange.forward()
    exchange.forward()
    exchange.answer(answer)


def duplicate_telling_the_second(exchange: Exchange) -> None:
    """The request is delivered twice; the client gets the second answer."""
    exchange.forward()
    exchange.answer(exchange.forward())


def silence(exchange: Exchange) -> None:
    """The server takes the request and never answers."""
    exchange.wait_until_the_client_leaves()


def garbage(exchange: Exchange) -> None:
    """What comes back is no HTTP."""
    exchange.body()
    exchange.answer(b"\x16\x03\x01 this is not the protocol that you are looking for\r\n\r\n")
    exchange.close()


def refusal(status: int, code: str) -> Fault:
    """S3 refuses a request, which has done nothing then."""

    def refuse(exchange: Exchange) -> None:
        exchange.body()
        text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
        exchange.answer(_answer(status, text.encode()))

    refuse.__name__ = code
    return refuse


slow_down = refusal(503, "SlowDown")
internal_error = refusal(500, "InternalError")


def error_page(status: int) -> Fault:
    """Something on the way, which is no S3, answers with a page of its own."""

    def refuse(exchange: Exchange) -> None:
        exchange.body()
        exchange.answer(_answer(status, b"<html><body>An error of the load balancer</body>"))

    refuse.__name__ = f"error_page_{status}"
    return refuse


def byte_by_byte(seconds: float) -> Fault:
    """The body of the answer comes a byte at a time, with a pause before each."""

    def dribble(exchange: Exchange) -> None:
        head, content = _split(exchange.forward())
        exchange.answer(head)
        for byte in content:
            time.sleep(seconds)
            exchange.answer(bytes([byte]))

    return dribble


class HoldBack:
    """Requests that are lost to the client (`then`, such as a reset), and that `deliver` brings to the server later."""

    def __init__(self, then: Fault) -> None:
        self._then = then
        self.held: list[Exchange] = []

    def __call__(self, exchange: Exchange) -> None:
        exchange.body()
        self.held.append(exchange)
        self._then(exchange)

    def deliver(self) -> list[int]:
        """Send on what was held back; return the server's statuses."""
        held, self.held = self.held, []
        return [int(exchange.forward().split(b" ", 2)[1]) for exchange in held]


class Throttle:
    """Refuses requests with SlowDown while more than `limit` are under way, and for `seconds` after that."""

    def __init__(self, limit: int, seconds: float) -> None:
        self.refused = self.served = 0
        self._limit = limit
        self._seconds = seconds
        self._lock = threading.Lock()
        self._under_way = 0
        self._closed_until = 0.0

    def __call__(self, exchange: Exchange) -> None:
        with self._lock:
            self._under_way += 1
            now = time.monotonic()
            if self._under_way > self._limit:
                self._closed_until = now + self._seconds
            is_refused = self._under_way > self._limit or now < self._closed_until
            self.refused += is_refused
            self.served += not is_refused
        try:
            (slow_down if is_refused else pass_on)(exchange)
        finally:
            with self._lock:
                self._under_way -= 1


@dataclass(slots=True)
class Rule:
    """A fault, and the requests that it happens to: of those that fit, the `nth` and those after it, `times` in all."""

    fault: Fault
    operation: str
    key: str
    nth: int
    times: int | None
    seen: int = 0
    played: int = 0

    def takes(self, request: Request) -> bool:
        """Whether it is this request's turn; counts it."""
        if not request.fits(self.operation, self.key):
            return False
        self.seen += 1
        if self.seen < self.nth or (self.times is not None and self.played >= self.times):
            return False
        self.played += 1
        return True


@dataclass(slots=True)
class FaultProxy:
    """The proxy, listening on a port of its own while it is entered.

    Attributes:
        requests: all that came, in order.
    """

    server_url: str
    requests: list[Request] = field(default_factory=list)
    _rules: list[Rule] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _listener: socket.socket = field(default_factory=socket.socket)
    _clients: set[socket.socket] = field(default_factory=set)
    _threads: list[threading.Thread] = field(default_factory=list)
    _is_closed: bool = False

    @property
    def endpoint_url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def play(self, fault: Fault, operation: str = ".*", key: str = "", *, nth: int = 1, times: int | None = 1) -> Rule:
        """Let a fault happen to an operation (a pattern) on keys in which `key` (a pattern) is found.

        `times=None` is for ever.

        Of several rules that take a request, the first one's fault happens.
        """
        rule = Rule(fault, operation, key, nth, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def count(self, operation: str = ".*", key: str = "") -> int:
        """How many such requests have come."""
        with self._lock:
            return sum(request.fits(operation, key) for request in self.requests)

    def heal(self) -> None:
        """Forget all faults, and the requests that were seen."""
        with self._lock:
            self._rules.clear()
            self.requests.clear()

    def __enter__(self) -> Self:
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(256)
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_closed = True
            open_sockets = [self._listener, *self._clients]
        for each in open_sockets:
            with contextlib.suppress(OSError):  # it may be closed already
                each.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="fault-proxy", daemon=True)
        self._threads = [each for each in self._threads if each.is_alive()]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._lock:
                if self._is_closed:
                    client.close()
                    return
                self._clients.add(client)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(lambda client=client: self._serve(client))  # type: ignore[misc]

    def _serve(self, client: socket.socket) -> None:
        server = urlsplit(self.server_url)
        try:
            # A client that leaves in the middle of an exchange ends it, whatever the fault was about to do.
            with contextlib.suppress(OSError, http.client.HTTPException), client, client.makefile("rb") as reader:
                for request in _requests(reader):
                    exchange = Exchange(request, client, reader, (str(server.hostname), int(server.port or 80)))
                    self._fault_for(request)(exchange)
                    if exchange.is_over:
                        break
        finally:
            with self._lock:
                self._clients.discard(client)

    def _fault_for(self, request: Request) -> Fault:
        with self._lock:
            self.requests.append(request)
            # All rules count, and the first that takes it wins.
            taking = [rule.fault for rule in self._rules if rule.takes(request)]
        return taking[0] if taking else pass_on


def _requests(reader: BinaryIO) -> Iterator[Request]:
    """The requests of one connection, as far as their heads; who takes one reads its body."""
    while line := reader.readline():
        headers = http.client.parse_headers(reader)
        method, target, _ = line.decode("latin-1").split()
        url = urlsplit(target)
        query = parse_qs(url.query)
        operation = method.lower()
        key = unquote(url.path).lstrip("/").partition("/")[2]
        if "list-type" in query:
            operation, key = "list", query.get("prefix", [""])[0]
        elif operation == "put" and "If-None-Match" in headers:
            operation = "create"
        waits = headers.get("Expect", "").lower() == "100-continue"
        # The server is to get it in one piece, and to close its connection afterwards; neither header is signed.
        del headers["Expect"], headers["Connection"]
        headers["Connection"] = "close"
        head = line + "".join(f"{name}: {text}\r\n" for name, text in headers.items()).encode("latin-1") + b"\r\n"
        yield Request(operation, key, head, int(headers.get("Content-Length", 0)), waits)


def _split(raw: bytes) -> tuple[bytes, bytes]:
    head, blank, content = raw.partition(b"\r\n\r\n")
    return head + blank, content


def _with_length(head: bytes, content: bytes) -> bytes:
    return re.sub(rb"(?im)^content-length: \d+", b"content-length: %d" % len(content), head) + content


def _answer(status: int, content: bytes) -> bytes:
    reason = http.client.responses[status]
    lines = [f"HTTP/1.1 {status} {reason}", "content-type: application/xml", f"content-length: {len(content)}", "", ""]
    return "\r\n".join(lines).encode() + content


def _reset(connection: socket.socket) -> None:
    """Close it so that the other side gets a reset, and not the end of the data."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
