"""Block devices as sysfs shows them, and their nodes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nbdstore.agent.devices import BlockDevice, loop_devices, nbd_devices
from nbdstore.errors import DeviceError


def make(sysfs: Path, name: str, **files: str) -> None:
    for path, text in ({"dev": "43:96", "size": "0"} | files).items():
        file = sysfs / name / path.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")


def test_devices_are_listed_by_their_numbers(tmp_path: Path) -> None:
    for name in ("nbd10", "nbd9", "nbd0", "loop1", "nbd0p1", "sda"):
        make(tmp_path, name)
    assert [device.name for device in nbd_devices(tmp_path)] == ["nbd0", "nbd9", "nbd10"]
    assert [device.index for device in nbd_devices(tmp_path)] == [0, 9, 10]
    assert [device.name for device in loop_devices(tmp_path)] == ["loop1"]


def test_what_is_known_of_a_device(tmp_path: Path) -> None:
    make(tmp_path, "nbd3", size="8", pid="77", backend="nbdstore:x", inflight="       0        2")
    (tmp_path / "nbd3" / "holders" / "dm-0").mkdir(parents=True)
    device = BlockDevice("nbd3", tmp_path)
    assert (device.number, device.size, device.configured) == ((43, 96), 4096, True)
    assert (device.identifier, device.idle, device.holders) == ("nbdstore:x", False, ["dm-0"])


def test_processes_that_have_a_device_open(tmp_path: Path) -> None:
    for pid, target in (("7", "/dev/nbd3"), ("8", "/dev/nbd33"), ("9", "/chroot/dev/nbd3")):
        fd = tmp_path / "proc" / pid / "fd"
        fd.mkdir(parents=True)
        (tmp_path / "proc" / pid / "comm").write_text("qemu\n")
        (fd / "0").symlink_to("/dev/null")
        (fd / "5").symlink_to(target)
    (tmp_path / "proc" / "10").mkdir()
    device = BlockDevice("nbd3", tmp_path)
    assert device.users(tmp_path / "proc") == ["qemu (7)", "qemu (9)"]


def test_what_a_process_closes_meanwhile_hides_nothing_else_that_it_has_open(
    tmp_path: Path,
) -> None:
    pids = [str(pid) for pid in range(100, 120)]
    for pid in pids:
        fd = tmp_path / pid / "fd"
        fd.mkdir(parents=True)
        (tmp_path / pid / "comm").write_text("qemu\n")
        (fd / "3").touch()  # its link cannot be read
        (fd / "5").symlink_to("/dev/nbd3")
    assert BlockDevice("nbd3", tmp_path).users(tmp_path) == [f"qemu ({pid})" for pid in pids]


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    device = BlockDevice("nbd3", tmp_path)
    assert (device.size, device.configured, device.identifier, device.holders) == (
        0,
        False,
        None,
        [],
    )
    with pytest.raises(DeviceError, match="no device nbd3"):
        device.make_node()


@pytest.mark.requires("root")
def test_nodes_are_made_from_sysfs_and_checked(tmp_path: Path) -> None:
    dev = tmp_path / "dev"
    dev.mkdir()
    make(tmp_path, "nbd3")
    device = BlockDevice("nbd3", tmp_path, dev)
    for _ in range(2):
        assert device.make_node() == str(dev / "nbd3")
        found = (dev / "nbd3").stat()
        assert stat.S_ISBLK(found.st_mode)
        assert found.st_rdev == os.makedev(43, 96)
        assert stat.S_IMODE(found.st_mode) == 0o600
    make(tmp_path, "nbd3", dev="43:128")
    with pytest.raises(DeviceError, match="is not the device nbd3: remove it"):
        device.make_node()
