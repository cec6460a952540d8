"""Pools for the tests with real clients; each pool must be in perfect order when its test ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.children import Children
from tests.clients.served_pool import ServedPool


@pytest.fixture
def pool(children: Children, tmp_path: Path) -> Iterator[ServedPool]:
    """A new pool with the volume "disk" of 1 GiB, not served yet; checked when the test ends."""
    pool = ServedPool(children, tmp_path)
    pool.create("--capacity", "8G", "--journal-size", "16M")
    pool.create_volume("disk", "1G")
    yield pool
    pool.close()


@pytest.fixture
def served(pool: ServedPool) -> ServedPool:
    """The pool of ``pool``, being served."""
    pool.start()
    return pool
