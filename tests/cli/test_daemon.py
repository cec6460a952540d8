"""The end of a server's life, when the pool did not hold."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nbdstore import daemon
from nbdstore.daemon import DaemonOptions
from nbdstore.errors import PoolFailed
from nbdstore.server import Server, ServerOptions
from nbdstore.store import Pool, PoolOptions


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
