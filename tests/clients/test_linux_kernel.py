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

# Each file is on its own responsibility: written, synced, and its checksum noted. The writer that
# goes on in the background is what the server's death interrupts.
WRITE_FILES = """
mount /dev/nbd0 /mnt
mkdir /mnt/synced
for n in $(seq 30); do
    dd if=/dev/urandom of=/mnt/synced/$n bs=$((n * 997)) count=17 conv=fsync status=none
done
dd if=/dev/urandom of=/mnt/synced/large bs=1M count=24 conv=fsync status=none
(cd /mnt && find synced -type f | sort | xargs sha256sum) >/run/sums
while dd if=/dev/urandom of=/mnt/writing bs=64k count=64 conv=fsync; do :; done >/dev/null 2>&1 &
echo $! >/run/writer
"""
# The writer ends at its first error.
GIVE_UP = """
while [ -d /proc/$(cat /run/writer) ]; do sleep 0.1; done
umount /mnt
"""
READ_FILES = """
mount /dev/nbd1 /mnt
cd /mnt
sha256sum --quiet --check /run/sums
find synced -type f | wc -l
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
    guest.run(GIVE_UP)
    assert guest.run(READ_FILES, timeout_s=300) == "31\n"
    guest.run(f"{CHECK[filesystem]} /dev/nbd1", timeout_s=300)
    guest.run("nbd-client -d /dev/nbd1")


def test_deleted_files_give_their_space_back(served: ServedPool, guest: Guest) -> None:
    attach(guest, "/dev/nbd0", served, 1)
    guest.run("mkfs.ext4 -q /dev/nbd0; mount /dev/nbd0 /mnt")
    before = served.show()["used"]
    guest.run("dd if=/dev/urandom of=/mnt/file bs=1M count=32 conv=fsync status=none")
    assert served.show()["used"] > before + (28 << 20)
    guest.run("rm /mnt/file; sync -f /mnt; fstrim /mnt; umount /mnt; nbd-client -d /dev/nbd0")
    assert served.show()["used"] < before + (4 << 20)
