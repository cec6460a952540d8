"""A server that is told to stop amid a change keeps clients away until the store is done with it.

It stops in the order of the daemon: the control API first, which cancels the calls that take too
long for it, then NBD. In between clients can still connect.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nbdstore.control.client import ControlClient
from nbdstore.errors import ControlError
from nbdstore.store import Volume
from nbdstore.store.administration import Administration
from tests.control.real_pool import TIMEOUT_S, Served
from tests.server.nbd_client import NbdClient, is_refused
from tests.store.pools import opened, read

MIB = 1 << 20
HASTE_S = 0.01


class Held:
    """Holds up every call of a method of the store."""

    def __init__(self, owner: type[Any], name: str) -> None:
        self.reached, self.passed = threading.Event(), threading.Event()
        self._original = getattr(owner, name)
        self._patch = mock.patch.object(owner, name, autospec=True, side_effect=self._wait)

    def __enter__(self) -> Held:
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.passed.set()
        self._patch.stop()

    async def _wait(self, *arguments: Any, **keywords: Any) -> Any:
        self.reached.set()
        while not self.passed.is_set():
            await asyncio.sleep(0)
        return await self._original(*arguments, **keywords)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A pool with ``db``, 4 MiB full of d, and its snapshot ``a``, which is empty."""
    with mock.patch("nbdstore.control.endpoint.STOP_TIMEOUT_S", HASTE_S):
        pool = Served(tmp_path)

    async def fill() -> None:
        volume = await pool.pool.create_volume("db", 4 * MIB)
        await pool.pool.create_snapshots([(volume, "a")])
        await volume.write(0, b"d" * 4 * MIB)

    pool.run(fill())
    yield pool
    pool.close()


def cancelled(served: Served, held: Held, change: Callable[[ControlClient], object]) -> None:
    """Begin a change, and have the control API end when the change is held up."""
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(change, served.client)
        assert held.reached.wait(TIMEOUT_S)
        served.run(served.endpoint.stop())
        assert isinstance(call.exception(TIMEOUT_S), ControlError)


def shrink(client: ControlClient) -> object:
    return client.update_volume("db", size=MIB, shrink=True, force=True)


async def write_at_the_end(served: Served) -> None:
    client = await NbdClient.connect(f"unix:{served.nbd_path}")
    await client.go("db")
    await client.write(3 * MIB, b"w" * MIB)
    client.close()


async def content(directory: Path) -> bytes:
    async with opened(directory) as pool:
        return await read(pool.volumes["db"])


def test_a_shrink_that_has_long_to_go_takes_nothing_from_who_attaches_then(served: Served) -> None:
    with Held(Volume, "write_zeroes") as held:
        cancelled(served, held, shrink)
        served.run(write_at_the_end(served))
    served.run(served._stop())
    assert asyncio.run(content(served.directory)) == b"d" * 3 * MIB + b"w" * MIB


CHANGES: dict[str, Callable[[ControlClient], object]] = {
    "shrink": shrink,
    "rollback": lambda client: client.rollback("db@a"),
    "lease": lambda client: client.acquire_lease("db", "node-1", force=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nobody_attaches_before_a_change_is_made_or_given_up(served: Served, change: str) -> None:
    with Held(Administration, "change") as held:
        cancelled(served, held, CHANGES[change])
        assert served.run(is_refused(f"unix:{served.nbd_path}", "db"))
