"""Who stops waiting for a read leaves the thread that reads what it reads, until it ends.

Else a slot is written again under the thread, which would take that for damage.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from nbdstore.store import Pool, Volume
from nbdstore.store.layout import SLOT_MASK
from nbdstore.store.local_host import LocalFile
from nbdstore.store.mapmemory import load_now
from tests.store.pools import cold, read, until

BLOCK = 4096


@contextmanager
def held_up(method: str) -> Iterator[tuple[threading.Event, threading.Event]]:
    """While this lasts, that method of files waits in threads: (one waits, they may go on)."""
    waiting, go_on = threading.Event(), threading.Event()
    real = getattr(LocalFile, method)

    def held(file: LocalFile, what: Any, offset: int) -> Any:
        if threading.current_thread() is not threading.main_thread():
            waiting.set()
            go_on.wait()
        return real(file, what, offset)

    with mock.patch.object(LocalFile, method, held):
        try:
            yield waiting, go_on
        finally:
            go_on.set()


async def cancelled(work: Coroutine[Any, Any, Any], waiting: threading.Event) -> None:
    """Begin `work`, and cancel it when it waits for a thread that does."""
    task = asyncio.create_task(work)
    await until(waiting.is_set)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_a_client_leaves_the_block_that_a_thread_still_reads(
    pool: Pool, volume: Volume
) -> None:
    assert volume.write_now([(0, b"x" * BLOCK)])
    await pool._committer.settle()
    slot = int(volume.map.words[0]) & SLOT_MASK
    with cold(), held_up("preadv") as (reading, go_on):
        await cancelled(read(volume, 0, BLOCK), reading)
        assert volume.write_now([(0, b"y" * BLOCK)])
        await pool._committer.settle()
        assert pool._core.slots.is_used(np.array([slot])).all()
        go_on.set()
        await pool._core.misses.finish()
    await pool._committer.settle()
    assert not pool._core.slots.is_used(np.array([slot])).any()
    assert pool.status()["corruptions"] == 0


async def test_a_verification_that_is_ended_leaves_what_a_thread_still_verifies(
    pool: Pool, volume: Volume
) -> None:
    assert volume.write_now([(0, b"x" * BLOCK)])
    await pool._committer.settle()
    slot = int(volume.map.words[0]) & SLOT_MASK
    with held_up("pread_direct") as (verifying, go_on):
        await cancelled(volume.verify(0, BLOCK), verifying)
        assert volume.write_now([(0, b"y" * BLOCK)])
        await pool._committer.settle()
        assert pool._core.slots.is_used(np.array([slot])).all()
        go_on.set()
        await until(lambda: not pool._core.slots._readers)
    await pool._committer.settle()
    assert not pool._core.slots.is_used(np.array([slot])).any()
    assert pool.status()["corruptions"] == 0


async def test_a_client_leaves_the_leaf_that_a_thread_still_reads(
    pool: Pool, volume: Volume
) -> None:
    assert volume.write_now([(0, b"x" * BLOCK)])
    await pool.checkpoint()
    slot = volume.map.nodes.leaf_pointers(np.array([0]))[0][0] & SLOT_MASK
    volume.map.evict(1 << 30)
    with held_up("pread") as (reading, go_on):
        await cancelled(read(volume, 0, BLOCK), reading)
        load_now(pool._core, volume.map, 0, 1, "v")
        assert volume.write_now([(0, b"y" * BLOCK)])
        await pool.checkpoint()
        await pool._committer.settle()
        assert pool._core.slots.is_used(np.array([slot])).all()
        go_on.set()
        await until(lambda: not pool._core.slots._readers)
    await pool.checkpoint()
    await pool._committer.settle()
    assert not pool._core.slots.is_used(np.array([slot])).any()
    assert pool.status()["corruptions"] == 0
