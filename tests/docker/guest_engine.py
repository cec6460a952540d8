"""A Docker engine in a guest, whose kernel has what containers attach volumes with.

It has the images of an engine on this machine, and not by copies: the layers are read where they
lie, through the guest's root, which is this machine's. Only the engine's list of them is copied.
Containers are made from what the engine here says of containers, as Compose made them: they have
the very options of the Compose file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

from tests.docker.engine import Engine
from tests.guest.guest import Guest

DATA: Final = "/run/docker-data"
WAIT: Final = "/run/guest/busybox usleep 100000"


class GuestEngine:
    """The engine.

    Arguments:
        engine: whose images it has; it must not change as long as this one runs.
        directory: for the copy of the list.
    """

    def __init__(self, guest: Guest, engine: Engine, directory: Path) -> None:
        self.guest = guest
        self.directory = directory
        _copy_list_of_images(engine.data, directory / "data")
        (directory / "daemon.json").write_text("{}")  # not the configuration of this machine's
        guest.run(
            f"mount --make-rshared /; mount -t cgroup2 cgroup2 /sys/fs/cgroup; mkdir {DATA}\n"
            f"mount -t tmpfs tmpfs {DATA}; cp -a {directory}/data/. {DATA}\n"
            # Without packet filters, of which the guest has none: ports are relayed by a process.
            f"dockerd --data-root {DATA} --storage-driver overlay2 --iptables=false "
            f"--config-file {directory}/daemon.json --log-level warn >/dev/console 2>&1 & "
            f"until docker version >/dev/null 2>&1; do kill -0 $!; {WAIT}; done"
        )

    def docker(self, *words: str, status: int | None = 0) -> str:
        """Run docker's command line."""
        __tracebackhide__ = True
        return self.guest.run(f"docker {' '.join(words)}", status=status)

    def create(self, name: str, like: dict[str, Any]) -> None:
        """Create a container that has all options of one of another engine, but health checks.

        Arguments:
            like: what `docker inspect` says of that one.
        """
        wanted = {
            **like["Config"],
            # A check that starts an interpreter takes seconds here, every two seconds.
            "Healthcheck": {"Test": ["NONE"]},
            "HostConfig": like["HostConfig"],
            "NetworkingConfig": {"EndpointsConfig": _networks(like)},
        }
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(wanted))
        answer = self.guest.run(
            f"curl --silent --unix-socket /run/docker.sock --data @{path} "
            f"--header 'Content-Type: application/json' 'http://engine/containers/create?name={name}'"
        )
        assert "Id" in json.loads(answer), answer


def _networks(like: dict[str, Any]) -> dict[str, Any]:
    networks = like["NetworkSettings"]["Networks"]
    return {name: {"Aliases": network["Aliases"]} for name, network in networks.items()}


def _copy_list_of_images(data: Path, copy: Path) -> None:
    """Copy from an engine's data directory what says which images there are; layers by links."""
    shutil.copytree(data / "image", copy / "image")
    (copy / "overlay2" / "l").mkdir(parents=True)
    for link in (data / "overlay2" / "l").iterdir():
        (copy / "overlay2" / "l" / link.name).symlink_to(link.readlink())
    for layer in (data / "overlay2").iterdir():
        if layer.name == "l" or not (layer / "link").exists():
            continue
        target = copy / "overlay2" / layer.name
        target.mkdir()
        (target / "diff").symlink_to(layer / "diff")
        for name in ("link", "lower", "committed"):
            if (layer / name).exists():
                shutil.copy(layer / name, target / name)
