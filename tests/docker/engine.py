"""A Docker engine of the tests' own, with its command line and Compose.

It runs in a machine of namespaces (tests/docker/machine.py), so it neither sees nor touches an
engine that the real machine runs. What it holds - images, above all - lies in a cache directory and
is there for the next run; containers, volumes and networks of an earlier run are removed at the
start. One engine at a time: the cache has a lock.

Owns dockerd's life and the calls of its clients; which images there are: tests/docker/images.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.children import Argument, Children, CommandError
from tests.docker.machine import Machine

START_TIMEOUT_S = 60.0
# Images without a name are steps of builds, kept so that the next build is fast.
IMAGE_LIFE = "48h"
DOCKERD_OPTIONS = (
    # Containers are killed when the engine stops, and the tests have nothing to gain from waiting.
    *("--shutdown-timeout", "5"),
    *("--exec-root", "/run/docker", "--pidfile", "/run/docker/docker.pid"),
    *("--log-level", "warn"),
)


def cache_directory() -> Path:
    """Name the directory that outlives a run of the tests; see the XDG base directory rules."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nbdstore-tests" / "docker"


@contextmanager
def running_engine(directory: Path) -> Iterator[Engine]:
    """Run an engine as long as the context lasts; wait for one that another process runs.

    Arguments:
        directory: for logs.
    """
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with (
        (cache / "lock").open("w") as lock,
        # A unix socket's path is short, and pytest's directories are not.
        tempfile.TemporaryDirectory(prefix="nbdstore-docker-") as short,
        Children(directory) as children,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Volumes of a plugin that a killed run has left: the engine would look for that plugin.
        (cache / "data/volumes/metadata.db").unlink(missing_ok=True)
        engine = Engine(children, cache / "data", Path(short) / "docker.sock")
        engine.start()
        try:
            # What the last run has left. This one's is not removed at its end: if it had a volume
            # plugin, which has ended now, the engine would look for that for a quarter of a minute.
            engine.remove_all()
            engine.docker("image", "prune", "--force", "--filter", f"until={IMAGE_LIFE}")
            yield engine
        finally:
            engine.stop()


class Engine:
    """A Docker engine and its clients.

    Arguments:
        children: what the engine and its machine are started, logged and killed with.
        data: the engine's data directory, of which it is the only user.
        socket: where it listens.
    """

    def __init__(self, children: Children, data: Path, socket: Path) -> None:
        self.children = children
        self.machine = Machine(children)
        self.data = data
        self.socket = socket
        self.url = f"unix://{socket}"

    def start(self, *options: str) -> None:
        """Start dockerd and wait until it answers."""
        # Not the configuration of the real machine's.
        configuration = self.data.with_name("daemon.json")
        configuration.write_text("{}")
        self.dockerd = self.machine.start(
            *("dockerd", "--data-root", str(self.data), "--host", self.url),
            *("--config-file", str(configuration), *DOCKERD_OPTIONS, *options),
            log="dockerd.log",
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self.dockerd.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("dockerd does not answer: see dockerd.log")
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            self.docker("version", timeout_s=5)
        except (CommandError, subprocess.TimeoutExpired):
            return False
        return True

    def stop(self) -> None:
        """Stop dockerd; it stops its containers."""
        self.machine.kill(self.dockerd, signal.SIGTERM)

    def kill(self) -> None:
        """Kill dockerd; its containers go on."""
        self.machine.kill(self.dockerd, signal.SIGKILL)

    def docker(
        self, *argv: Argument, timeout_s: float = 60, status: int | None = 0, stdin: str = ""
    ) -> str:
        """Run docker's command line; see `Children.run`."""
        __tracebackhide__ = True
        env = {
            "DOCKER_HOST": self.url,
            "DOCKER_BUILDKIT": "0",
            "DOCKER_CONFIG": str(self.socket.parent),
        }
        words = ("docker", *argv)
        return self.children.run(*words, timeout_s=timeout_s, status=status, env=env, stdin=stdin)

    def compose(
        self,
        file: Path,
        *argv: Argument,
        timeout_s: float = 120,
        status: int | None = 0,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Run docker-compose with a file; see `Children.run`."""
        __tracebackhide__ = True
        words = ("docker-compose", "--file", file, *argv)
        environment = {"DOCKER_HOST": self.url, **(env or {})}
        return self.children.run(*words, timeout_s=timeout_s, status=status, env=environment)

    def inspect(self, name: str, kind: str = "container") -> dict[str, Any]:
        """Return what the engine knows of a container, image, volume or network."""
        (found,) = json.loads(self.docker("inspect", "--type", kind, name))
        return dict(found)

    def wait_health(self, name: str, status: str = "healthy", timeout_s: float = 60) -> None:
        """Wait until the health check of a container says `status`."""
        deadline = time.monotonic() + timeout_s
        while (state := self.inspect(name)["State"])["Health"]["Status"] != status:
            if time.monotonic() > deadline or not state["Running"]:
                raise AssertionError(
                    f"{name} is not {status}: {state}\n{self.docker('logs', name)}"
                )
            time.sleep(0.1)

    def remove_all(self) -> None:
        """Remove all containers, volumes and networks; images stay."""
        for list_command, remove_command in (
            (("ps", "--all", "--quiet"), ("rm", "--force", "--volumes")),
            (("volume", "ls", "--quiet"), ("volume", "rm", "--force")),
            (("network", "ls", "--quiet", "--filter=type=custom"), ("network", "rm")),
        ):
            if names := self.docker(*list_command).split():
                self.docker(*remove_command, *names)
