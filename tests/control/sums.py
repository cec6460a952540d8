"""Whether what is said of the space of a pool adds up, in itself and with what a walk finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nbdstore.control import space
from nbdstore.store import Pool, PoolOptions, recovery
from nbdstore.store.host import Host
from nbdstore.store.local_host import LOCAL
from nbdstore.store.treewalk import TreeWalk


def add_up(report: space.SpaceReport, block_size: int) -> None:
    """Assert that what is said of a pool is consistent in itself."""
    assert report.capacity == report.used + report.reclaimable + report.free
    assert report.used == report.data + report.maps
    assert report.data == sum(image.own for image in report.images) + report.emptying
    assert min(report.emptying, report.maps, report.free, report.reclaimable) >= 0
    volumes = [image for image in report.images if image.kind == "volume"]
    assert report.provisioned >= sum(volume.provisioned for volume in volumes if not volume.state)
    for image in report.images:
        assert image.mapped == image.own + image.shared
        assert 0 <= image.mapped <= -(-image.provisioned // block_size) * block_size
        assert image.mapped + image.reserved <= -(-image.provisioned // block_size) * block_size
        assert (image.unique is None) == (image.kind == "volume")
        assert image.unique is None or 0 <= image.unique <= image.own


async def assert_all_adds_up(pool: Pool) -> None:
    """Assert it of an open pool, and that it says the same of each image elsewhere."""
    report = await space.report(pool)
    add_up(report, pool.status()["block_size"])
    own = {image.name: image for image in report.images}
    for volume in pool.volumes.values():
        status = volume.status()
        assert (status["mapped"], status["reserved"]) == (
            own[volume.name].mapped,
            own[volume.name].reserved,
        )
    assert pool.status()["used"] == report.used


class Finder:
    """Takes what a walk reports: in these pools, nothing."""

    repair = False
    n_damaged_nodes = 0

    def add(
        self, severity: str, where: str, expected: str, found: str, *, repaired: bool = False
    ) -> None:
        raise AssertionError(f"{severity}: {where}: expected {expected}, found {found}")

    def progress(self, n_done: int, n_all: int, /) -> None: ...


def count(directory: Path, host: Host = LOCAL) -> tuple[int, int]:
    """Bytes of data, and of all that is in use, that a walk through a closed pool finds."""
    disk = host.disk(directory)
    disk.lock()
    try:
        parts = recovery.open_parts(host, disk, PoolOptions())
        block_size = parts.services.core.block_size
        walk = TreeWalk(parts, Finder(), verify=False)
        n_outside = int(np.bitwise_count(walk.used).sum()) - 1  # slot 0 counts as used
        walk.run()
        n_used = int(np.bitwise_count(walk.used).sum()) - n_outside
        registry = parts.registry
        images = [*registry.by_id.values(), *registry.snapshots.values()]
        n_data = sum(image.info.n_own for image in images)  # which the walk has compared
        return n_data * block_size, n_used * block_size
    finally:
        disk.close()
