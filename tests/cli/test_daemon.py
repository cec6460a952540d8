"""The life of a server: its start after a crash, its end when the pool did not hold."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nbdstore import daemon, unix_socket
from nbdstore.control import SOCKET_NAME
from nbdstore.control.endpoint import Endpoint
from nbdstore.daemon import DaemonOptions
from nbdstore.errors import NbdstoreError, PoolFailed
from nbdstore.server import Server, ServerOptions
from nbdstore.store import Pool, PoolOptions
from tests.control.backup_pools import site, two_snapshots
from tests.control.conftest import TOKEN, TOKENS
from tests.server.nbd_client import is_refused


async def test_a_pool_that_failed_is_not_called_saved(tmp_path: Path) -> None:
    directory = tmp_path / "pool"
    Pool.create(directory, capacity=1 << 30, journal_size=1 << 20)

    def fail_and_stop(pool: Pool, _server: Server) -> None:
        pool._core.fail("the disk is on fire")
        os.kill(os.getpid(), signal.SIGTERM)

    options = DaemonOptions(
        pool=directory, pool_options=PoolOptions(), server_options=ServerOptions()
    )
    with pytest.raises(PoolFailed, match="the disk is on fire"):
        await daemon.run(options, fail_and_stop)


async def test_the_first_client_finds_what_a_crash_left_completed(tmp_path: Path) -> None:
    """A volume that has come whole, with the marks of one that has not."""
    crash = mock.Mock(side_effect=NbdstoreError("the lights went out"))
    async with site(tmp_path / "here") as here, site(tmp_path / "there") as there:
        await two_snapshots(here)
        patch = mock.patch("nbdstore.control.receiving._unmark", crash)
        with patch, pytest.raises(NbdstoreError, match="lights"):
            await there.receive("db", await here.stream("db@a"))
        assert there.visible() == []
    address, refused = f"unix:{tmp_path}/nbd.sock", []
    start = Server.start

    async def start_and_be_asked(server: Server) -> None:
        await start(server)
        refused.append(await is_refused(address, "db"))

    def stop(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    options = DaemonOptions(
        pool=tmp_path / "there",
        pool_options=PoolOptions(),
        server_options=ServerOptions(listen=[address]),
    )
    with mock.patch.object(Server, "start", start_and_be_asked):
        await daemon.run(options, stop)
    assert refused == [False]


class EarlyCallers:
    """Callers of the control API who come when NBD is served and HTTP is not imported yet."""

    def __init__(self, directory: Path) -> None:
        self.pool = directory / "pool"
        Pool.create(self.pool, capacity=1 << 30, journal_size=1 << 20)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.control_tcp = free.getsockname()
        self.nbd = directory / "nbd.sock"
        self.options = DaemonOptions(
            pool=self.pool,
            pool_options=PoolOptions(),
            server_options=ServerOptions(listen=[f"unix:{self.nbd}"]),
            control_tcp=self.control_tcp,
            control_tokens=TOKENS,
        )
        self.callers: list[socket.socket] = []

    def call(self) -> None:
        """Send a request each over the unix socket and TCP, beside a client of NBD."""
        unix_socket.connect(self.nbd, 30).close()
        self.callers.append(unix_socket.connect(self.pool / SOCKET_NAME, 30))
        self.callers.append(socket.create_connection(self.control_tcp, 30))
        for caller in self.callers:
            caller.sendall(
                b"GET /v1/pool HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Authorization: Bearer %s\r\n\r\n" % TOKEN.encode()
            )

    def answers(self) -> list[int]:
        """Wait for the answers, and return their statuses."""
        statuses = []
        for caller in self.callers:
            with caller, contextlib.closing(http.client.HTTPResponse(caller)) as response:
                response.begin()
                statuses.append(response.status)
        return statuses


async def test_who_calls_before_http_is_there_is_answered_when_it_is(tmp_path: Path) -> None:
    early = EarlyCallers(tmp_path)
    second: list[bool] = []
    answers: list[asyncio.Task[list[int]]] = []

    def load_late() -> type[Endpoint]:
        early.call()
        second.append(daemon._is_served(early.pool))
        return Endpoint

    def ask_and_stop(*_: Any) -> None:
        answers.append(asyncio.create_task(asyncio.to_thread(early.answers)))
        answers[0].add_done_callback(lambda _: os.kill(os.getpid(), signal.SIGTERM))

    with mock.patch.object(daemon, "_load_control_api", load_late):
        await daemon.run(early.options, ask_and_stop)
    assert await answers[0] == [200, 200]
    assert second == [True], "a second server would not wait for the pool"
    assert not (early.pool / SOCKET_NAME).exists()


async def test_who_waits_for_http_that_cannot_be_imported_is_let_go(tmp_path: Path) -> None:
    early = EarlyCallers(tmp_path)

    def fail_late() -> type[Endpoint]:
        early.call()
        raise ModuleNotFoundError("No module named 'aiohttp'")

    patch = mock.patch.object(daemon, "_load_control_api", fail_late)
    with patch, pytest.raises(ModuleNotFoundError, match="aiohttp"):
        await daemon.run(early.options, mock.Mock(side_effect=AssertionError("is not ready")))
    with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
        early.answers()
    for caller in early.callers:
        caller.close()
    assert not (early.pool / SOCKET_NAME).exists()
    with contextlib.closing(socket.create_server(early.control_tcp)):
        await (await Pool.open(early.pool)).close()


async def test_a_control_address_in_use_is_told_before_anybody_is_served(tmp_path: Path) -> None:
    early = EarlyCallers(tmp_path)
    start = mock.patch.object(Server, "start", side_effect=AssertionError("was served"))
    refused = pytest.raises(NbdstoreError, match="choose another address for --control")
    with socket.create_server(early.control_tcp), start, refused:
        await daemon.run(early.options, mock.Mock())
    assert not (early.pool / SOCKET_NAME).exists()
