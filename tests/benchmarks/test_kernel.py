"""The rows through the kernel's nbd driver, in the guest, which has one: that they work."""

from __future__ import annotations

import json
import shlex
import sys

import pytest

from benchmarks.peers import ROOT
from tests.guest.guest import Guest

pytestmark = [
    pytest.mark.requires("qemu-system-x86_64", "busybox", "modprobe", "depmod", "nbd-client"),
    pytest.mark.requires("fio", "setpriv"),
    pytest.mark.timeout(600),
]
COMMAND = (
    f"{shlex.quote(sys.executable)} -m benchmarks run kernel-fsync-each-write --smoke "
    "--runtime 0.5 --peers nbdstore --json --no-plots --output /tmp/output"
)


def test_volumes_are_attached_measured_and_detached(guest: Guest) -> None:
    said = guest.run(
        f"cd {shlex.quote(str(ROOT))}\n{COMMAND} 2>/tmp/progress || cat /tmp/progress\n"
        "ls -d /sys/block/nbd*/pid 2>/dev/null || echo all are free"
    )
    assert said.endswith("all are free\n")
    (row,) = json.loads(said[said.index("{") : said.rindex("}") + 1])["rows"]
    assert (row["failed"], row["left_out"]) == ({}, {})
    assert len(row["samples"]["nbdstore"]) == 1
