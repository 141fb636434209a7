"""The report as a live page, for this machine alone.

Listens on 127.0.0.1 and answers only requests that name it as the host, so that no page from elsewhere can reach it by
a name that it lets point here (DNS rebinding), and only below a path that nobody can guess, so that other users of the
machine cannot look in.
"""

import hashlib
import http.server
import secrets
import threading
from collections.abc import Callable
from http import HTTPStatus

from ckptstore.errors import CheckpointError
from ckptstore.format import CONDEMNED, RUNS, TAGS
from ckptstore.objects.base import Objects

__all__ = ["LiveReport"]

HOST = "127.0.0.1"


class LiveReport:
    """A server of one page, which is made again when the store has changed.

    Attributes:
        url: where it is.
        port: that it listens on.
    """

    def __init__(self, objects: Objects, page: Callable[[str], str], *, port: int = 0) -> None:
        """Bind, and serve when `run` is called.

        Args:
            objects: the store's backend, whose listings tell whether anything has changed.
            page: makes the page; given what `state` says now.
            port: to listen on; 0 is any that is free.

        Raises:
            OSError: the port is taken.
        """
        self._objects = objects
        self._page = page
        self._made: tuple[str, bytes] = ("", b"")
        self._making = threading.Lock()
        token = secrets.token_urlsafe(16)
        self._server = http.server.ThreadingHTTPServer((HOST, port), self._handler(f"/{token}/"))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://{HOST}:{self.port}/{token}/"

    def run(self) -> None:
        """Serve until `stop`, or an interrupt."""
        self._server.serve_forever(poll_interval=0.2)

    def prepare(self) -> None:
        """Make the page now, for whoever asks first. Raises CheckpointError."""
        self._content()

    def stop(self) -> None:
        """End, from another thread."""
        self._server.shutdown()

    def close(self) -> None:
        """Let the port go."""
        self._server.server_close()

    def state(self) -> str:
        """A digest of the listings: equal as long as nothing was saved, deleted, tagged or found damaged."""
        found = hashlib.blake2b(digest_size=16)
        for prefix in (RUNS, TAGS, CONDEMNED):
            for row in sorted(self._objects.list(prefix), key=lambda row: row.key):
                found.update(f"{row.key} {row.size}\n".encode())
        return found.hexdigest()

    def _content(self) -> bytes:
        state = self.state()
        with self._making:
            if self._made[0] != state:
                self._made = state, self._page(state).encode()
            return self._made[1]

    def _handler(self, path: str) -> type[http.server.BaseHTTPRequestHandler]:
        live = self

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 10  # seconds; who says nothing is not waited for

            def do_GET(self) -> None:
                hosts = {f"{name}:{live.port}" for name in (HOST, "localhost")}
                if self.headers.get("Host") not in hosts:
                    self._answer(HTTPStatus.FORBIDDEN, b"this page is for the machine that it runs on\n", "text/plain")
                elif self.path == path:
                    self._made(live._content, "text/html; charset=utf-8")
                elif self.path == f"{path}state":
                    self._made(lambda: live.state().encode(), "text/plain")
                else:
                    self._answer(HTTPStatus.NOT_FOUND, b"there is nothing here\n", "text/plain")

            def _made(self, make: Callable[[], bytes], kind: str) -> None:
                try:
                    content = make()
                except CheckpointError as error:  # the page says so, and asks again
                    self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode(), "text/plain")
                else:
                    self._answer(HTTPStatus.OK, content, kind)

            def _answer(self, status: HTTPStatus, content: bytes, kind: str) -> None:
                self.send_response(status)
                for name, value in {
                    "Content-Type": kind,
                    "Content-Length": str(len(content)),
                    "Cache-Control": "no-store",
                    "X-Content-Type-Options": "nosniff",
                    "X-Frame-Options": "DENY",
                    "Referrer-Policy": "no-referrer",
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *arguments: object) -> None:
                """Say nothing: the path is what keeps others out."""

        return Handler
