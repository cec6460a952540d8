"""An agent that is killed at every single moment of mounting and unmounting a volume.

Whoever comes after it must be able to go on: to bring about what was wanted, and then to take all
of it away again, with nothing left of the device, the lease, the records.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from nbdstore.agent import devices, mounts
from nbdstore.agent.local import LocalAgent, open_agent
from tests.agent import killed
from tests.agent.host import Host

pytestmark = [
    pytest.mark.requires("root", "/dev/fuse", "/dev/loop-control", "nbdfuse", "fusermount3"),
    pytest.mark.requires("losetup", "mount", "mkfs.ext4", "setsid"),
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).parents[2]
MAX_MOMENTS = 60


class Killed:
    """A host whose agents die; `url` is the server's."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.url = f"unix:{host.pool.directory}/control.sock"
        self.path = host.directory / "mnt"

    def die(self, what: str, moment: int | str) -> bool:
        """Run an agent that dies at a moment; False if it has come to its end before."""
        status = self.host.children.start(
            *(sys.executable, "-m", "tests.agent.killed", str(self.host.state), self.url),
            *(str(self.path), what, str(moment)),
            log="killed.log",
            env={"PYTHONPATH": str(ROOT)},
        ).wait(120)
        assert status in (0, -signal.SIGKILL)
        return status != 0

    def require_as_wanted(self) -> None:
        """Require what `killed.mount` asks for."""
        found = self.path.stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (5, 6, 0o2770)
        mount = mounts.mounted_at(str(self.path))
        assert mount is not None and not mount.shared

    def tend(self, agent: LocalAgent) -> None:
        for attachment in agent.attachments.all():
            agent.tend(attachment.record.volume)

    def require_nothing_left(self, agent: LocalAgent) -> None:
        assert agent.status() == []
        assert agent.examine() == []
        assert agent.server.leases() == []
        assert not [mount for mount in mounts.mounts() if self.is_here(mount.path)]
        assert not [item for item in devices.loop_devices() if self.is_here(item.backing_file)]
        assert list((self.host.state / "attachments").iterdir()) == []

    def is_here(self, path: str | None) -> bool:
        return (path or "").startswith(f"{self.host.directory}/")


@pytest.fixture
def machine(host: Host) -> Killed:
    return Killed(host)


def test_an_agent_is_killed_at_every_moment_of_a_mount(machine: Killed) -> None:
    for moment in range(1, MAX_MOMENTS):
        died = machine.die("mount", moment)
        with open_agent(killed.setting(machine.host.state, machine.url)) as agent:
            if moment % 2:
                machine.tend(agent)
            killed.mount(agent, str(machine.path))
            machine.require_as_wanted()
            (machine.path / "file").write_text("content")
            agent.umount("db")
            machine.require_nothing_left(agent)
            agent.server.control.delete_volume("db")
            agent.server.control.create_volume("db", 64 << 20)
        if not died:
            assert moment > 10
            return
    raise AssertionError("it never came to its end")


def test_what_follows_a_mount_is_done_once_by_whoever_comes(machine: Killed) -> None:
    assert machine.die("mount", "propagate")
    setting = killed.setting(machine.host.state, machine.url)
    with open_agent(setting) as agent:
        machine.tend(agent)
        machine.require_as_wanted()
    os.chown(machine.path, 7, 8)
    machine.host.children.run("mount", "--make-shared", machine.path)
    with open_agent(setting) as agent:
        machine.tend(agent)
        found = mounts.mounted_at(str(machine.path))
        assert machine.path.stat().st_uid == 7, "the owner is given once"
        assert found is not None and found.shared, "so is how the mount is propagated"
        agent.umount("db")
        machine.require_nothing_left(agent)


def test_an_agent_is_killed_at_every_moment_of_an_unmount(machine: Killed) -> None:
    with open_agent(killed.setting(machine.host.state, machine.url)) as agent:
        killed.mount(agent, str(machine.path))
        (machine.path / "file").write_text("content")
    for moment in range(1, MAX_MOMENTS):
        died = machine.die("umount", moment)
        with open_agent(killed.setting(machine.host.state, machine.url)) as agent:
            if moment % 2:
                machine.tend(agent)
            if agent.status():
                agent.umount("db")
            machine.require_nothing_left(agent)
            killed.mount(agent, str(machine.path))
            assert (machine.path / "file").read_text() == "content"
        if not died:
            assert moment > 5
            with open_agent(killed.setting(machine.host.state, machine.url)) as agent:
                agent.umount("db")
            return
    raise AssertionError("it never came to its end")
