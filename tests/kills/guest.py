"""The Linux kernel as the client that lives through kills: a mounted filesystem, never let go.

A writer in the guest makes file after file, syncs each, and then notes its checksum. The server is
killed and started again; the device gets new connections, and the writer goes on without having
seen an error. What was noted must be what is in the volume, past the guest's page cache.

``python -m tests.kills.guest --seed N --minutes M`` does it for as long as one likes.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from nbdstore.control.client import ControlClient
from tests.children import Children
from tests.clients.served_pool import ServedPool
from tests.guest.guest import HOST, Guest
from tests.seeds import main

ROOT: Final = Path(__file__).parents[2]
N_CONNECTIONS: Final = 2
PROGRESS_TIMEOUT_S: Final = 120.0
EXPORT: Final = "disk"
KILLS: Final = 8  # of one boot, in long runs

MAKE: Final = {"ext4": "mkfs.ext4 -q -E lazy_itable_init=0", "xfs": "mkfs.xfs -q"}
CHECK: Final = {"ext4": "e2fsck -f -n", "xfs": "xfs_repair -n"}

# Sizes differ, so that files begin and end within blocks; names come again, so that space is used
# again. Of a file that is being written again there is no checksum.
WRITER: Final = """
mkdir /run/sums
n=0
while [ ! -e /run/enough ]; do
    n=$((n + 1)); name=file-$((n % 24))
    rm -f /run/sums/$name
    if dd if=/dev/urandom of=/mnt/$name bs=$((n * 997 % 40000 + 1)) count=9 conv=fsync status=none
    then
        (cd /mnt; sha256sum $name) >/run/sum; mv /run/sum /run/sums/$name
        echo $n >/run/n.new; mv /run/n.new /run/n
    else echo "file $n" >>/run/failed
    fi
done
touch /run/done
"""
VERIFY: Final = """
touch /run/enough
until [ -e /run/done ]; do /run/guest/busybox usleep 100000; done
if [ -e /run/failed ]; then cat /run/failed; exit 1; fi
sync; echo 3 >/proc/sys/vm/drop_caches
cd /mnt
cat /run/sums/* | sha256sum --quiet --check -
cd /
umount /mnt
"""


class GuestUnderKills:
    """A filesystem in a guest, on a volume whose server is killed.

    Arguments:
        guest: booted.
        pool: being served, with the volume "disk".
        filesystem: "ext4" or "xfs".
    """

    def __init__(self, guest: Guest, pool: ServedPool, filesystem: str) -> None:
        self.guest = guest
        self.pool = pool
        self.filesystem = filesystem
        self._control = ControlClient(f"unix:{pool.directory}/control.sock")
        self._attach("connect")
        guest.run(f"{MAKE[filesystem]} /dev/nbd0; mount /dev/nbd0 /mnt")
        guest.run(f"cat >/run/writer <<'END'\n{WRITER}\nEND\nsh /run/writer >/dev/console 2>&1 &")
        self.wait_for_progress(1)

    def _attach(self, command: str) -> None:
        """Give the device connections."""
        self.guest.run(
            f"cd {ROOT}; PYTHONPATH=. {sys.executable} -m tests.guest.reattach {command} {HOST} "
            f"{self.pool.port} {EXPORT} {N_CONNECTIONS}"
        )

    def n_synced(self) -> int:
        """Files that the writer has synced so far."""
        return int(self.guest.run("cat /run/n 2>/dev/null || echo 0"))

    def wait_for_progress(self, n_files: int) -> None:
        """Wait until so many more files have been synced; give new connections for dead ones.

        The kernel takes a connection only for one that it knows to be dead, so what is offered
        may be refused for a while.
        """
        target = self.n_synced() + n_files
        deadline = time.monotonic() + PROGRESS_TIMEOUT_S
        while self.n_synced() < target:
            assert time.monotonic() < deadline, "the guest does not get on"
            if self._control.volume(EXPORT).attached < N_CONNECTIONS:
                self._attach("reconfigure")

    def kill(self, source: random.Random) -> None:
        """Kill the server after some files, start it again, and see the writer go on."""
        self.wait_for_progress(source.randint(1, 10))
        self.pool.kill()
        self.pool.restart()
        self.wait_for_progress(2)

    def verify(self) -> None:
        """Stop writing; compare all files with their checksums, and check the filesystem."""
        self.guest.run(VERIFY)
        self.guest.run(f"{CHECK[self.filesystem]} /dev/nbd0")
        self.guest.run("! dmesg | grep -E 'I/O error|EXT4-fs error|XFS.*(error|shut)'")
        self.guest.run("nbd-client -d /dev/nbd0")


def kill_under_a_guest(seed: int) -> Mapping[str, int]:
    """Boot a guest and kill its server again and again; return what it came to."""
    source = random.Random(seed)
    directory = Path(tempfile.mkdtemp(prefix=f"nbdstore-guest-{seed}-"))
    try:
        with Children(directory) as children, Guest(children, directory) as guest:
            pool = ServedPool(children, directory)
            pool.create("--capacity", "512M", "--journal-size", "4M")
            pool.create_volume(EXPORT, "384M")
            pool.start()
            under_kills = GuestUnderKills(guest, pool, source.choice(list(MAKE)))
            for _ in range(KILLS):
                under_kills.kill(source)
            n_files = under_kills.n_synced()
            under_kills.verify()
            pool.close()
    except BaseException as error:
        error.add_note(f"the pool and the logs are in {directory}")
        raise
    shutil.rmtree(directory)
    return figures_of(KILLS, n_files)


def figures_of(n_kills: int, n_files: int) -> dict[str, int]:
    """What one guest came to."""
    return {"kills under a mounted filesystem": n_kills, "files synced in a guest": n_files}


if __name__ == "__main__":
    main("tests.kills.guest", kill_under_a_guest)
