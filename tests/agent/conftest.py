"""Pools that are served, and machines that attach their volumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.host import Host
from tests.children import Children
from tests.clients.served_pool import ServedPool


@pytest.fixture
def pool(children: Children, tmp_path: Path) -> Iterator[ServedPool]:
    """A pool being served, with the volumes "db" and "web"; checked when the test ends."""
    pool = ServedPool(children, tmp_path)
    pool.create("--capacity", "2G", "--journal-size", "8M")
    pool.create_volume("db", "128M")
    pool.create_volume("web", "320M")
    pool.start()
    yield pool
    pool.close()


@pytest.fixture
def host(children: Children, pool: ServedPool, tmp_path: Path) -> Iterator[Host]:
    """A machine that attaches with the fuse driver; no agent runs there yet."""
    with Host(children, pool, tmp_path / "host") as host:
        yield host


@pytest.fixture
def other_host(children: Children, pool: ServedPool, tmp_path: Path) -> Iterator[Host]:
    """Another machine."""
    with Host(children, pool, tmp_path / "other-host") as host:
        yield host
