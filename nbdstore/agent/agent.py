"""The agent: attach, detach, mount, umount, and tending what is attached.

Owns the order of things that need devices and filesystems both::

    mount    attach -> filesystem (see `mounting`) -> record (the wish) -> mount
    umount   record (no wish) -> umount -> detach, if nobody else wants the device

What a record wishes is brought about by `tend`, again and again until it is so: at the start of an
agent, and whenever something is not as it should be. It never takes away what it does not know, nor
what is in use.

Calls are synchronous and may come from any thread; a volume has one at a time (`Attachments.turn`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging

from nbdstore.agent.attaching import AgentOptions, Attaching
from nbdstore.agent.attachments import Attachment, Attachments
from nbdstore.agent.devices import BlockDevice
from nbdstore.agent.driver import Health
from nbdstore.agent.drivers import Drivers
from nbdstore.agent.mounting import Mounting
from nbdstore.agent.mounts import mounted_at
from nbdstore.agent.programs import ProgramTimeout
from nbdstore.agent.records import DETACHING, MountRecord, new_id
from nbdstore.agent.repairs import Repairs
from nbdstore.agent.requests import AttachmentStatus, AttachRequest, MountRequest
from nbdstore.agent.store_server import StoreServer
from nbdstore.errors import (
    AlreadyExists,
    Busy,
    DeviceError,
    NbdstoreError,
    NotFound,
)
from nbdstore.sizes import exact_size

log = logging.getLogger(__name__)


class Agent:
    """The attachments of one machine to one server."""

    def __init__(
        self, attachments: Attachments, server: StoreServer, drivers: Drivers, options: AgentOptions
    ) -> None:
        self.attachments = attachments
        self.server = server
        self.drivers = drivers
        self.options = options
        self.mounting = Mounting(attachments, Repairs(server))
        self.attaching = Attaching(attachments, server, drivers, self.mounting, options)
        self.pending: dict[tuple[str, str], tuple[MountRequest, str]] = {}
        """Mounts that were wanted from the start and have not succeeded yet, and why not."""

    # --- What can be asked -------------------------------------------------------------------

    def attach(self, request: AttachRequest) -> AttachmentStatus:
        """Make a volume a device; the same one if it is attached already.

        Raises:
            Busy: another holds the volume, or somebody is at work on it here.
            NotFound: there is no such volume.
            AlreadyExists: it is attached in another way.
        """
        with self.attachments.turn(request.volume, "attaching"):
            attachment = self._attached(request)
            self.attachments.save(dataclasses.replace(attachment.record, explicit=True))
            return self.describe(attachment)

    def detach(self, volume: str, *, force: bool = False) -> None:
        """Take a volume's device away, and give its lease back.

        With `force` even if it is mounted or its server is away: what is not written is lost, and
        programs that use it get errors.

        Raises:
            Busy: it is mounted, or in use.
        """
        with self.attachments.turn(volume, "detaching"):
            attachment = self.attachments.find(volume)
            attachment.device = self.attaching.find_device(attachment)
            if not force:
                self.attaching.require_unmounted(attachment)
                self.attaching.require_connected(attachment)
            self.attaching.detach(attachment, force=force)

    def mount(self, request: MountRequest) -> AttachmentStatus:
        """Mount a volume; nothing if it is mounted there already.

        Raises:
            Busy: another holds the volume, or something else is mounted there.
            DeviceError: there is no filesystem on it that could be mounted safely.
        """
        request = request.checked()
        with self.attachments.turn(request.volume, "mounting"):
            before = self.attachments.get(request.volume)
            self._require_free_path(request, before)
            self._create_if_wanted(request)
            attachment = self._attached(
                AttachRequest(
                    volume=request.volume,
                    driver=request.driver,
                    read_only=before.record.read_only if before else False,
                    force=request.force,
                )
            )
            try:
                self._mount(attachment, request)
            except BaseException:
                # What was only attached for this is not left behind.
                if not (attachment.record.explicit or attachment.record.mounts):
                    self.attaching.detach_or_report(attachment)
                raise
            return self.describe(attachment)

    def umount(self, volume: str, path: str = "", *, force: bool = False) -> None:
        """Unmount a volume, from `path` or from all its mount points; then detach it, unless it
        was attached by itself.

        Raises:
            Busy: files on it are in use; with `force` they lose it.
        """
        with self.attachments.turn(volume, "unmounting"):
            attachment = self.attachments.find(volume)
            attachment.device = self.attaching.find_device(attachment)
            if not force:
                self.attaching.require_connected(attachment)
            for mount_path in [path] if path else self.mounting.paths(attachment):
                self.mounting.unmount(attachment, mount_path, force=force)
            record = attachment.record
            left = record.mounts or self.mounting.mounts_of(attachment.device)
            if not (record.explicit or left):
                self.attaching.detach_soon(attachment, force=force)

    def find_by_path(self, path: str) -> str:
        """Return the volume that is mounted at a path by this agent; NotFound if none is."""
        for attachment in self.attachments.all():
            if path in self.mounting.paths(attachment):
                return attachment.record.volume
        raise NotFound(f"no volume is mounted at {path}: 'nbdstore agent status' lists")

    def status(self) -> list[AttachmentStatus]:
        """Describe all attachments, without waiting for any device or server."""
        # Before the attachments: what leaves it meanwhile is seen among these.
        pending = list(self.pending.values())
        found = [self.describe(attachment) for attachment in self.attachments.all()]
        return found + [
            self._describe_pending(request, problem)
            for request, problem in pending
            if not self._is_mounted(self.attachments.get(request.volume), request.path)
        ]

    # --- Attaching ---------------------------------------------------------------------------

    def _attached(self, request: AttachRequest) -> Attachment:
        attachment = self.attachments.get(request.volume)
        if attachment is None:
            return self.attaching.attach_new(request)
        if attachment.record.state == DETACHING and not self.attaching.revive(attachment):
            return self.attaching.attach_new(request)
        record = attachment.record
        if request.driver not in ("auto", record.driver):
            raise AlreadyExists(
                f"volume {record.volume} is attached with the {record.driver} driver"
            )
        if request.read_only != record.read_only:
            how = "read-only" if record.read_only else "read-write"
            raise AlreadyExists(f"volume {record.volume} is attached {how}: detach it first")
        attachment.device = self.attaching.find_device(attachment)
        if attachment.device is None:
            self.attaching.require_no_stale_mount(attachment)
            self.attaching.attach(attachment, force=request.force)
        return attachment

    # --- Mounting ----------------------------------------------------------------------------

    def _require_free_path(self, request: MountRequest, attachment: Attachment | None) -> None:
        """Before anything is attached or formatted, refuse what could not be mounted then."""
        mount = mounted_at(request.path)
        device = self.attaching.find_device(attachment) if attachment else None
        if mount is not None and (device is None or mount.device != device.number):
            raise Busy(
                f"{request.path} has {mount.source} mounted on it: unmount that, or give another "
                "directory"
            )

    def _create_if_wanted(self, request: MountRequest) -> None:
        if request.size and self.attachments.get(request.volume) is None:
            with contextlib.suppress(AlreadyExists):
                self.server.control.create_volume(request.volume, request.size)

    def _mount(self, attachment: Attachment, request: MountRequest) -> None:
        device = attachment.device
        assert device
        wanted = MountRecord(
            path=request.path,
            options=request.options,
            read_only=request.read_only,
            fsck=request.fsck,
            propagation=request.propagation,
            by=request.by,
        )
        there = self.mounting.mounts_of(device)
        if there:
            self.mounting.require_kind(attachment, request)
        self._require_free_path(request, attachment)
        if any(mount.path == request.path for mount in there):
            self._adopt_mount(attachment, device, wanted)
            return
        if not there:
            if not attachment.record.read_only:
                device.sync()  # so that the store knows all that was ever written
            info = self.server.volume(request.volume)
            self.mounting.prepare(attachment, device, request, info)
        before = attachment.record.mounts
        self._remember_mount(attachment, wanted)
        try:
            self.mounting.mount(attachment, device, wanted)
        except BaseException:
            self.attachments.save(dataclasses.replace(attachment.record, mounts=before))
            raise
        log.info("mounted volume %s at %s", request.volume, request.path)

    def _adopt_mount(
        self, attachment: Attachment, device: BlockDevice, wanted: MountRecord
    ) -> None:
        """Take over what is mounted already, and complete it unless that was done."""
        known = next((item for item in attachment.record.mounts if item.path == wanted.path), None)
        complete = known is not None and known.complete and known.propagation == wanted.propagation
        self._remember_mount(attachment, dataclasses.replace(wanted, complete=complete))
        if not complete:
            self.attaching.require_connected(attachment)
            self.mounting.complete(attachment, device, wanted)

    def _remember_mount(self, attachment: Attachment, wanted: MountRecord) -> None:
        others = [mount for mount in attachment.record.mounts if mount.path != wanted.path]
        record = dataclasses.replace(attachment.record, mounts=(*others, wanted))
        self.attachments.save(record)

    # --- Tending -----------------------------------------------------------------------------

    def needs_care(self, attachment: Attachment) -> bool:
        """Whether `tend` has something to do for it."""
        if not attachment.settled or attachment.record.state == DETACHING:
            return True
        health = self.attaching.health(attachment, glance=True)
        return health is not Health.CONNECTED and not attachment.fenced

    def tend(self, volume: str, *, patience_s: float = 0.0) -> None:
        """Bring about what a volume's record wishes, as far as that can be done now.

        Raises:
            NbdstoreError: it could not be done; try again later.
        """
        with self.attachments.turn(volume, "tending", patience_s=patience_s):
            attachment = self.attachments.get(volume)
            if attachment is None:
                return
            try:
                self._tend(attachment)
            except NbdstoreError as error:
                attachment.problem = str(error)
                raise

    def _tend(self, attachment: Attachment) -> None:
        attachment.device = self.attaching.find_device(attachment)
        record = attachment.record
        if record.state == DETACHING:
            self.attaching.detach(attachment)
            return
        if attachment.device is None:
            self.attaching.require_no_stale_mount(attachment)
            self.attaching.attach(attachment)
        elif not record.export:
            raise DeviceError(f"the record of volume {record.volume} and its device do not agree")
        else:
            attachment.device.make_node()  # a new container has a new /dev
        self.attaching.reconnect_if_needed(attachment)
        before = attachment.problem
        if not attachment.settled:
            self._mount_what_is_wanted(attachment)
            attachment.settled = True
        if attachment.problem == before:  # or a repair has told of its snapshot
            attachment.problem = ""

    def _mount_what_is_wanted(self, attachment: Attachment) -> None:
        device = attachment.device
        assert device
        for wanted in attachment.record.mounts:
            if any(mount.path == wanted.path for mount in self.mounting.mounts_of(device)):
                if not wanted.complete:
                    self._adopt_mount(attachment, device, wanted)
                continue
            asked = dataclasses.asdict(wanted)
            del asked["complete"]
            self._mount(attachment, MountRequest(volume=attachment.record.volume, **asked))

    def grow(self, volume: str, size: int) -> None:
        """Let the device and the filesystem of a volume grow with it; see `Mounting.grow`.

        Raises:
            NbdstoreError: it could not be done; try again later.
        """
        with self.attachments.turn(volume, "growing", patience_s=0.0):
            attachment = self.attachments.find(volume)
            attachment.device = device = self.attaching.find_device(attachment)
            connected = self.attaching.health(attachment) is Health.CONNECTED
            if device is None or attachment.fenced or not connected:
                return  # resize2fs would wait with the device, and everybody for this turn
            if device.size < size and not self._grow_device(attachment, device, size):
                return
            mounts = self.mounting.mounts_of(device)
            if mounts and not mounts[0].read_only:
                self.mounting.grow(attachment, device, mounts[0].path)

    def _grow_device(self, attachment: Attachment, device: BlockDevice, size: int) -> bool:
        volume = attachment.record.volume
        try:
            grown = self.drivers[attachment.record.driver].grow(attachment.record, device, size)
        except DeviceError as error:
            attachment.problem = str(error)
            raise
        if not grown:
            attachment.problem = (
                f"the volume has {exact_size(size)} now, of which {device.path} shows "
                f"{exact_size(device.size)}, for it was attached by an older nbdstore: unmount and "
                "mount it "
                f"('nbdstore umount {volume}'), or detach and attach it, or restart the agent"
            )
            return False
        attachment.problem = ""
        self.attachments.save(dataclasses.replace(attachment.record, size=size))
        log.info("%s has %s now", device.path, exact_size(size))
        return True

    def renew(self, volume: str) -> None:
        """Give a volume whose device or filesystem has failed a new device, and mount it again.

        What failed is unmounted first; if files on it are still open, their programs get errors.

        Raises:
            NbdstoreError: it could not be done.
        """
        with self.attachments.turn(volume, "renewing"):
            attachment = self.attachments.find(volume)
            attachment.device = self.attaching.find_device(attachment)
            record = attachment.record
            driver = self.drivers[record.driver]
            for path in self.mounting.paths(attachment):
                with contextlib.suppress(ProgramTimeout):
                    self.mounting.unmount(attachment, path, force=True, forget=False)
            if attachment.device is not None:
                driver.abandon(record, attachment.device)
            attachment.device = None
            attachment.settled = False
            # Another id, so that what is left of the old device is not taken for the new one.
            self.attachments.remove(attachment)
            self.attachments.save(dataclasses.replace(record, id=new_id(), device="", sockets=()))
            self._tend(self.attachments.find(volume))

    def stop(self) -> None:
        """Unmount, detach and release what is not in use; the rest stays as it is.

        The records stay, too: the next agent brings all of it back.
        """
        for attachment in self.attachments.all():
            volume = attachment.record.volume
            try:
                with self.attachments.turn(volume, "stopping"):
                    self._suspend(attachment)
            except NbdstoreError as error:
                log.warning("volume %s stays attached: %s", volume, error)

    def _suspend(self, attachment: Attachment) -> None:
        attachment.device = self.attaching.find_device(attachment)
        if attachment.record.state == DETACHING:
            self.attaching.detach(attachment)
            return
        self.attaching.require_connected(attachment)
        for path in self.mounting.paths(attachment):
            self.mounting.unmount(attachment, path, forget=False)
        record = attachment.record
        if attachment.device is not None:
            self.attaching.require_unused(record, attachment.device)
            self.drivers[record.driver].detach(record, attachment.device)
            attachment.device = None
        self.server.release(record.volume, self.options.holder, record.epoch)
        log.info("volume %s is detached until the next start", record.volume)

    # --- Describing --------------------------------------------------------------------------

    def describe(self, attachment: Attachment) -> AttachmentStatus:
        """Describe an attachment."""
        record, device = attachment.record, attachment.device
        state = self._state(attachment)
        return AttachmentStatus(
            volume=record.volume,
            path=device.path if device else "",
            device=device.name if device else "",
            driver=record.driver,
            state=state,
            message=attachment.problem or record.too_small,
            size=device.size if device else record.size,
            read_only=record.read_only,
            holder=self.options.holder,
            epoch=record.epoch,
            since=record.created,
            filesystem=record.filesystem.type if record.filesystem else "",
            explicit=record.explicit,
            mounts=[
                {"path": mount.path, "by": mount.by, "read_only": mount.read_only}
                for mount in record.mounts
            ],
        )

    def _describe_pending(self, request: MountRequest, problem: str) -> AttachmentStatus:
        return AttachmentStatus(
            volume=request.volume,
            path="",
            device="",
            driver="",
            state="absent",
            message=problem,
            size=request.size,
            read_only=request.read_only,
            holder=self.options.holder,
            epoch=0,
            since="",
            filesystem=request.filesystem,
            explicit=False,
            mounts=[{"path": request.path, "by": request.by, "read_only": request.read_only}],
        )

    def _state(self, attachment: Attachment) -> str:
        if attachment.record.state == DETACHING:
            return "detaching"
        if attachment.fenced:
            return "fenced"
        if attachment.expired:
            return "failed"
        states = {
            None: "absent",
            Health.CONNECTED: "attached",
            Health.WAITING: "waiting",
            Health.DEAD: "failed",
        }
        state = states[self.attaching.health(attachment, glance=True)]
        wanted = [mount.path for mount in attachment.record.mounts]
        if state == "attached" and not all(self._is_mounted(attachment, path) for path in wanted):
            return "absent"
        return state

    def _is_mounted(self, attachment: Attachment | None, path: str) -> bool:
        """Whether a volume is mounted at a path, told without a look at the path itself."""
        device = attachment.device if attachment else None
        return any(mount.path == path for mount in self.mounting.mounts_of(device))
