"""The harness itself: what the tests with a guest rely on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.children import CommandError
from tests.guest.guest import Guest, GuestError

pytestmark = pytest.mark.requires("qemu-system-x86_64", "busybox", "modprobe", "depmod")


def test_a_guest_runs_scripts_and_keeps_its_state_between_them(guest: Guest) -> None:
    assert guest.run("echo out; echo err >&2; mkdir /run/kept") == "out\nerr\n"
    assert guest.run("exit 3", status=3) == ""
    assert guest.run("ls -d /run/kept") == "/run/kept\n"
    with pytest.raises(CommandError, match="status 1:\nseen") as caught:
        guest.run("echo seen\nfalse\necho never")
    assert caught.value.status == 1
    with pytest.raises(GuestError, match="not done within 1 s"):
        guest.run("sleep 1000", timeout_s=1)


def test_a_guest_has_the_hosts_files_and_nbd_devices(guest: Guest) -> None:
    here = Path(__file__)
    assert guest.run(f"cat {here}") == here.read_text()
    guest.run(f"rm {here}")
    assert here.exists()
    assert "/dev/nbd0\n" in guest.run("ls -d /dev/nbd*")
