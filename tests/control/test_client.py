"""The client: everything through a real socket, and servers that misbehave."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdstore.control.client import ControlClient
from nbdstore.control.stream import PIECE_BYTES, Piece
from nbdstore.errors import (
    Busy,
    ControlError,
    InvalidArgument,
    NbdstoreError,
    NotFound,
    Unauthorized,
)
from tests.control.conftest import TOKEN, Answering
from tests.control.memory_pool import BLOCK, MemoryConnection

SIZE = 64 * BLOCK


class TestCalls:
    def test_volumes(self, answering: Answering) -> None:
        client = answering.client
        created = client.create_volume("db", SIZE, ["alice"])
        assert created.allow == ["alice"]
        assert client.volumes() == [created] == [client.volume("db")]
        changed = client.update_volume("db", size=2 * SIZE, new_name="web", allow=[])
        assert (changed.name, changed.size, changed.allow) == ("web", 2 * SIZE, [])
        with pytest.raises(InvalidArgument, match="--shrink"):
            client.update_volume("web", size=SIZE)
        assert client.update_volume("web", size=SIZE, shrink=True).size == SIZE
        limited = client.update_volume("web", iops=5, bandwidth=1 << 20, burst_s=0.5)
        assert (limited.iops, limited.bandwidth, limited.burst_s) == (5, 1 << 20, 0.5)
        assert client.update_volume("web", iops=0).iops == 0
        client.delete_volume("web")
        assert client.volumes() == []

    def test_the_pool(self, answering: Answering) -> None:
        client = answering.client
        assert client.pool().volumes == 0
        assert client.grow_pool(2 << 30).capacity == 2 << 30
        client.checkpoint()
        assert client.capacity().block_capacity == 2 << 30

    def test_attachments(self, answering: Answering) -> None:
        answering.bench.server.connections.append(MemoryConnection("db"))
        assert [item.export for item in answering.client.attachments()] == ["db"]

    def test_over_tcp(self, answering: Answering) -> None:
        client = ControlClient(answering.http_url, token=TOKEN)
        assert client.create_volume("db", SIZE) == client.volume("db")

    def test_errors_are_those_of_the_server(self, answering: Answering) -> None:
        client = answering.client
        with pytest.raises(NotFound, match="no volume 'db'"):
            client.volume("db")
        with pytest.raises(InvalidArgument):
            client.create_volume("db", 0)
        client.create_volume("db", SIZE)
        answering.bench.server.connections.append(MemoryConnection("db"))
        with pytest.raises(Busy, match="attached by"):
            client.delete_volume("db")
        with pytest.raises(Unauthorized, match="token"):
            ControlClient(answering.http_url).pool()

    def test_names_are_quoted(self, answering: Answering) -> None:
        with pytest.raises(NotFound, match=r"no volume 'a/b\?c=%2F d'"):
            answering.client.volume("a/b?c=%2F d")

    def test_names_that_no_request_has_room_for(self, answering: Answering) -> None:
        for call in (answering.client.volume, answering.client.backups.resume):
            with pytest.raises(InvalidArgument, match=r"nnn\.\.\.' is too long .* 255 characters"):
                call("n" * 10_000)
        with pytest.raises(NotFound, match="no volume"):
            answering.client.volume("n" * 7_000)


class TestContent:
    PIECES = [Piece(0, b"a" * BLOCK), Piece(5 * BLOCK, b"b" * BLOCK)]

    def test_there_and_back(self, answering: Answering) -> None:
        info = answering.client.write_content("db", SIZE, self.PIECES)
        assert (info.size, info.mapped) == (SIZE, 2 * BLOCK)
        content = answering.client.read_content("db")
        assert (content.size, list(content.pieces)) == (SIZE, self.PIECES)

    def test_an_empty_volume(self, answering: Answering) -> None:
        answering.client.create_volume("db", SIZE)
        content = answering.client.read_content("db")
        assert (content.size, list(content.pieces)) == (SIZE, [])

    def test_a_failure_in_the_middle_of_reading(self, answering: Answering) -> None:
        answering.client.write_content("db", SIZE, self.PIECES)
        answering.bench.pool.volumes["db"].fail_read_at = 5 * BLOCK
        content = answering.client.read_content("db")
        with pytest.raises(NbdstoreError, match="on fire"):
            list(content.pieces)

    def test_a_server_that_refuses_early_is_heard(self, answering: Answering) -> None:
        """The rest of a large import meets a closed socket; its error is the server's answer."""
        answering.client.create_volume("db", 64 << 20)
        answering.bench.pool.volumes["db"].fail_write_at = 0
        data = bytes(PIECE_BYTES)
        pieces = (Piece(n * PIECE_BYTES, data) for n in range(64))
        with pytest.raises(NbdstoreError, match="eels"):
            answering.client.write_content("db", 64 << 20, pieces)

    def test_a_source_that_fails_leaves_no_volume(self, answering: Answering) -> None:
        def failing() -> Iterator[Piece]:
            yield self.PIECES[0]
            raise NbdstoreError("the source is gone")

        with pytest.raises(NbdstoreError, match="the source is gone"):
            answering.client.write_content("db", SIZE, failing())
        while answering.client.volumes():
            pass  # the server notices that the connection was closed


class TestServersThatAreNotThere:
    @pytest.mark.parametrize(
        "url",
        [
            "",
            "unix:",
            "ftp://host",
            "host:10810",
            "http://",
            "http://h:x",
            "http://h/path",
            "nbd://h",
        ],
    )
    def test_urls_that_make_no_sense(self, url: str) -> None:
        with pytest.raises(InvalidArgument, match="not a server's address"):
            ControlClient(url)

    def test_nobody_at_a_socket(self, tmp_path: Path) -> None:
        client = ControlClient(f"unix:{tmp_path}/none.sock")
        assert not client.reachable()
        with pytest.raises(ControlError, match=r"no server answers at unix:.*No such file"):
            client.pool()

    def test_a_socket_of_somebody_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is not taken for one that nobody answers: the pool behind it may well be served."""

        def denied(*_args: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("nbdstore.unix_socket.connect", denied)
        with pytest.raises(ControlError, match="do this as the pool's owner"):
            ControlClient("unix:/run/control.sock").reachable()

    @pytest.mark.parametrize("host", ["a..b", "x" * 70])
    def test_hosts_that_make_no_sense(self, host: str) -> None:
        with pytest.raises(InvalidArgument, match="neither a host name nor an IP address"):
            ControlClient(f"http://{host}:1").pool()

    def test_nobody_at_a_port(self) -> None:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            client = ControlClient(f"http://127.0.0.1:{bound.getsockname()[1]}")
            with pytest.raises(ControlError, match="Connection refused"):
                client.pool()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "went away before it answered"),
        (b"NBDMAGICIHAVEOPT\0\x03", "went away before it answered"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "went away before it answered"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nwhat", "where JSON belongs"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "PoolInfo without uuid"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "where a PoolInfo belongs"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 5\r\n\r\noops!", "answered 502 with b'oops!'"),
    ],
)
def test_answers_that_make_no_sense(answer: bytes, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ControlError, match=message):
            ControlClient(f"http://127.0.0.1:{listener.getsockname()[1]}").pool()
        thread.join()


def test_a_server_that_is_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ControlError, match=r"no answer within 0\.05 s"):
            ControlClient(url, timeout_s=0.05).pool()


def test_the_client_starts_without_the_heavy_libraries() -> None:
    code = (
        "import sys, nbdstore.control.client; "
        "print([m for m in ('aiohttp', 'numpy', 'uvloop', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
