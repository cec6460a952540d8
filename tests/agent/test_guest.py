"""The agent with the kernel's nbd driver, in a container of a guest: through kills and outages.

Each test boots once and does much, for an emulated machine is slow.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.guest_host import SHARED, WAIT, GuestHost
from tests.agent.served import Served
from tests.children import Children
from tests.clients.served_pool import ServedPool
from tests.guest.guest import Guest

pytestmark = [
    pytest.mark.requires("qemu-system-x86_64", "busybox", "modprobe", "depmod", "unshare"),
    pytest.mark.requires("mkfs.ext4", "e2fsck", "mkfs.xfs", "fio"),
    pytest.mark.timeout(600),
]

N_SMALL = 18  # more than the 16 devices that the driver makes by itself

FIO = (
    "fio --name=load --filename={where}/file --size=20M --rw=randwrite --bs=4k --ioengine=psync "
    "--fsync=32 --rate_iops=300 --verify=crc32c --verify_fatal=1"
)


@pytest.fixture
def served(children: Children, tmp_path: Path) -> Iterator[Served]:
    pool = ServedPool(children, tmp_path)
    pool.create("--capacity", "2G", "--journal-size", "8M")
    served = Served(pool, tmp_path)
    yield served
    pool.close()


def wait_for_writes(guest: Guest, n_more: int) -> None:
    """Wait until so many more writes to nbd0 have ended."""
    guest.run(
        "count() { set -- $(cat /sys/block/nbd0/stat); echo $5; }\n"
        f"target=$(($(count) + {n_more})); until [ $(count) -ge $target ]; do {WAIT}; done"
    )


def wait_for_state(host: GuestHost, volume: str, wanted: str) -> None:
    while host.state(volume) != wanted:
        pass  # asking takes a second


def test_io_goes_on_through_kills_outages_and_growth(guest: Guest, served: Served) -> None:
    served.pool.create_volume("db", "96M")
    host = GuestHost(guest, served)
    host.start("--mount", f"volume=db,path={SHARED}/db,owner=65534:65534")
    where = f"{SHARED}/db"
    guest.run(
        f"until grep -q ' {where} ext4 ' /proc/mounts; do {WAIT}; done; "
        f"[ $(stat -c %u:%g {where}) = 65534:65534 ]"
    )
    guest.run(f"({FIO.format(where=where)} >/run/fio.log 2>&1; echo $? >/run/fio.status) &")

    wait_for_writes(guest, 200)
    served.pool.kill()
    host.kill()
    assert f" {where} " in guest.run("cat /proc/mounts"), "the mount outlives its container"
    served.pool.restart()
    host.start(without="sys_resource")
    wait_for_writes(guest, 200)

    guest.run("ip link set eth0 down")
    wait_for_state(host, "db", "waiting")
    guest.run("ip link set eth0 up")
    wait_for_writes(guest, 200)
    wait_for_state(host, "db", "attached")

    # The device can grow, the filesystem cannot: told, and done as soon as that is put right.
    served.pool.nbdstore("volume", "resize", "db", "160M")
    while "it takes CAP_SYS_RESOURCE" not in host.ask(do="status")[0]["message"]:
        pass  # asking takes a second
    assert [finding["kind"] for finding in host.ask(do="doctor")] == ["filesystem"]
    assert host.state("db") == "attached"
    host.kill()
    host.start()
    size = f"$(stat -f -c '%b * %S' {where})"
    guest.run(f"until [ $(({size})) -gt $((120 << 20)) ]; do {WAIT}; done", timeout_s=60)
    assert "is mounted at" in host.ask(do="detach", volume="db")
    guest.run(f"until [ -e /run/fio.status ]; do {WAIT}; done")
    guest.run("cat /run/fio.log; exit $(cat /run/fio.status)")
    assert host.ask(do="doctor") == []
    host.ask(do="attach", request={"volume": "db"})
    assert host.ask(do="umount", volume="db") is None
    guest.run("e2fsck -f -n /dev/nbd0")
    host.stop()
    guest.run("! dmesg | grep -E 'I/O error|EXT4-fs error|EXT4-fs warning'")
    assert served.pool.nbdstore("lease", "list") == "no volume is leased\n"


def test_what_one_process_can_do(guest: Guest, served: Served, tmp_path: Path) -> None:
    """See tests/agent/inside.py for the steps."""
    pool = served.pool
    pool.create_volume("xfs", "320M")
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(5 << 20)
        file.write(b"precious")
    pool.nbdstore("import", str(raw), "zeroed")
    said = guest.run(
        f"{GuestHost(guest, served).environment}"
        f"cd /run; {sys.executable} -m tests.agent.inside {N_SMALL}"
    )
    assert "all steps done" in said
    guest.run("! dmesg | grep -E 'I/O error|XFS.*(error|shut)'")


def test_two_hosts(guest: Guest, served: Served, children: Children, tmp_path: Path) -> None:
    """Moving a volume from a host that does not answer is safe at once: that one is fenced."""
    served.pool.create_volume("db", "96M")
    (tmp_path / "other").mkdir()
    with Guest(children, tmp_path / "other") as other_guest:
        host, other = GuestHost(guest, served), GuestHost(other_guest, served)
        host.start("--holder", "host-a")
        other.start("--holder", "host-b")
        where = host.mount("db")
        guest.run(f"echo before >{where}/file; sync -f {where}; echo lost >{where}/late")
        request = {"volume": "db", "path": where}
        assert "leased to 'host-a'" in other.ask(do="mount", request=request)
        assert other.mount("db", force=True) == where
        assert other_guest.run(f"cat {where}/file; echo after >{where}/file; sync -f {where}") == (
            "before\n"
        )
        wait_for_state(host, "db", "fenced")
        assert "what is mounted here is not what it holds" in host.ask(do="status")[0]["message"]
        assert host.ask(do="detach", volume="db", force=True) is None
        assert where not in guest.run("cat /proc/mounts")
        assert other_guest.run(f"cat {where}/file; ls {where}/late 2>&1 || :").startswith("after\n")
        assert other.ask(do="umount", volume="db") is None
        assert guest.run(f"cat {host.mount('db')}/file") == "after\n"
        host.stop()
        other.stop()
