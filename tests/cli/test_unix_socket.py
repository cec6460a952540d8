"""Unix sockets at paths of any length, and what killed servers leave behind."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from nbdstore import unix_socket


@pytest.fixture(params=[0, 60, 300, 1000], ids="{} more bytes of path".format)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    directory = tmp_path
    for _ in range(request.param // 60):
        directory = directory / ("d" * 59)
    directory.mkdir(parents=True, exist_ok=True)
    return directory / "control.sock"


def exchange(listener: socket.socket, path: Path) -> bytes:
    with unix_socket.connect(path, 5) as client:
        server, _ = listener.accept()
        with server:
            server.sendall(b"hello")
        return client.recv(100)


def test_a_client_reaches_the_listener(path: Path) -> None:
    with unix_socket.listen(path) as listener:
        assert exchange(listener, path) == b"hello"


def test_only_the_owner_may_connect(path: Path) -> None:
    with unix_socket.listen(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_else_is_left_in_the_directory(path: Path) -> None:
    with unix_socket.listen(path):
        assert list(path.parent.iterdir()) == [path]


def test_a_socket_left_behind_refuses_and_is_replaced(path: Path) -> None:
    unix_socket.listen(path).close()
    with pytest.raises(ConnectionRefusedError):
        unix_socket.connect(path)
    with unix_socket.listen(path) as listener:
        assert exchange(listener, path) == b"hello"


def test_nobody_there(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        unix_socket.connect(path)


def test_a_directory_that_is_missing(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        unix_socket.listen(path.parent / "missing" / "control.sock")
