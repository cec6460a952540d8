"""A machine with an agent, on this one: all that it made is gone when the test ends.

Several of them on one machine are as several machines to the server, which knows them by their
leases.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from nbdstore.agent import devices, mounts, relay
from nbdstore.agent.api import AgentClient
from tests.children import Children
from tests.clients.served_pool import NBDSTORE, ServedPool
from tests.closing import Closing
from tests.readiness import ReadinessSocket

STOP_TIMEOUT_S = 60.0


class Host(Closing):
    """A machine that attaches volumes of `pool` with the fuse driver."""

    def __init__(self, children: Children, pool: ServedPool, directory: Path) -> None:
        self.children = children
        self.pool = pool
        self.directory = directory
        self.directory.mkdir()
        # Shared, as on hosts with systemd: a container that is started meanwhile has copies of all
        # mounts, and would hold ours if it were not told that they are gone.
        children.run("mount", "--bind", directory, directory)
        children.run("mount", "--make-shared", directory)
        self.state = directory / "state"
        self.socket = directory / "agent.sock"
        self.log = children.log_file(f"{directory.name}.log")
        self.process: subprocess.Popen[bytes] | None = None
        self.client = AgentClient(self.socket)
        self.scripts = NBDSTORE.parent
        self.env = {
            "NBDSTORE_SERVER": f"unix:{pool.directory}/control.sock",
            "NBDSTORE_AGENT_STATE": str(self.state),
            "NBDSTORE_AGENT_SOCKET": str(self.socket),
            "NBDSTORE_POOL": "/nowhere",
        }

    def nbdstore(self, *arguments: str | Path, status: int = 0) -> str:
        """Run a command there; return what it wrote."""
        __tracebackhide__ = True
        return self.children.run(NBDSTORE, *arguments, env=self.env, status=status)

    def run_without(self, capability: str, *arguments: str | Path, status: int = 0) -> str:
        """Run a command there that lacks a capability, such as "sys_resource"."""
        __tracebackhide__ = True
        prefix = ("setpriv", "--bounding-set", f"-{capability}")
        return self.children.run(*prefix, NBDSTORE, *arguments, env=self.env, status=status)

    def start(self, *options: str) -> None:
        """Start an agent there and return when it answers."""
        with ReadinessSocket(self.directory / "notify.sock") as readiness:
            self.process = self.children.start(
                *(str(NBDSTORE), "agent", "--driver", "fuse", *options),
                log=self.log.name,
                env={**self.env, **readiness.env},
            )
            readiness.wait(self.process)

    def kill(self) -> None:
        """End the agent as a crash does."""
        assert self.process
        process, self.process = self.process, None
        process.kill()
        process.wait(STOP_TIMEOUT_S)

    def stop(self) -> None:
        """Ask the agent to stop; it must end with status 0."""
        assert self.process
        process, self.process = self.process, None
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT_S) == 0

    def status(self, volume: str) -> Any:
        """Return what the agent says of one volume; None if it has none of that name."""
        found = json.loads(self.nbdstore("agent", "status", "--json").partition("\nnbdstore:")[0])
        return next((item for item in found if item["volume"] == volume), None)

    def record_path(self, volume: str) -> Path:
        """Find the record of a volume."""
        paths = (self.state / "attachments").glob("*.json")
        (path,) = [path for path in paths if json.loads(path.read_text())["volume"] == volume]
        return path

    def relay_pid(self, volume: str) -> int:
        """Return the process id of the relay of a volume."""
        state = relay.read_state(self.state / "fuse" / f"{self.record_path(volume).stem}.relay")
        assert state
        return state[0]

    def close(self) -> None:
        """Leave nothing behind, whatever state it is in."""
        if self.process:
            self.kill()
        ours = [mount for mount in mounts.mounts() if self._is_ours(mount)]
        for mount in ours:
            if mount.type != "fuse":
                self.children.run("umount", "--lazy", mount.path, status=None)
        # Before the files behind them are unmounted, and have no names any more.
        for device in devices.loop_devices():
            if (device.backing_file or "").startswith(str(self.directory)):
                self.children.run("losetup", "--detach", device.path, status=None)
        for mount in ours:
            if mount.type == "fuse":
                self.children.run("umount", "--lazy", mount.path, status=None)
        for path in self.state.glob("fuse/*.relay"):
            if (state := relay.read_state(path)) is not None:
                os.kill(state[0], signal.SIGKILL)
        if mounts.mounted_at(str(self.directory)) is not None:
            self.children.run("umount", "--lazy", self.directory)

    def _is_ours(self, mount: mounts.Mount) -> bool:
        return mount.path.startswith(f"{self.directory}/")
