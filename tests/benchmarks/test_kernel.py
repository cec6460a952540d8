"""The rows through the kernel's nbd driver, in the guest, which has one: that they work."""

from __future__ import annotations

import json

import pytest

from benchmarks import in_a_guest
from tests.guest.guest import Guest

pytestmark = [
    pytest.mark.requires("qemu-system-x86_64", "busybox", "modprobe", "depmod", "nbd-client"),
    pytest.mark.requires("fio", "setpriv"),
    pytest.mark.timeout(600),
]


def test_volumes_are_attached_measured_and_detached(guest: Guest) -> None:
    said = in_a_guest.run_in(guest, "kernel-fsync-each-write", "--peers", "nbdstore", "--json")
    free = guest.run("ls -d /sys/block/nbd*/pid 2>/dev/null || echo all are free")
    assert free == "all are free\n"
    (row,) = json.loads(said[said.index("{") : said.rindex("}") + 1])["rows"]
    assert (row["failed"], row["left_out"]) == ({}, {})
    assert len(row["samples"]["nbdstore"]) == 1
