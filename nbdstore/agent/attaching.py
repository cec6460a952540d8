"""From a volume to a device, and back: the lease, the device, its connections.

Owns the steps, by which a kill at any moment leaves what `Agent.tend` brings to its end::

    attach      record -> lease -> record (the export's name) -> device -> record (its connections)
    reconnect   the lease is still ours -> old connections end in the server -> a new one
    detach      record ("detaching") -> device gone -> lease given back -> no record

Each is done by whoever has the volume's turn. A device whose lease was lost is never given a new
connection: what is mounted from it is not what the volume holds any more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from nbdstore.agent import tls
from nbdstore.agent.attachments import Attachment, Attachments
from nbdstore.agent.devices import CLAIM_PATIENCE_S, CLAIM_RETRY_S, BlockDevice
from nbdstore.agent.driver import Health
from nbdstore.agent.drivers import Drivers
from nbdstore.agent.mounting import Mounting
from nbdstore.agent.mounts import mounted_at
from nbdstore.agent.programs import ProgramTimeout
from nbdstore.agent.records import ATTACHED, DETACHING, AttachRecord, new_id
from nbdstore.agent.requests import AttachRequest
from nbdstore.agent.store_server import ServerAway, StoreServer
from nbdstore.control.model import VolumeInfo
from nbdstore.errors import Busy, ControlError, DeviceError, InvalidArgument, NbdstoreError

DEFAULT_REQUEST_TIMEOUT_S: Final = 10
"""How long a request under way waits at most after a reconnect; a server that needs longer for one
request is connected to anew, and gets it again."""
DEFAULT_DEAD_TIMEOUT_S: Final = 3600
CONNECT_PATIENCE_S: Final = 5.0
"""A relay tries each second."""
CONNECT_RETRY_S: Final = 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AgentOptions:
    """How an agent attaches.

    holder: in whose name leases are taken; another one for each agent. driver: of requests that
    name none. request_timeout_s, dead_timeout_s: see `nbd_family.Connect`.
    """

    holder: str
    driver: str = "auto"
    request_timeout_s: int = DEFAULT_REQUEST_TIMEOUT_S
    dead_timeout_s: int = DEFAULT_DEAD_TIMEOUT_S


class Attaching:
    """What an agent does with devices and leases."""

    def __init__(
        self,
        attachments: Attachments,
        server: StoreServer,
        drivers: Drivers,
        mounting: Mounting,
        options: AgentOptions,
    ) -> None:
        self._attachments = attachments
        self._server = server
        self._drivers = drivers
        self._mounting = mounting
        self._options = options

    def find_device(self, attachment: Attachment) -> BlockDevice | None:
        """Find the device that an attachment has now."""
        return self._drivers[attachment.record.driver].find(attachment.record)

    def health(self, attachment: Attachment, *, glance: bool = False) -> Health | None:
        """Tell how an attachment's device is; None if it has none. See `Driver.health`."""
        device = attachment.device
        if device is None:
            return None
        return self._drivers[attachment.record.driver].health(
            attachment.record, device, glance=glance
        )

    def attach_new(self, request: AttachRequest) -> Attachment:
        if "@" in request.volume:
            # Without a replay of the journal, files lack that had been synced before the snapshot.
            raise InvalidArgument(
                f"{request.volume} is a snapshot, and mounting a filesystem writes to it: mount a "
                f"clone, which 'nbdstore clone {request.volume} NAME' makes at once"
            )
        info = self._server.volume(request.volume)
        address = self._server.address()
        with_tls = tls.parse_address(address) is not None
        name = request.driver if request.driver != "auto" else self._options.driver
        record = AttachRecord(
            id=new_id(),
            volume=info.name,
            volume_uuid=info.uuid,
            driver=self._drivers.choose(name, with_tls=with_tls).name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            read_only=request.read_only,
            export="",
            address=address,
            request_timeout_s=self._options.request_timeout_s,
            dead_timeout_s=self._options.dead_timeout_s,
        )
        attachment = self._attachments.save(record)
        try:
            self.attach(attachment, force=request.force)
        except BaseException:
            self.detach_or_report(attachment)
            raise
        attachment.settled = True
        return attachment

    def attach(self, attachment: Attachment, *, force: bool = False) -> None:
        """Take the lease and make the device of a record that has none."""
        record = attachment.record
        self._require_same_volume(record, self._server.volume(record.volume))
        lease = self._server.lease(record.volume, self._options.holder, force=force)
        assert lease.export
        # A filesystem that was being made under another lease may have become somebody's since.
        filesystem = record.filesystem if lease.epoch == record.epoch else None
        record = dataclasses.replace(
            record,
            export=lease.export,
            epoch=lease.epoch,
            address=self._server.address(),
            filesystem=filesystem,
        )
        self._attachments.save(record)
        # Such as those of a machine that lost its power: the server may not know that yet.
        self._server.end_connections(record.volume, record.epoch)
        device, record = self._drivers[record.driver].attach(record)
        attachment.device = device
        self._attachments.save(dataclasses.replace(record, device=device.name))
        attachment.problem, attachment.fenced, attachment.expired = "", False, False
        log.info("attached volume %s as %s", record.volume, device.path)

    def revive(self, attachment: Attachment) -> bool:
        """Keep a device that was to be detached; False if it is gone, and forgotten now.

        Raises:
            Busy: it is gone, but its lease cannot be given back now.
        """
        attachment.device = self.find_device(attachment)
        record = attachment.record
        if attachment.device is not None:
            self._attachments.save(dataclasses.replace(record, state=ATTACHED))
            return True
        self.detach(attachment)
        if self._attachments.get(record.volume) is attachment:
            raise Busy(f"volume {record.volume} is being detached: {attachment.problem}")
        return False

    def _require_same_volume(self, record: AttachRecord, info: VolumeInfo) -> None:
        if info.uuid != record.volume_uuid:
            raise DeviceError(
                f"volume {record.volume} is another one now (uuid {info.uuid}, not "
                f"{record.volume_uuid}): it was deleted and made anew; "
                f"'nbdstore detach --force {record.volume}' forgets the old one"
            )

    def require_no_stale_mount(self, attachment: Attachment) -> None:
        for mount in attachment.record.mounts:
            stale = mounted_at(mount.path)
            if stale is not None and stale.source == f"/dev/{attachment.record.device}":
                raise DeviceError(
                    f"{mount.path} is still mounted from {stale.source}, which is gone: "
                    f"'nbdstore doctor --fix' lets go of it and mounts the volume again"
                )

    def reconnect_if_needed(self, attachment: Attachment) -> None:
        device, record = attachment.device, attachment.record
        assert device
        driver = self._drivers[record.driver]
        health = driver.health(record, device)
        if health is Health.CONNECTED:
            return
        if health is Health.DEAD:
            raise DeviceError(
                f"{device.path} fails all requests: 'nbdstore doctor --fix' attaches it again"
            )
        self._require_lease(attachment)
        if driver.reconnects_itself:
            return
        self._server.end_connections(record.volume, record.epoch)
        self._attachments.save(driver.reconnect(record, device))
        log.info("volume %s is connected again", record.volume)

    def _require_lease(self, attachment: Attachment) -> None:
        """Refuse to go on with a device under another lease than it was attached by."""
        record = attachment.record
        held = next((item for item in self._server.leases() if item.volume == record.volume), None)
        if held and (held.holder, held.epoch) == (self._options.holder, record.epoch):
            attachment.fenced = False
            return
        attachment.fenced = True
        by = f"it is leased to {held.holder} since {held.since}" if held else "nobody holds it now"
        raise Busy(
            f"this machine has lost the lease of volume {record.volume} ({by}), so what is mounted "
            "here is not what it holds any more: "
            f"'nbdstore detach --force {record.volume}' gives it up"
        )

    def detach(self, attachment: Attachment, *, force: bool = False) -> None:
        before = attachment.record
        self._attachments.save(dataclasses.replace(before, state=DETACHING))
        try:
            self._take_device_away(attachment, force=force)
        except Busy:
            self._attachments.save(before)
            raise
        self._forget(attachment)

    def detach_soon(self, attachment: Attachment, *, force: bool) -> None:
        """Detach; what somebody else still uses (a container that saw the mount) is left to
        `tend`, which tries until it can be done."""
        try:
            self.detach(attachment, force=force)
        except Busy as error:
            attachment.problem = str(error)
            self._attachments.save(dataclasses.replace(attachment.record, state=DETACHING))
            log.warning(
                "volume %s is detached as soon as it can: %s", attachment.record.volume, error
            )

    def detach_or_report(self, attachment: Attachment) -> None:
        """Undo an attach that failed; what cannot be undone now is done by `tend`."""
        try:
            attachment.device = self.find_device(attachment)
            self.detach(attachment)
        except NbdstoreError as error:
            attachment.problem = str(error)
            log.warning("volume %s: %s", attachment.record.volume, error)

    def _take_device_away(self, attachment: Attachment, *, force: bool) -> None:
        record = attachment.record
        driver = self._drivers[record.driver]
        device = self.find_device(attachment)
        if force:
            self._let_go_of_mounts(attachment)
        if device is None:
            driver.remove_remains(record)
        elif force:
            driver.abandon(record, device)
        else:
            self.require_unused(record, device)
            driver.detach(record, device)
        attachment.device = None
        if device is not None:
            log.info("detached volume %s from %s", record.volume, device.path)

    def _let_go_of_mounts(self, attachment: Attachment) -> None:
        for path in self._mounting.paths(attachment):
            # One that waits for its device ends when the device does, which is next.
            with contextlib.suppress(ProgramTimeout):
                self._mounting.unmount(attachment, path, force=True)

    def _forget(self, attachment: Attachment) -> None:
        """Give the lease back and forget the record; without a server, `tend` does it later."""
        record = attachment.record
        if record.epoch:
            try:
                self._server.release(record.volume, self._options.holder, record.epoch)
            except ControlError as error:
                attachment.problem = f"the lease is still to be given back: {error}"
                log.warning("volume %s: %s", record.volume, attachment.problem)
                return
        self._attachments.remove(attachment)

    def require_unused(self, record: AttachRecord, device: BlockDevice) -> None:
        """Refuse to detach what a process has open, and keeps open, though it is not mounted."""
        deadline_s = time.monotonic() + CLAIM_PATIENCE_S
        while (users := device.users()) and time.monotonic() < deadline_s:
            time.sleep(CLAIM_RETRY_S)
        if users:
            raise Busy(
                f"{device.path} of volume {record.volume} is open in {', '.join(users)}: "
                "end that first, or detach with --force"
            )

    def require_connected(self, attachment: Attachment) -> None:
        """Refuse what would have to wait for a server that is away; connect if it is there."""
        deadline_s = time.monotonic() + CONNECT_PATIENCE_S
        while attachment.device is not None and self.health(attachment) is Health.WAITING:
            reason = "it is not connected yet"
            try:
                self.reconnect_if_needed(attachment)
            except (ControlError, ServerAway) as error:
                reason, deadline_s = str(error), 0.0
            if time.monotonic() >= deadline_s:
                raise Busy(
                    f"volume {attachment.record.volume} waits for its server ({reason}), and what "
                    "was written must still go there: bring the server back, or lose that with "
                    "--force"
                )
            time.sleep(CONNECT_RETRY_S)

    def require_unmounted(self, attachment: Attachment) -> None:
        seen = [mount.path for mount in self._mounting.mounts_of(attachment.device)]
        if seen:
            raise Busy(
                f"volume {attachment.record.volume} is mounted at {', '.join(seen)}: "
                f"unmount it first ('nbdstore umount {attachment.record.volume}')"
            )
