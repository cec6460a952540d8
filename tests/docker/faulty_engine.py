"""An engine that goes away in the middle: a relay before a real one, that breaks one call.

Owns the relay; which calls there are, and which one to break, the test learns and says. Only calls
that change something are counted.
"""

from __future__ import annotations

import http.client
import http.server
import socket
import socketserver
import threading
from pathlib import Path
from typing import Any

from tests.closing import Closing


class FaultyEngine(Closing):
    """Relay calls to the engine at `target`, from a socket beside it.

    ``calls`` are those that came since `expect`, as "POST /containers/create".
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.calls: list[str] = []
        self.fails: tuple[int, bool] | None = None
        self.path = target.with_name("faulty.sock")
        relay = self

        class Handler(_Handler):
            engine = relay

        self._server = _Server(str(self.path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"unix://{self.path}"

    def expect(self, fails: int | None = None, *, done: bool = False) -> None:
        """Begin to count; break call number `fails`: before it is done, or with `done` after it."""
        self.calls = []
        self.fails = None if fails is None else (fails, done)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.path.unlink()


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class _Handler(http.server.BaseHTTPRequestHandler):
    engine: FaultyEngine
    protocol_version = "HTTP/1.1"

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fails = False
        if self.command != "GET":
            self.engine.calls.append(f"{self.command} {self.path.partition('?')[0]}")
            fails = self.engine.fails is not None and self.engine.fails[0] == len(self.engine.calls)
        if fails and self.engine.fails and not self.engine.fails[1]:
            self.close_connection = True
            return
        status, headers, content = self._ask(body)
        if fails:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(content)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.engine.target))
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    do_GET = do_POST = do_DELETE = do_HEAD = _relay  # noqa: N815

    def log_message(self, *words: Any) -> None:
        """Say nothing: the engine has a log."""

    def address_string(self) -> str:
        return "unix"
