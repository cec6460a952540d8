"""Run as a process of its own: mount or unmount a volume, and die at one moment of that.

``python -m tests.agent.killed STATE CONTROL_URL PATH {mount,umount} MOMENT`` ends itself by SIGKILL
before the N-th thing that can be seen from outside (a record that is written, a program that is
run, a change that is asked of the server), or before the first one of a name: "propagate". It
ends with 0 if it comes to its end before.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbdstore.agent import mounts, programs
from nbdstore.agent.local import LocalAgent, Setting, open_agent
from nbdstore.agent.records import Records
from nbdstore.agent.requests import MountRequest
from nbdstore.control.client import ControlClient

MOMENTS = (
    (Records, "save"),
    (Records, "remove"),
    (programs, "run"),
    (programs, "start_detached"),
    (mounts, "propagate"),
    (ControlClient, "acquire_lease"),
    (ControlClient, "release_lease"),
)


class Fuse:
    """Counts what happens and ends the process before one of it."""

    def __init__(self, moment: str) -> None:
        self.left = int(moment) if moment.isdigit() else -1
        self.name = moment

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 or function.__name__ == self.name:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return called


def setting(state: Path, control_url: str) -> Setting:
    return Setting(state=state, control_url=control_url, driver="fuse")


def mount(agent: LocalAgent, path: str) -> None:
    request = MountRequest(volume="db", path=path, owner="5:6", mode="2770", propagation="private")
    agent.mount(request)


def main() -> None:
    state, control_url, path, what, moment = sys.argv[1:]
    fuse = Fuse(moment)
    for owner, name in MOMENTS:
        setattr(owner, name, fuse.before(getattr(owner, name)))
    with open_agent(setting(Path(state), control_url)) as agent:
        if what == "mount":
            mount(agent, path)
        else:
            agent.umount("db")


if __name__ == "__main__":
    main()
