"""The kernel's own client through one kill after the other: see tests.kills.guest."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.children import Children
from tests.clients.served_pool import ServedPool
from tests.figures import Tell
from tests.guest.guest import Guest
from tests.kills.guest import GuestUnderKills, figures_of

pytestmark = [
    pytest.mark.requires("qemu-system-x86_64", "busybox", "modprobe", "depmod", "nbd-client"),
    pytest.mark.requires("mkfs.ext4", "e2fsck"),
    pytest.mark.timeout(600),
]

N_KILLS = 2


def test_a_mounted_filesystem_lives_through_kills(
    guest: Guest, children: Children, tmp_path: Path, tell: Tell
) -> None:
    pool = ServedPool(children, tmp_path)
    pool.create("--capacity", "256M", "--journal-size", "4M")
    pool.create_volume("disk", "128M")
    pool.start()
    under_kills = GuestUnderKills(guest, pool, "ext4")
    source = random.Random(1)
    for _ in range(N_KILLS):
        under_kills.kill(source)
    n_files = under_kills.n_synced()
    under_kills.verify()
    pool.close()
    tell("guest", figures_of(N_KILLS, n_files))
