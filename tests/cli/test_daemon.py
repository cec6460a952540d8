"""The life of a server: its start after a crash, its end when the pool did not hold."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nbdstore import daemon
from nbdstore.daemon import DaemonOptions
from nbdstore.errors import NbdstoreError, PoolFailed
from nbdstore.server import Server, ServerOptions
from nbdstore.store import Pool, PoolOptions
from tests.control.backup_pools import site, two_snapshots
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
