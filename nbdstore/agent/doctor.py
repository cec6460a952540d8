"""The doctor: what is not as it should be on this machine, why that matters, and what helps.

Looks at the records, the kernel's devices, the mounts and the server, and compares. With `fix` it
does what it knows to be safe; it never touches a device that is in use, or not this agent's.

    finding          with --fix
    absent           a record without a device: attached (and mounted) again
    unfinished       a detach that was interrupted: finished
    failed           a device that fails all requests: mounts let go, attached and mounted again
    disconnected     a device without a connection: reconnected
    fenced           the lease is lost: none; 'nbdstore detach --force' gives up
    read-only        the kernel made the filesystem read-only after errors: unmounted, checked,
                     mounted again
    size             the volume has grown: device and filesystem grow; it has shrunk: none
    filesystem       it is smaller than its device, and could not grow: tried once more
    orphan-device    a device of this agent without a record: detached, unless in use
    foreign-device   a device of another agent: none
    orphan-lease     a lease of this agent without a record: given back
    orphan-mount     a mount of one of its devices that nobody asked for: none
    server           the server does not answer: none
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

from nbdstore.agent.agent import Agent
from nbdstore.agent.attachments import Attachment
from nbdstore.agent.devices import BlockDevice
from nbdstore.agent.driver import Health
from nbdstore.agent.kernel_driver import KernelDriver
from nbdstore.agent.mounts import mounted_at
from nbdstore.agent.records import DETACHING
from nbdstore.control.model import LeaseInfo, VolumeInfo
from nbdstore.errors import DeviceError, NbdstoreError, NotFound
from nbdstore.sizes import exact_size

PATIENCE_S: Final = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as it should be.

    kind: a word of the module's table. subject: the volume or device. advice: what helps, if
    `fixable` is False. fixed: whether it was put right. outcome: how that went.
    """

    kind: str
    subject: str
    text: str
    advice: str = ""
    fixable: bool = False
    fixed: bool = False
    outcome: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Finding:
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: member for name, member in value.items() if name in known})


class Doctor:
    """Examines what an agent has attached."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._volumes: dict[str, VolumeInfo] | None = None
        self._leases: list[LeaseInfo] = []

    def examine(self, *, fix: bool = False) -> list[Finding]:
        """Return all findings; with `fix`, having tried to put right those that can be."""
        findings = list(self._findings())
        return [
            self._fixed(finding) if fix and finding.fixable else finding for finding in findings
        ]

    # --- Finding -----------------------------------------------------------------------------

    def _findings(self) -> Iterator[Finding]:
        yield from self._ask_server()
        for attachment in self._agent.attachments.all():
            attachment.device = self._agent.attaching.find_device(attachment)
            yield from self._attachment(attachment)
        yield from self._devices()
        yield from self._orphan_leases()

    def _ask_server(self) -> Iterator[Finding]:
        server = self._agent.server
        try:
            self._volumes = {info.name: info for info in server.volumes()}
            self._leases = server.leases()
        except NbdstoreError as error:
            yield Finding(
                kind="server",
                subject=server.control.url,
                text=f"the server does not answer: {error}",
                advice="requests wait until it does; start it, or see its log",
            )

    def _attachment(self, attachment: Attachment) -> Iterator[Finding]:
        record, device = attachment.record, attachment.device
        volume = record.volume
        if record.state == DETACHING:
            yield Finding(
                kind="unfinished",
                subject=volume,
                text=f"volume {volume} was being detached when the agent ended",
                fixable=True,
            )
        elif device is None:
            yield from self._absent(attachment)
        else:
            yield from self._health(attachment, device)
            yield from self._size(attachment, device)
            yield from self._filesystem(attachment)
            yield from self._mounts(attachment, device)

    def _absent(self, attachment: Attachment) -> Iterator[Finding]:
        record = attachment.record
        volume = record.volume
        if self._volumes is not None and volume not in self._volumes:
            yield Finding(
                kind="absent",
                subject=volume,
                text=f"volume {volume} is wanted here, but the server has none of that name",
                advice=f"'nbdstore detach {volume}' forgets it",
            )
            return
        stale = [mount.path for mount in record.mounts if self._is_stale(mount.path, record.device)]
        also = (
            f"; {', '.join(stale)} is still mounted from the device that is gone" if stale else ""
        )
        yield Finding(
            kind="failed" if stale else "absent",
            subject=volume,
            text=f"volume {volume} is wanted here, but there is no device of it{also}",
            fixable=True,
        )

    def _is_stale(self, path: str, device: str) -> bool:
        mount = mounted_at(path)
        return mount is not None and mount.source == f"/dev/{device}"

    def _health(self, attachment: Attachment, device: BlockDevice) -> Iterator[Finding]:
        volume = attachment.record.volume
        health = self._agent.attaching.health(attachment)
        held = [lease for lease in self._leases if lease.volume == volume]
        ours = [lease for lease in held if lease.holder == self._agent.options.holder]
        if self._volumes is not None and not ours:
            by = f"{held[0].holder} holds it" if held else "nobody holds it"
            yield Finding(
                kind="fenced",
                subject=volume,
                text=f"{device.path} belongs to a lease of {volume} that has ended: {by} now",
                advice=f"'nbdstore detach --force {volume}' gives up what is mounted here",
            )
        elif health is Health.DEAD or attachment.expired:
            yield Finding(
                kind="failed",
                subject=volume,
                text=f"{device.path} fails requests, or did: what kept them waiting has ended",
                fixable=True,
            )
        elif health is Health.WAITING:
            yield Finding(
                kind="disconnected",
                subject=volume,
                text=f"{device.path} has no connection: its requests wait for one",
                fixable=self._volumes is not None,
                advice=""
                if self._volumes is not None
                else "it is reconnected when the server is back",
            )

    def _size(self, attachment: Attachment, device: BlockDevice) -> Iterator[Finding]:
        info = (self._volumes or {}).get(attachment.record.volume)
        if info is None or info.size == device.size:
            return
        if info.size < device.size:
            text, advice = "has shrunk below its device", "give it its size again"
        else:
            text, advice = "has grown, its device not yet", ""
        yield Finding(
            kind="size",
            subject=info.name,
            text=f"volume {info.name} {text}: {exact_size(info.size)}, {device.path} has "
            f"{exact_size(device.size)}",
            advice=advice,
            fixable=not advice,
        )

    def _filesystem(self, attachment: Attachment) -> Iterator[Finding]:
        record = attachment.record
        if record.too_small:
            yield Finding(
                kind="filesystem",
                subject=record.volume,
                text=f"volume {record.volume}: {record.too_small}",
                fixable=True,
            )

    def _mounts(self, attachment: Attachment, device: BlockDevice) -> Iterator[Finding]:
        record = attachment.record
        wanted = {mount.path: mount for mount in record.mounts}
        for mount in self._agent.mounting.mounts_of(device):
            asked = wanted.pop(mount.path, None)
            if asked is None:
                yield Finding(
                    kind="orphan-mount",
                    subject=record.volume,
                    text=f"volume {record.volume} is mounted at {mount.path}, not by the agent",
                    advice=f"'nbdstore umount {record.volume}' unmounts it if it is not needed",
                )
            elif mount.read_only and not (asked.read_only or record.read_only):
                yield Finding(
                    kind="read-only",
                    subject=record.volume,
                    text=f"the kernel has made {mount.path} read-only, after errors",
                    fixable=True,
                )
        for path in wanted:
            yield Finding(
                kind="absent",
                subject=record.volume,
                text=f"volume {record.volume} is wanted at {path}, where it is not mounted",
                fixable=True,
            )

    def _devices(self) -> Iterator[Finding]:
        driver = self._agent.drivers["kernel"]
        assert isinstance(driver, KernelDriver)
        known = {attachment.record.id for attachment in self._agent.attachments.all()}
        ours, others = driver.orphans(known)
        for device in ours:
            yield Finding(
                kind="orphan-device",
                subject=device.name,
                text=f"{device.path} ({device.identifier}) is attached, and no record knows it",
                fixable=True,
            )
        for device in others:
            yield Finding(
                kind="foreign-device",
                subject=device.name,
                text=f"{device.path} ({device.identifier}) was attached by another agent",
                advice="that agent, with its own --state, can detach it",
            )

    def _orphan_leases(self) -> Iterator[Finding]:
        known = {attachment.record.volume for attachment in self._agent.attachments.all()}
        for lease in self._leases:
            if lease.holder == self._agent.options.holder and lease.volume not in known:
                yield Finding(
                    kind="orphan-lease",
                    subject=lease.volume,
                    text=f"this agent holds the lease of {lease.volume}, not attached here",
                    fixable=True,
                )

    # --- Putting right -----------------------------------------------------------------------

    def _fixed(self, finding: Finding) -> Finding:
        try:
            self._fix(finding)
        except NbdstoreError as error:
            return dataclasses.replace(finding, outcome=str(error))
        return dataclasses.replace(finding, fixed=True, outcome="put right")

    def _fix(self, finding: Finding) -> None:
        agent = self._agent
        if finding.kind == "orphan-device":
            driver = agent.drivers["kernel"]
            assert isinstance(driver, KernelDriver)
            driver.remove_orphan(BlockDevice(finding.subject))
        elif finding.kind == "orphan-lease":
            (lease,) = [item for item in self._leases if item.volume == finding.subject]
            agent.server.release(lease.volume, lease.holder, lease.epoch)
        elif finding.kind == "size":
            assert self._volumes
            size = self._volumes[finding.subject].size
            agent.grow(finding.subject, size)
            found = agent.attachments.find(finding.subject)
            if found.device is None or found.device.size < size:
                raise DeviceError(found.problem or "it waits for its server: try again then")
        elif finding.kind == "filesystem":
            agent.grow(finding.subject, 0)
            if left := agent.attachments.find(finding.subject).record.too_small:
                raise DeviceError(left)
        elif finding.kind in ("failed", "read-only"):
            agent.renew(finding.subject)
        else:
            attachment = agent.attachments.get(finding.subject)
            if attachment is None:
                raise NotFound(f"volume {finding.subject} is not attached any more")
            attachment.settled = False
            agent.tend(finding.subject, patience_s=PATIENCE_S)
