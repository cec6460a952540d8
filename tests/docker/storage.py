"""What a Docker engine's volumes need beside it: a server, an agent and the plugin, in its machine.

Owns their lives; each can be killed and started again by itself.
"""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any, Self

from tests.clients.served_pool import NBDSTORE
from tests.closing import Closing
from tests.docker.engine import Engine
from tests.readiness import ReadinessSocket

PLUGIN_SOCKET = "/run/docker/plugins/nbdstore.sock"


class Storage(Closing):
    """A pool, its server, an agent with the fuse driver, and the plugin, all running.

    Arguments:
        engine: whose machine they run in.
        directory: for the pool and their state.
    """

    def __init__(self, engine: Engine, directory: Path, *, capacity: str = "512M") -> None:
        self.engine = engine
        self.directory = directory
        self.pool = directory / "pool"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.env = {
            "NBDSTORE_POOL": str(self.pool),
            "NBDSTORE_SERVER": f"unix:{self.pool}/control.sock",
            "NBDSTORE_AGENT_STATE": str(directory / "agent"),
            "NBDSTORE_AGENT_SOCKET": str(directory / "agent.sock"),
        }
        local = {**self.env, "NBDSTORE_SERVER": ""}
        engine.children.run(NBDSTORE, "pool", "create", "--capacity", capacity, env=local)

    def start(self, *names: str) -> None:
        """Start "server", "agent" and "plugin", or those that are named, and wait for each."""
        commands = {
            "server": ("serve", "--listen", "127.0.0.1:10809", "--full-timeout", "0"),
            "agent": ("agent", "--driver", "fuse"),
            "plugin": ("docker-plugin", "--state", str(self.directory / "plugin")),
        }
        for name in names or commands:
            env = {**self.env, "NBDSTORE_SERVER": ""} if name == "server" else self.env
            with ReadinessSocket(self.directory / "notify.sock") as readiness:
                self.processes[name] = self.engine.machine.start(
                    str(NBDSTORE), *commands[name], log=f"{name}.log", env={**env, **readiness.env}
                )
                readiness.wait(self.processes[name])

    def end(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop or kill one of them; return with which status it ended."""
        return self.engine.machine.kill(self.processes.pop(name), number)

    def kill(self, name: str) -> None:
        """End one as a crash does."""
        self.end(name, signal.SIGKILL)

    def nbdstore(self, *words: str, status: int = 0) -> str:
        """Run a command in the machine; see `Children.run`."""
        __tracebackhide__ = True
        return self.engine.machine.run(NBDSTORE, *words, env=self.env, status=status)

    def volume(self, name: str) -> dict[str, Any]:
        """Return what the store knows of a volume."""
        return dict(json.loads(self.nbdstore("volume", "show", name, "--json")))

    def close(self) -> None:
        """Unmount all, and end all."""
        self.engine.remove_all()
        for name in ("plugin", "agent", "server"):
            if name in self.processes:
                self.end(name)

    def __enter__(self) -> Self:
        self.start()
        return super().__enter__()
