"""The relay between a client that knows nothing of it and a real server that is killed."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdstore.agent import relay, store_server
from nbdstore.agent.relay import OLDSTYLE, OLDSTYLE_MAGIC, ROOM, Relay, StateFile
from nbdstore.agent.store_server import Link, StoreServer
from nbdstore.control.client import ControlClient
from nbdstore.errors import DeviceError, NbdstoreError
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import ClientTransmission, Reply
from nbdstore.protocol.constants import INIT_PASSWD, Command, Errno
from tests.clients.served_pool import ServedPool

SIZE = 128 << 20
N_WRITES = 8  # what fits into the socket while the relay is connecting
TIMEOUT_S = 60.0


class Client:
    """The other end of a relay, which runs in a thread."""

    def __init__(self, pool: ServedPool, *, dead_timeout_s: float = 60.0) -> None:
        self.server = StoreServer(ControlClient(f"unix:{pool.directory}/control.sock"))
        self.address = f"127.0.0.1:{pool.port}"
        self.reports: list[int | None] = []
        self.failure: NbdstoreError | None = None
        self.connected = threading.Event()
        self.waiting = threading.Event()
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(TIMEOUT_S)
        theirs.setblocking(False)
        self._theirs = theirs
        self.relay = Relay(
            theirs,
            self.connect,
            request_timeout_s=30.0,
            dead_timeout_s=dead_timeout_s,
            report=self.report,
        )
        self.transmission = ClientTransmission(ReplyMode.SIMPLE)
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def connect(self) -> Link:
        return store_server.dial(self.address, "db")

    def report(self, size: int | None) -> None:
        self.reports.append(size)
        (self.waiting if size is None else self.connected).set()

    def run(self) -> None:
        try:
            self.relay.run()
        except NbdstoreError as error:
            self.failure = error
        finally:
            self._theirs.close()

    def hello(self) -> tuple[int, int]:
        """Receive the greeting; return size and flags."""
        raw = b""
        while len(raw) < OLDSTYLE.size:
            raw += self.sock.recv(OLDSTYLE.size - len(raw))
        password, magic, size, flags = OLDSTYLE.unpack(raw)
        assert (password, magic) == (INIT_PASSWD, OLDSTYLE_MAGIC)
        return size, flags

    def send(
        self, command: int, offset: int = 0, length: int = 0, data: bytes | None = None
    ) -> int:
        cookie, raw = self.transmission.request(command, offset, length, 0, data)
        self.sock.sendall(raw)
        return cookie

    def replies(self, n_replies: int) -> dict[int, Reply]:
        """Receive replies, in whatever order."""
        found: dict[int, Reply] = {}
        while len(found) < n_replies:
            data = self.sock.recv(1 << 16)
            assert data, "the relay has left"
            found |= {reply.cookie: reply for reply in self.transmission.receive(data)}
        return found

    def close(self) -> None:
        self.sock.close()
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive()


@pytest.fixture
def client(pool: ServedPool) -> Iterator[Client]:
    client = Client(pool)
    yield client
    client.close()


def test_requests_and_replies_pass(client: Client) -> None:
    size, _ = client.hello()
    assert (size, client.reports) == (ROOM, [None, SIZE])
    data = bytes(range(256)) * 1024
    written = client.send(Command.WRITE, 4096, data=data)
    assert client.replies(1)[written].error == 0
    cookies = [client.send(Command.READ, 4096 + n, 100_000) for n in range(9)]
    beyond = client.send(Command.WRITE, SIZE, data=b"x")
    found = client.replies(10)
    assert [found[cookie].data for cookie in cookies] == [data[n : n + 100_000] for n in range(9)]
    assert found[beyond].error == Errno.ENOSPC
    client.send(Command.DISC)
    client.thread.join(TIMEOUT_S)
    assert (client.thread.is_alive(), client.failure) == (False, None)


def test_what_was_under_way_is_sent_again_to_the_next_server(
    client: Client, pool: ServedPool
) -> None:
    client.hello()
    client.waiting.clear()
    pool.kill()
    cookies = [
        client.send(Command.WRITE, n * 4096, data=bytes([n + 1]) * 4096) for n in range(N_WRITES)
    ]
    flush = client.send(Command.FLUSH)
    assert client.waiting.wait(TIMEOUT_S)
    client.connected.clear()
    pool.restart()
    assert client.connected.wait(TIMEOUT_S)
    found = client.replies(N_WRITES + 1)
    assert [found[cookie].error for cookie in (*cookies, flush)] == [0] * (N_WRITES + 1)
    read = client.send(Command.READ, 0, N_WRITES * 4096)
    assert client.replies(1)[read].data == b"".join(bytes([n + 1]) * 4096 for n in range(N_WRITES))
    assert client.reports[-2:] == [None, SIZE]


def test_what_is_read_beyond_the_end_is_zeros_until_the_volume_has_grown(
    client: Client, pool: ServedPool
) -> None:
    """As the page cache reads ahead; the client is told of more room than there is."""
    client.hello()
    written = client.send(Command.WRITE, SIZE - 4096, data=b"x" * 4096)
    assert client.replies(1)[written].error == 0
    within = client.send(Command.READ, SIZE - 4096, 4096)
    across = client.send(Command.READ, SIZE - 4096, 8192)
    behind = client.send(Command.READ, SIZE, 4096)
    found = client.replies(3)
    assert found[within].data == b"x" * 4096
    assert found[across].data == b"x" * 4096 + bytes(4096)
    assert found[behind].data == bytes(4096)

    pool.nbdstore("volume", "resize", "db", "192M")
    client.connected.clear()
    (connection,) = client.server.control.attachments()
    client.server.control.disconnect(connection.id)
    assert client.connected.wait(TIMEOUT_S)
    assert client.reports[-1] == 192 << 20
    written = client.send(Command.WRITE, SIZE, data=b"y" * 4096)
    assert client.replies(1)[written].error == 0
    across = client.send(Command.READ, SIZE - 4096, 8192)
    assert client.replies(1)[across].data == b"x" * 4096 + b"y" * 4096


def test_writes_that_overlap_end_as_they_were_sent(client: Client, pool: ServedPool) -> None:
    client.hello()
    for attempt in range(3):
        for n in range(N_WRITES // 2):
            client.send(Command.WRITE, 512, data=bytes([attempt * 100 + n & 0xFF]) * 8192)
        pool.kill()
        pool.restart()
        assert {reply.error for reply in client.replies(N_WRITES // 2).values()} == {0}
        # Concurrent writes may end in any order; what follows them may not.
        last = client.send(Command.WRITE, 512, data=bytes([attempt]) * 8192)
        assert client.replies(1)[last].error == 0
        read = client.send(Command.READ, 512, 8192)
        assert client.replies(1)[read].data == bytes([attempt]) * 8192


def test_a_server_that_stays_away_is_given_up(pool: ServedPool) -> None:
    client = Client(pool, dead_timeout_s=0.3)
    client.hello()
    pool.kill()
    client.send(Command.READ, 0, 4096)
    client.thread.join(TIMEOUT_S)
    with contextlib.suppress(ConnectionResetError):
        assert client.sock.recv(1) == b"", "what was asked gets no answer"
    client.close()
    assert "gave up after 0.3 s" in str(client.failure)
    pool.restart()


def test_another_volume_of_that_name_is_not_taken(pool: ServedPool) -> None:
    client = Client(pool)
    client.hello()
    pool.stop()
    pool.nbdstore("volume", "delete", "db")
    pool.create_volume("db", "64M")
    pool.restart()
    client.thread.join(TIMEOUT_S)
    assert "what was attached cannot go on" in str(client.failure)
    client.close()


def test_a_client_that_leaves_while_the_server_is_away(pool: ServedPool) -> None:
    client = Client(pool)
    client.hello()
    client.waiting.clear()
    pool.kill()
    assert client.waiting.wait(TIMEOUT_S)
    client.close()
    assert isinstance(client.failure, DeviceError | None)
    pool.restart()


def test_the_state_file_tells_whether_a_relay_lives(tmp_path: Path) -> None:
    path = tmp_path / "x.relay"
    assert relay.read_state(path) is None
    state = StateFile(path)
    found = relay.read_state(path)
    assert found == (os.getpid(), False, 0)
    state.report(SIZE)
    assert relay.read_state(path) == (os.getpid(), True, SIZE)
    state.report(None)
    assert relay.read_state(path) == (os.getpid(), False, 0)
    state.close()
    assert relay.read_state(path) is None
