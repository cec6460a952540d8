"""Fixtures of the store's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdstore.store import Pool, Volume
from tests.store.pools import MIB, assert_clean, make_pool, opened


@pytest.fixture(params=[4096, 65536])
def block_size(request: pytest.FixtureRequest) -> int:
    """The smallest and the largest block size."""
    found: int = request.param
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A new pool of 64 MiB with blocks of 4 KiB and a journal of 1 MiB."""
    return make_pool(tmp_path / "pool")


@pytest.fixture
async def pool(directory: Path) -> AsyncIterator[Pool]:
    """That pool, open; checked after the test."""
    async with opened(directory) as found:
        yield found
    await assert_clean(directory)


@pytest.fixture
async def volume(pool: Pool) -> Volume:
    """A volume of 8 MiB in it."""
    return await pool.create_volume("v", 8 * MIB)
