"""Servers, agents and relays that are killed under load; machines that lose their leases."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdstore.agent import filesystems, mounts
from nbdstore.agent.agent import Agent
from nbdstore.agent.attachments import Attachment
from nbdstore.agent.driver import Health
from nbdstore.agent.local import open_agent
from nbdstore.agent.requests import AttachRequest, MountRequest
from nbdstore.errors import Busy
from tests.agent import killed
from tests.agent.host import Host
from tests.clients.served_pool import ServedPool

pytestmark = [
    pytest.mark.requires("root", "/dev/fuse", "/dev/loop-control", "nbdfuse", "fusermount3"),
    pytest.mark.requires("losetup", "mount", "mkfs.ext4", "mkfs.xfs", "setsid", "fio"),
    pytest.mark.requires("debugfs"),
    pytest.mark.timeout(300),
]

PATIENCE_S = 90.0


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds; fail if it does not come to hold."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"in vain: {what}"
        time.sleep(0.05)


def mount(host: Host, volume: str, name: str = "mnt", **options: object) -> Path:
    where = host.directory / name
    request = MountRequest(volume=volume, path=str(where), by="test", **options)  # type: ignore[arg-type]
    host.client.mount(request)
    return where


def state(host: Host, volume: str) -> str:
    (status,) = [item for item in host.client.status() if item.volume == volume]
    return status.state


def is_mounted(path: Path) -> bool:
    return mounts.mounted_at(str(path)) is not None


def test_io_waits_for_a_server_that_was_killed_and_needs_no_agent(
    host: Host, pool: ServedPool
) -> None:
    host.start()
    where = mount(host, "web", filesystem="xfs")
    fio = host.children.start(
        *("fio", "--name=load", f"--filename={where}/file", "--size=24M", "--rw=randwrite"),
        *("--bs=4k", "--ioengine=psync", "--fsync=16", "--verify=crc32c", "--verify_fatal=1"),
        *("--rate_iops=1500", "--error_dump=1", "--verify_state_save=0"),
        log="fio.log",
    )
    for _ in range(2):
        target = pool_written(pool) + (1 << 20)
        until(functools.partial(has_written, pool, target), "fio has got on")
        pool.kill()
        host.kill()
        assert fio.poll() is None, "it waits, and has not failed"
        pool.restart()
        host.start()
    assert fio.wait(PATIENCE_S) == 0
    until(lambda: state(host, "web") == "attached", "the agent sees that all is well")
    assert host.client.examine() == []
    (found,) = [item for item in mounts.mounts() if item.path == str(where)]
    assert not found.read_only
    host.client.umount("web")
    assert host.client.status() == []
    host.stop()


def has_written(pool: ServedPool, n_bytes: int) -> bool:
    return pool_written(pool) > n_bytes


def pool_written(pool: ServedPool) -> int:
    connections = json.loads(pool.nbdstore("volume", "show", "web", "--json"))["attachments"]
    return sum(item["bytes_written"] for item in connections)


def test_a_stop_detaches_and_the_next_start_brings_it_back(host: Host, pool: ServedPool) -> None:
    spec = f"volume=new,path={host.directory}/new,size=64M,owner=5:6"
    host.start("--mount", spec)
    new, db = host.directory / "new", mount(host, "db")
    until(lambda: is_mounted(new), "what it was started for is mounted")
    assert owner(new) == (5, 6)
    (db / "file").write_text("content")
    with (new / "open").open("w"):
        host.stop()
        assert is_mounted(new), "what is in use stays"
        assert not is_mounted(db)
        assert [item["volume"] for item in leases(pool)] == ["new"]
    host.start()
    until(lambda: is_mounted(db), "the wish is fulfilled")
    assert (db / "file").read_text() == "content"
    host.stop()
    assert not is_mounted(new)
    assert not is_mounted(db)
    assert leases(pool) == []


def is_private(path: Path) -> bool:
    found = mounts.mounted_at(str(path))
    return found is not None and not found.shared


def test_a_restarted_agent_mounts_as_it_was_asked_to(host: Host) -> None:
    host.start()
    where = mount(host, "db", options="noatime", fsck="never", propagation="private")
    host.stop()
    # Without an agent: what a check would put right, and mounting does not.
    device = host.nbdstore("attach", "db").splitlines()[0]
    host.children.run("debugfs", "-w", "-R", "ssv state 2", device)
    host.start()
    # A moment after it is mounted.
    until(lambda: is_private(where), "the wish is fulfilled")
    assert f" {where} ext4 rw,noatime" in Path("/proc/mounts").read_text()
    host.client.umount("db")
    superblock = filesystems.read_superblock(device)
    assert superblock and not superblock.clean, "it was not to be checked"
    host.client.detach("db")
    host.stop()


def test_a_restarted_agent_tells_of_the_snapshot_before_its_repair(host: Host) -> None:
    host.start()
    where = mount(host, "db", fsck="repair")
    host.stop()
    device = host.nbdstore("attach", "db").splitlines()[0]
    for change in ("clri <2>", "ssv state 2"):
        host.children.run("debugfs", "-w", "-R", change, device)
    host.start()
    until(lambda: is_mounted(where), "it is repaired, and mounted")
    # When the agent is done with it.
    told = host.client.attach(AttachRequest(volume="db")).message
    assert "the snapshot db@before-fsck-" in told
    host.client.umount("db")
    host.client.detach("db")
    host.stop()


def test_another_volume_of_that_name_is_not_attached(host: Host, pool: ServedPool) -> None:
    host.start()
    where = mount(host, "db")
    host.stop()
    pool.nbdstore("volume", "delete", "db", "--now")
    pool.create_volume("db", "128M")
    host.start()
    until(lambda: "is another one now" in host.client.status()[0].message, "it is told")
    assert not is_mounted(where)
    host.client.detach("db", force=True)
    assert host.client.status() == []
    host.stop()


def owner(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


def leases(pool: ServedPool) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(pool.nbdstore("lease", "list", "--json"))
    return found


def test_an_agent_starts_before_its_server(host: Host, pool: ServedPool) -> None:
    pool.stop()
    host.start("--mount", f"volume=db,path={host.directory}/mnt")
    until(lambda: "no server answers" in host.client.status()[0].message, "it says what it lacks")
    assert "not all is attached" in host.nbdstore("agent", "status", "--check", status=1)
    pool.restart()
    until(lambda: is_mounted(host.directory / "mnt"), "it is mounted as soon as that can be done")
    until(lambda: not host.client.status()[0].message, "the agent has seen it")
    host.nbdstore("agent", "status", "--check")
    host.client.umount("db")
    host.stop()


def test_what_is_attached_but_not_mounted_as_wanted_is_not_healthy(host: Host) -> None:
    host.start()
    where = mount(host, "web")
    host.nbdstore("agent", "status", "--check")
    host.children.run("umount", where)
    assert state(host, "web") == "absent"
    assert "not all is attached" in host.nbdstore("agent", "status", "--check", status=1)
    mount(host, "web")
    host.nbdstore("agent", "status", "--check")

    device = host.client.attach(AttachRequest(volume="db")).path
    with Path(device).open("r+b") as file:
        file.write(b"neither ext4 nor xfs")
    host.kill()
    host.start("--mount", f"volume=db,path={host.directory}/db")
    until(
        lambda: any("was written before" in item.message for item in host.client.status()),
        "it says why it does not mount it",
    )
    assert [item.state for item in host.client.status() if item.volume == "db"] == [
        "attached",
        "absent",
    ]
    assert "not all is attached" in host.nbdstore("agent", "status", "--check", status=1)
    host.stop()


def test_a_volume_has_one_host_and_force_fences_the_other(
    host: Host, other_host: Host, pool: ServedPool
) -> None:
    host.start()
    other_host.start()
    where = mount(host, "db")
    (where / "file").write_text("before")
    fd = os.open(where / "file", os.O_WRONLY)
    os.fsync(fd)
    with pytest.raises(Busy, match="leased to"):
        mount(other_host, "db")
    there = mount(other_host, "db", force=True)
    assert (there / "file").read_text() == "before"
    until(lambda: state(host, "db") == "fenced", "the one that lost it knows")
    assert "doctor" not in str(host.client.status()[0].message)
    assert [finding.kind for finding in host.client.examine(fix=True)] == ["fenced"]
    (there / "file").write_text("after")
    host.client.detach("db", force=True)
    assert not is_mounted(where)
    with pytest.raises(OSError):
        os.pwrite(fd, b"late", 0)
        os.fsync(fd)
    os.close(fd)
    assert (there / "file").read_text() == "after"
    other_host.client.umount("db")
    where = mount(host, "db")
    assert (where / "file").read_text() == "after"
    host.client.umount("db")
    host.stop()
    other_host.stop()


def test_what_would_wait_for_a_server_is_refused_and_force_ends_it(
    host: Host, pool: ServedPool
) -> None:
    host.start()
    where = mount(host, "db")
    pool.kill()
    until(lambda: state(host, "db") == "waiting", "the agent knows")
    with pytest.raises(Busy, match="waits for its server"):
        host.client.umount("db")
    with pytest.raises(Busy, match="is mounted at"):
        host.client.detach("db")
    assert is_mounted(where)
    host.client.detach("db", force=True)
    assert not is_mounted(where)
    assert state(host, "db") == "detaching", "the lease is still to be given back"
    pool.restart()
    until(lambda: host.client.status() == [], "it is")
    assert leases(pool) == []
    host.stop()


def is_waiting(agent: Agent, attachment: Attachment) -> bool:
    return agent.attaching.health(attachment) is Health.WAITING


def test_nothing_grows_while_its_device_waits(
    host: Host, pool: ServedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = killed.setting(host.state, f"unix:{pool.directory}/control.sock")
    with open_agent(setting) as agent:
        killed.mount(agent, str(host.directory / "mnt"))
        attachment = agent.attachments.find("db")
        grown: list[object] = []
        monkeypatch.setattr(agent.mounting, "grow", lambda *_: grown.append(1))
        pool.kill()
        waits = functools.partial(is_waiting, agent, attachment)
        until(waits, "the relay knows")
        agent.grow("db", attachment.record.size)
        assert not grown
        pool.restart()
        until(lambda: not waits(), "it goes on")
        agent.grow("db", attachment.record.size)
        assert grown
        agent.umount("db")


def test_a_volume_grows_while_it_is_mounted_and_written(host: Host, pool: ServedPool) -> None:
    host.start()
    where = mount(host, "web", filesystem="xfs")
    before = os.statvfs(where).f_blocks
    fio = host.children.start(
        *("fio", "--name=load", f"--filename={where}/file", "--size=24M", "--rw=randwrite"),
        *("--bs=4k", "--ioengine=psync", "--fsync=16", "--verify=crc32c", "--verify_fatal=1"),
        *("--rate_iops=2000", "--error_dump=1", "--verify_state_save=0"),
        log="fio.log",
    )
    until(lambda: has_written(pool, 1 << 20), "fio has got on")
    pool.nbdstore("volume", "resize", "web", "400M")
    until(lambda: os.statvfs(where).f_blocks > before, "the filesystem has grown")
    assert fio.wait(PATIENCE_S) == 0
    assert (host.client.status()[0].size, host.client.examine()) == (400 << 20, [])
    host.client.umount("web")
    device = host.client.attach(AttachRequest(volume="web")).path
    host.children.run("xfs_repair", "-n", device)
    host.client.detach("web")
    host.stop()


def test_the_doctor_explains_and_puts_right(host: Host, pool: ServedPool) -> None:
    host.start()
    assert host.client.examine() == []
    where = mount(host, "db")
    (where / "file").write_text("content")
    os.sync()
    os.kill(host.relay_pid("db"), signal.SIGKILL)
    until(lambda: state(host, "db") == "failed", "its device fails all requests")
    (finding,) = host.client.examine()
    assert (finding.kind, finding.fixable, finding.fixed) == ("failed", True, False)
    (finding,) = host.client.examine(fix=True)
    assert (finding.kind, finding.fixed) == ("failed", True), finding.outcome
    assert (where / "file").read_text() == "content"
    assert host.client.examine() == []

    host.client.umount("db")

    # A record and its device are lost, the lease is not.
    host.client.attach(AttachRequest(volume="web"))
    host.kill()
    path = host.record_path("web")
    kept = path.read_text()
    path.unlink()
    host.start()
    assert [finding.kind for finding in host.client.examine()] == ["orphan-lease"]
    host.kill()
    path.write_text(kept)
    host.start()
    until(lambda: state(host, "web") == "attached", "it is adopted")
    host.client.detach("web")
    assert "all is well" in host.nbdstore("doctor")
    host.stop()


def test_what_is_recorded_is_attached_and_mounted_again_after_a_power_cut(
    host: Host, pool: ServedPool
) -> None:
    """Everything of the machine is gone but its disk, where the records are."""
    host.start()
    where = mount(host, "db")
    (where / "file").write_text("content")
    os.sync()
    host.kill()
    relay = host.relay_pid("db")
    host.children.run("umount", "--lazy", where)
    os.kill(relay, signal.SIGKILL)
    host.close()
    assert not is_mounted(where)
    host.start()
    until(lambda: is_mounted(where), "it is back")
    assert (where / "file").read_text() == "content"
    host.client.umount("db")
    host.stop()
