"""An agent in this process, put together from its parts: what an agent's process runs, and what a
command uses while no agent runs."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nbdstore.agent.agent import Agent
from nbdstore.agent.attaching import (
    DEFAULT_DEAD_TIMEOUT_S,
    DEFAULT_REQUEST_TIMEOUT_S,
    AgentOptions,
)
from nbdstore.agent.attachments import Attachments
from nbdstore.agent.doctor import Doctor, Finding
from nbdstore.agent.drivers import AUTO, Drivers
from nbdstore.agent.fuse_driver import FuseDriver
from nbdstore.agent.kernel_driver import KernelDriver
from nbdstore.agent.records import Records
from nbdstore.agent.requests import AttachmentStatus, AttachRequest, MountRequest
from nbdstore.agent.store_server import CONTROL_TIMEOUT_S, StoreServer
from nbdstore.control.client import ControlClient


class AgentService(Protocol):
    """What can be asked, whether an agent runs or this process acts for itself; see `Agent`."""

    def attach(self, request: AttachRequest) -> AttachmentStatus: ...
    def detach(self, volume: str, *, force: bool = False) -> None: ...
    def mount(self, request: MountRequest) -> AttachmentStatus: ...
    def umount(self, volume: str, path: str = "", *, force: bool = False) -> None: ...
    def find_by_path(self, path: str) -> str: ...
    def status(self) -> list[AttachmentStatus]: ...
    def examine(self, *, fix: bool = False) -> list[Finding]: ...


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where an agent keeps its state, and what it works with.

    control_url, token, token_file, tls_ca: of the server's control API; the relays of the fuse
    driver read the files themselves. nbd: an address, see `StoreServer`; "" asks the server.
    holder: "" is the machine's name and the agent's id.
    """

    state: Path
    control_url: str
    token: str | None = None
    token_file: Path | None = None
    tls_ca: Path | None = None
    nbd: str = ""
    holder: str = ""
    driver: str = AUTO
    request_timeout_s: int = DEFAULT_REQUEST_TIMEOUT_S
    dead_timeout_s: int = DEFAULT_DEAD_TIMEOUT_S


class LocalAgent(Agent):
    """An agent, and its doctor."""

    def examine(self, *, fix: bool = False) -> list[Finding]:
        """See `Doctor.examine`."""
        return Doctor(self).examine(fix=fix)


@contextlib.contextmanager
def open_agent(setting: Setting, *, patience_s: float = 0.0) -> Iterator[LocalAgent]:
    """Hold the state directory and act on it.

    Raises:
        Busy: another process holds it, and still does after `patience_s`.
    """
    records = Records.open(setting.state, patience_s=patience_s)
    try:
        attachments = Attachments(records)
        holder = setting.holder or f"{socket.gethostname()}/{records.agent_id}"
        options = AgentOptions(
            holder=holder,
            driver=setting.driver,
            request_timeout_s=setting.request_timeout_s,
            dead_timeout_s=setting.dead_timeout_s,
        )
        server = store_server(setting)
        agent = LocalAgent(attachments, server, _drivers(setting, records, server), options)
        for attachment in attachments.all():
            attachment.device = agent.attaching.find_device(attachment)
        yield agent
    finally:
        records.close()


def store_server(setting: Setting) -> StoreServer:
    """Return the server that is meant."""
    control = ControlClient(
        setting.control_url,
        token=setting.token,
        tls_ca=setting.tls_ca,
        timeout_s=CONTROL_TIMEOUT_S,
    )
    return StoreServer(control, setting.nbd or None)


def _drivers(setting: Setting, records: Records, server: StoreServer) -> Drivers:
    files = {"--token-file": setting.token_file, "--tls-ca": setting.tls_ca}
    given = [word for option, path in files.items() if path for word in (option, str(path))]
    relay = (sys.executable, "-m", "nbdstore", "--server", setting.control_url, *given)
    return Drivers(
        {
            "kernel": KernelDriver(records.agent_id),
            "fuse": FuseDriver(setting.state, (*relay, "agent", "relay"), server.end_connections),
        }
    )
