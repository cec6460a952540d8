"""The Linux kernel as the client: filesystems on a volume survive the death of the server.

The kernel attaches with Debian's nbd-client, which does not reconnect: a device whose server has
died fails all requests, or (Linux 6.1, if the server died while a request was being sent) holds
them for ever. So the guest is given up with the server, and a new one attaches what is left.
"""

from __future__ import annotations

import pytest

from tests.clients.served_pool import ServedPool
from tests.guest.guest import HOST, Guest

pytestmark = [
    pytest.mark.requires("qemu-system-x86_64", "busybox", "modprobe", "depmod", "nbd-client"),
    pytest.mark.requires("mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair"),
    pytest.mark.timeout(600),
]

MAKE = {"ext4": "mkfs.ext4 -q", "xfs": "mkfs.xfs -q"}
# Both replay their journal when mounted; what they find after that must be nothing.
CHECK = {"ext4": "e2fsck -f -n", "xfs": "xfs_repair -n"}

# Each file is synced by itself, and its checksum noted. The writer that goes on in the background
# is what the server's death interrupts.
WRITE_FILES = """
mount /dev/nbd0 /mnt
mkdir /mnt/synced
for n in $(seq 30); do
    dd if=/dev/urandom of=/mnt/synced/$n bs=$((n * 997)) count=17 conv=fsync status=none
done
dd if=/dev/urandom of=/mnt/synced/large bs=1M count=24 conv=fsync status=none
while dd if=/dev/urandom of=/mnt/writing bs=64k count=64 conv=fsync; do :; done >/dev/null 2>&1 &
cd /mnt
sha256sum synced/*
"""
READ_FILES = """
mount /dev/nbd0 /mnt
cd /mnt
sha256sum synced/*
cd /
umount /mnt
"""


def attach(guest: Guest, pool: ServedPool, n_connections: int) -> None:
    guest.run(f"nbd-client {HOST} {pool.port} /dev/nbd0 -N disk -connections {n_connections}")


@pytest.mark.parametrize("n_connections", [1, 4])
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_files_are_back_after_the_server_was_killed(
    served: ServedPool, guest: Guest, filesystem: str, n_connections: int
) -> None:
    attach(guest, served, n_connections)
    guest.run(f"{MAKE[filesystem]} /dev/nbd0")
    sums = guest.run(WRITE_FILES)
    assert len(sums.splitlines()) == 31

    served.kill()
    served.restart()
    guest.reboot()

    attach(guest, served, n_connections)
    assert guest.run(READ_FILES) == sums
    guest.run(f"{CHECK[filesystem]} /dev/nbd0")
    guest.run("nbd-client -d /dev/nbd0")


def test_deleted_files_give_their_space_back(served: ServedPool, guest: Guest) -> None:
    attach(guest, served, 1)
    guest.run("mkfs.ext4 -q /dev/nbd0; mount /dev/nbd0 /mnt")
    before = served.show()["used"]
    guest.run("dd if=/dev/urandom of=/mnt/file bs=1M count=32 conv=fsync status=none")
    assert served.show()["used"] > before + (28 << 20)
    guest.run("rm /mnt/file; sync -f /mnt; fstrim /mnt; umount /mnt; nbd-client -d /dev/nbd0")
    assert served.show()["used"] < before + (4 << 20)
