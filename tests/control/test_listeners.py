"""Where the control API listens: what is refused, what is left behind, who may wait."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from nbdstore import unix_socket
from nbdstore.control import SOCKET_NAME
from nbdstore.control.listeners import Listeners
from nbdstore.errors import ControlError, InvalidArgument
from tests.control.conftest import TOKENS

LOOPBACK = ("127.0.0.1", 0)


def test_tcp_is_not_offered_without_a_token(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="--control-token-file"):
        Listeners(tmp_path, tcp=LOOPBACK)
    refused = pytest.raises(InvalidArgument, match="--control-token-file")
    with socket.create_server(LOOPBACK) as passed, refused:
        Listeners(tmp_path, passed=[passed])
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(LOOPBACK) as taken:
        host, port = taken.getsockname()
        with pytest.raises(InvalidArgument, match=f"{host}:{port}: address already in use"):
            Listeners(tmp_path, tcp=(host, port), tokens=TOKENS)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match=r"cannot make .*/gone/control.sock: No such file"):
        Listeners(tmp_path / "gone", tcp=LOOPBACK, tokens=TOKENS)


def test_the_unix_socket_is_the_owner_s_and_goes_at_the_end(tmp_path: Path) -> None:
    listeners = Listeners(tmp_path)
    path = tmp_path / SOCKET_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    waiting = unix_socket.connect(path, 30)
    listeners.close()
    assert list(tmp_path.iterdir()) == []
    with waiting, pytest.raises(ConnectionResetError):
        waiting.recv(1)
    listeners.close()
