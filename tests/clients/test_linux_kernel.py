"""The Linux kernel as the client: filesystems on a volume survive the death of the server.

The kernel attaches with Debian's nbd-client. A device whose server is gone is of no use any more
(nbd-client does not reconnect), so the filesystem is given up as in a crash: what was synced must
be there after the server's restart and a new attach.
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

WRITE_FILES = """
mount /dev/nbd0 /mnt
mkdir /mnt/many
for n in $(seq 50); do head -c $((n * 1000)) /dev/urandom >/mnt/many/$n; done
head -c 32M /dev/urandom >/mnt/large
(cd /mnt && find . -type f | sort | xargs sha256sum) >/run/sums
sync -f /mnt
"""
READ_FILES = """
mount /dev/nbd1 /mnt
cd /mnt
sha256sum --quiet --check /run/sums
find . -type f | wc -l
cd /
umount /mnt
"""


def attach(guest: Guest, device: str, pool: ServedPool, n_connections: int) -> None:
    guest.run(f"nbd-client {HOST} {pool.port} {device} -N disk -connections {n_connections}")


@pytest.mark.parametrize("n_connections", [1, 4])
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_files_are_back_after_the_server_was_killed(
    served: ServedPool, guest: Guest, filesystem: str, n_connections: int
) -> None:
    attach(guest, "/dev/nbd0", served, n_connections)
    guest.run(f"{MAKE[filesystem]} /dev/nbd0")
    guest.run(WRITE_FILES)

    served.kill()
    served.restart()

    attach(guest, "/dev/nbd1", served, n_connections)
    # The first mount still holds the filesystem's UUID: only a forced end of it frees the name.
    guest.run("umount -l /mnt")
    assert guest.run(READ_FILES, timeout_s=300).splitlines()[-1] == "51"
    guest.run(f"{CHECK[filesystem]} /dev/nbd1", timeout_s=300)
    guest.run("nbd-client -d /dev/nbd1")
