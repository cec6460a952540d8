"""Fixtures of the store's tests."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdstore.store import Pool, Volume
from tests.store.pools import MIB, assert_clean, make_pool, opened
from tests.store.specimen import contents, make_specimen


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


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed pool with all kinds of blocks; not to be changed."""
    return asyncio.run(make_specimen(tmp_path_factory.mktemp("specimen") / "pool"))


@pytest.fixture(scope="session")
def before(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What it holds; opening a pool writes to it, so a copy is opened."""
    copy = shutil.copytree(original, tmp_path_factory.mktemp("before") / "pool")
    return asyncio.run(contents(copy))


@pytest.fixture
def damaged(original: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "damaged"))
