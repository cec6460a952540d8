"""The agent on this machine, for real: a server, filesystems on loop devices, kills of everything.

The fuse driver needs no nbd in the kernel; what only the kernel's driver has is in test_guest.py.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from nbdstore.agent import devices, mounts
from tests.agent.host import Host

pytestmark = [
    pytest.mark.requires("root", "/dev/fuse", "/dev/loop-control", "nbdfuse", "fusermount3"),
    pytest.mark.requires(
        "losetup", "mount", "mkfs.ext4", "e2fsck", "debugfs", "mkfs.xfs", "setsid"
    ),
    pytest.mark.requires("xfs_io", "xfs_db", "xfs_repair", "unshare"),
    pytest.mark.timeout(180),
]


def is_mounted(path: Path) -> bool:
    return mounts.mounted_at(str(path)) is not None


# --- People, without an agent --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_new_volume_is_formatted_once_and_mounted_again_as_it_is(host: Host, kind: str) -> None:
    where = host.directory / "mnt"
    options = ("--fs", kind, "--owner", "999:998", "--mode", "2770", "--driver", "fuse")
    host.nbdstore(
        *("mount", "web", where, *options),
        *("--options", "noatime,nodev", "--propagation", "private"),
    )
    (mount,) = [item for item in mounts.mounts() if item.path == str(where)]
    assert (mount.type, mount.shared) == (kind, False)
    assert f" {where} {kind} rw,nodev,noatime" in Path("/proc/mounts").read_text()
    found = where.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (999, 998, 0o2770)
    (where / "file").write_text("content")
    os.chown(where, 0, 0)
    host.nbdstore("umount", "web")
    assert not is_mounted(where)
    assert devices.loop_devices() == [] or not any(
        (device.backing_file or "").startswith(str(host.directory))
        for device in devices.loop_devices()
    )

    host.nbdstore("mount", "web", where, *options)
    assert "discard" in Path("/proc/mounts").read_text().partition(f" {where} ")[2].split("\n")[0]
    assert (where / "file").read_text() == "content"
    assert where.stat().st_uid == 0, "the owner is given once"
    host.nbdstore("umount", str(where))
    assert "no volume is leased" in host.nbdstore("lease", "list")


def test_a_volume_that_holds_data_is_never_formatted(host: Host, tmp_path: Path) -> None:
    """Its first blocks are zeros, as of a new volume, or of one whose superblock is lost."""
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(5 << 20)
        file.write(b"precious")
    host.pool.nbdstore("import", str(raw), "old")
    before = host.pool.nbdstore("export", "old", str(tmp_path / "before"))
    refused = host.nbdstore("mount", "old", host.directory / "mnt", status=1)
    assert "volume old was written before" in refused
    assert before == ""
    assert "nothing is attached" in host.nbdstore("agent", "status")
    host.pool.nbdstore("export", "old", str(tmp_path / "after"))
    assert (tmp_path / "after").read_bytes() == raw.read_bytes()


def attach_with_begun_mkfs(host: Host) -> str:
    """Attach "web" as it is when its agent was killed during mkfs.xfs; return the device."""
    device = host.nbdstore("attach", "web", "--driver", "fuse").splitlines()[0]
    path = host.record_path("web")
    record = json.loads(path.read_text())
    record["filesystem"] = {"type": "xfs", "made": "begun"}
    path.write_text(json.dumps(record))
    return device


def test_mkfs_that_was_killed_is_begun_again(host: Host) -> None:
    """What is on the device then is half a filesystem, made under the lease that is still held."""
    where = host.directory / "mnt"
    device = attach_with_begun_mkfs(host)
    # As far as mkfs had come: signatures, which it would refuse to overwrite without force.
    host.children.run("mkfs.xfs", "-q", "-K", device)
    host.nbdstore("mount", "web", where, "--fs", "xfs")
    assert is_mounted(where)
    assert json.loads(host.record_path("web").read_text())["filesystem"]["made"] == "made"
    host.nbdstore("umount", "web")
    host.nbdstore("detach", "web")


def test_what_was_made_by_hand_after_mkfs_failed_is_kept(host: Host) -> None:
    where = host.directory / "mnt"
    device = host.nbdstore("attach", "db", "--driver", "fuse").splitlines()[0]
    refused = host.nbdstore("mount", "db", where, "--fs", "xfs", status=1)
    assert "mkfs.xfs" in refused, "it takes 300 MiB"
    assert json.loads(host.record_path("db").read_text())["filesystem"] is None
    host.children.run("mkfs.ext4", "-q", device)
    where.mkdir(exist_ok=True)
    host.children.run("mount", device, where)
    (where / "file").write_text("precious")
    host.children.run("umount", where)
    host.nbdstore("mount", "db", where)
    assert (where / "file").read_text() == "precious"
    host.nbdstore("umount", "db")
    host.nbdstore("detach", "db")


def test_what_was_made_by_hand_after_mkfs_was_killed_is_kept(host: Host) -> None:
    where = host.directory / "mnt"
    device = attach_with_begun_mkfs(host)
    assert "holds xfs, not ext4" in host.nbdstore("mount", "web", where, "--fs", "ext4", status=2)
    host.children.run("mkfs.ext4", "-q", device)
    host.children.run("debugfs", "-w", "-R", "mkdir precious", device)
    for kind in ("xfs", "ext4"):
        refused = host.nbdstore("mount", "web", where, "--fs", kind, status=1)
        assert "holds ext4 now; it is not formatted" in refused
    host.nbdstore("detach", "web")
    host.nbdstore("mount", "web", where)
    assert (where / "precious").is_dir()
    host.nbdstore("umount", "web")


def test_a_repair_leaves_a_snapshot_of_what_was_there_before(host: Host) -> None:
    where = host.directory / "mnt"
    host.nbdstore("mount", "db", where)
    (where / "file").write_text("content")
    host.nbdstore("umount", "db")
    host.nbdstore("mount", "db", where, "--fsck", "repair")
    host.nbdstore("umount", "db")
    assert "before-fsck" not in host.nbdstore("snapshot", "list"), "nothing was wrong"

    device = host.nbdstore("attach", "db", "--driver", "fuse").splitlines()[0]
    for request in ("clri <2>", "ssv state 2"):  # the root directory, and that there are errors
        host.children.run("debugfs", "-w", "-R", request, device)
    host.nbdstore("detach", "db")
    refused = host.nbdstore("mount", "db", where, status=1)
    assert "mount it with --fsck repair, which takes a snapshot before" in refused
    assert "before-fsck" not in host.nbdstore("snapshot", "list")
    said = host.nbdstore("mount", "db", where, "--fsck", "repair")
    assert is_mounted(where)
    (before,) = re.findall(r"the snapshot (db@before-fsck-[\dT.]*Z) holds", said)
    assert before in host.nbdstore("snapshot", "list", "db")
    host.nbdstore("umount", "db")
    host.nbdstore("snapshot", "rollback", before)
    assert "mount it with --fsck repair" in host.nbdstore("mount", "db", where, status=1)


def stop_in_the_middle(host: Host, where: Path) -> None:
    """Unmount an xfs as a crash leaves it: what is synced stands in its journal alone."""
    os.sync()
    host.children.run("xfs_io", "-x", "-c", "shutdown -f", where)
    host.nbdstore("umount", where)


def test_a_repair_of_an_xfs_replays_its_journal_before(host: Host) -> None:
    where = host.directory / "mnt"
    host.nbdstore("mount", "web", where, "--fs", "xfs", "--driver", "fuse")
    (where / "file").write_text("content")
    stop_in_the_middle(host, where)
    host.nbdstore("mount", "web", where, "--fsck", "repair")
    assert (where / "file").read_text() == "content"
    assert "before-fsck" not in host.nbdstore("snapshot", "list"), "nothing was to be repaired"

    (where / "other").write_text("content")
    inode = where.stat().st_ino
    stop_in_the_middle(host, where)
    device = host.nbdstore("attach", "web", "--driver", "fuse").splitlines()[0]
    commands = ("-c", f"inode {inode}", "-c", "write -d core.magic 0")
    host.children.run("xfs_db", "-x", *commands, device)
    host.nbdstore("detach", "web")
    refused = host.nbdstore("mount", "web", where, "--fsck", "repair", status=1)
    assert "its journal cannot be replayed" in refused
    assert "run 'xfs_repair -L' on the device" in refused
    (before,) = re.findall(r"the snapshot (web@before-fsck-[\dT.]*Z) holds", refused)
    assert before in host.nbdstore("snapshot", "list", "web")

    # As it says.
    device = host.nbdstore("attach", "web", "--driver", "fuse").splitlines()[0]
    host.children.run("xfs_repair", "-L", device)
    host.nbdstore("mount", "web", where)
    assert is_mounted(where)
    host.nbdstore("umount", "web")
    host.nbdstore("detach", "web")


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_clone_is_mounted_beside_its_origin(host: Host, kind: str) -> None:
    """Their filesystems have the same uuid. The snapshot is of one that is in use."""
    where, clone = host.directory / "mnt", host.directory / "clone"
    host.nbdstore("mount", "web", where, "--fs", kind, "--driver", "fuse")
    (where / "file").write_text("before")
    host.children.run("sync", "-f", where)
    host.nbdstore("snapshot", "create", "web@now")
    host.nbdstore("clone", "web@now", "copy")
    host.nbdstore("mount", "copy", clone, "--options", "noatime")
    assert (clone / "file").read_text() == "before"
    (clone / "file").write_text("after")
    host.nbdstore("umount", "web")
    host.nbdstore("mount", "web", where)
    assert (where / "file").read_text() == "before", "the order of mounting does not matter"
    host.nbdstore("umount", "web")
    host.nbdstore("umount", "copy")


def test_detaching_what_is_mounted_or_open_is_refused(host: Host) -> None:
    where = host.directory / "mnt"
    device = host.nbdstore("attach", "web", "--driver", "fuse").splitlines()[0]
    reader = host.children.start("sh", "-c", f"exec sleep 1000 <{device}", log="reader.log")
    assert f"open in sleep ({reader.pid})" in host.nbdstore("detach", "web", status=1)
    reader.kill()
    reader.wait()
    host.nbdstore("detach", "web")
    host.nbdstore("mount", "db", where)
    assert "mounted at" in host.nbdstore("detach", "db", status=1)
    with (where / "open").open("w") as file:
        assert "is in use" in host.nbdstore("umount", "db", status=1)
        assert is_mounted(where)
        file.write("still")
    host.nbdstore("umount", "db")
    assert not is_mounted(where)


def test_a_filesystem_that_cannot_grow_is_mounted_as_it_is(host: Host) -> None:
    """A container has no CAP_SYS_RESOURCE by itself, without which a mounted ext4 cannot grow."""
    where = host.directory / "mnt"
    host.nbdstore("mount", "db", where)
    (where / "file").write_text("content")
    host.nbdstore("umount", "db")
    host.pool.nbdstore("volume", "resize", "db", "192M")
    host.run_without("sys_resource", "mount", "db", where)
    assert (where / "file").read_text() == "content"
    assert "has 128 MiB of the 192 MiB of /dev/" in host.nbdstore("agent", "status")
    said = host.run_without("sys_resource", "doctor", "--fix", status=1)
    assert "it takes CAP_SYS_RESOURCE" in said
    host.nbdstore("umount", "db")

    # What lets it grow may come later, and need not be the agent.
    device = host.nbdstore("attach", "db", "--driver", "fuse").splitlines()[0]
    host.children.run("e2fsck", "-f", "-p", device, status=None)
    host.children.run("resize2fs", device)
    host.run_without("sys_resource", "mount", "db", where)
    assert host.status("db")["message"] == ""
    assert "all is well" in host.nbdstore("doctor")
    host.nbdstore("umount", "db")
    host.nbdstore("detach", "db")


def test_the_doctor_lets_what_is_mounted_grow_with_its_volume(host: Host) -> None:
    where = host.directory / "mnt"
    host.nbdstore("mount", "web", where, "--fs", "xfs", "--driver", "fuse")
    before = os.statvfs(where).f_blocks
    host.pool.nbdstore("volume", "resize", "web", "400M")
    assert "has grown, its device not yet" in host.nbdstore("doctor", status=1)
    assert "put right" in host.nbdstore("doctor", "--fix")
    assert os.statvfs(where).f_blocks > before
    assert "all is well" in host.nbdstore("doctor")
    host.nbdstore("umount", "web")


def test_a_new_filesystem_has_its_owner_though_it_could_not_be_mounted(host: Host) -> None:
    where = host.directory / "mnt"
    options = ("db", where, "--driver", "fuse", "--owner", "5:6", "--mode", "2770")
    refused = host.nbdstore("mount", *options, "--options", "nonsense", status=1)
    assert "mount" in refused
    assert host.status("db") is None
    host.nbdstore("mount", *options)
    found = where.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (5, 6, 0o2770)
    host.nbdstore("umount", "db")


def test_an_owner_that_cannot_be_set_is_told(host: Host) -> None:
    where = host.directory / "mnt"
    options = ("db", where, "--driver", "fuse")
    refused = host.run_without("chown", "mount", *options, "--owner", "5:6", status=1)
    assert "cannot be given 5:6 (chown: changing ownership" in refused
    assert not is_mounted(where)
    assert host.status("db") is None
    host.nbdstore("mount", *options)
    assert is_mounted(where)
    host.nbdstore("umount", "db")


def test_mistakes_are_explained(host: Host) -> None:
    where = host.directory / "mnt"
    if not Path("/sys/module/nbd").exists():
        lacking = host.nbdstore("mount", "db", where, "--driver", "kernel", status=1)
        assert "cannot attach with the kernel driver: its kernel has no nbd" in lacking
    assert "there is no volume 'nix'" in host.nbdstore("mount", "nix", where, status=1)
    host.nbdstore("snapshot", "create", "db@old")
    assert "mount a clone" in host.nbdstore("mount", "db@old", where, status=2)
    host.nbdstore("snapshot", "delete", "db@old")
    assert "attached here" in host.nbdstore("detach", "db", status=1)
    assert "no volume is mounted at" in host.nbdstore("umount", "/nowhere", status=1)
    assert "is no owner" in host.nbdstore("mount", "db", where, "--owner", "me", status=2)
    assert "root directory" in host.nbdstore("mount", "db", "/", status=2)
    host.nbdstore("mount", "db", where)
    assert "mounted on it" in host.nbdstore("mount", "web", where, status=1)
    assert host.status("web") is None, "what was attached for that mount alone is gone again"
    other_kind = host.nbdstore("mount", "db", host.directory / "x", "--fs", "xfs", status=2)
    assert "holds ext4, not xfs" in other_kind
    host.pool.stop()
    assert "no server answers" in host.nbdstore("mount", "web", host.directory / "w", status=1)
    host.pool.restart()
    host.nbdstore("umount", "db")
