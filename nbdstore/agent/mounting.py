"""From a device to a mounted filesystem, and back: format once, check, mount, own, grow.

Owns the decision to format, the one act of the agent that destroys data. A volume is formatted if

- the *store* says that no block of it was ever written, or
- the record says that this very attachment, under the lease that it still holds, began to format it
  when the store said so, and was killed before mkfs had ended: then what is on it is half of that.
  An mkfs that ended in failure leaves no such record: from then on the store decides again.

Nothing that is or is not found on the device is a reason, though a filesystem of another kind than
was being made is one not to; mkfs is never forced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from typing import Final

from nbdstore.agent import filesystems, mounts
from nbdstore.agent.attachments import Attachment, Attachments
from nbdstore.agent.devices import BlockDevice
from nbdstore.agent.filesystems import Superblock, filesystem
from nbdstore.agent.mounts import Mount
from nbdstore.agent.programs import ProgramTimeout
from nbdstore.agent.records import FilesystemRecord, MountRecord
from nbdstore.agent.repairs import Repairs
from nbdstore.agent.requests import MountRequest
from nbdstore.control.model import VolumeInfo
from nbdstore.errors import Busy, DeviceError, InvalidArgument, NbdstoreError
from nbdstore.sizes import exact_size

DEFAULT_FILESYSTEM: Final = "ext4"
FOUND, BEGUN, MADE = "found", "begun", "made"
HEAD_BYTES: Final = 1 << 20
"""Where mkfs begins to write; cleared before it begins again."""
FORCED_TIMEOUT_S: Final = 5.0
SLACK_BYTES: Final = 1 << 20
"""A filesystem leaves less than this of its device unused."""

log = logging.getLogger(__name__)


class Mounting:
    """What an agent does with filesystems; each call is made by whoever has the volume's turn."""

    def __init__(self, attachments: Attachments, repairs: Repairs) -> None:
        self._attachments = attachments
        self._repairs = repairs

    def prepare(
        self, attachment: Attachment, device: BlockDevice, request: MountRequest, info: VolumeInfo
    ) -> None:
        """Bring the filesystem of a device that is not mounted into order; format a new volume.

        Raises:
            DeviceError: there is none, and the volume holds data, so it is not made, either.
            InvalidArgument: another kind was asked for than there is.
        """
        known = attachment.record.filesystem
        if known is not None and known.made == BEGUN:
            _require_no_other(device, known, info.name)
            self.require_kind(attachment, request)
            log.warning("mkfs of volume %s was interrupted: beginning again", info.name)
            _clear_head(device)
            self._make(attachment, device, known)
        elif known is None and not info.written and not request.read_only:
            kind = request.filesystem or DEFAULT_FILESYSTEM
            made = FilesystemRecord(type=kind, made=BEGUN, owner=request.owner, mode=request.mode)
            self._make(attachment, device, made)
        else:
            self._look_at(attachment, device, request)
        self.require_kind(attachment, request)

    def _make(self, attachment: Attachment, device: BlockDevice, wanted: FilesystemRecord) -> None:
        record = dataclasses.replace(attachment.record, filesystem=wanted)
        self._attachments.save(record)
        log.info("formatting volume %s with %s", record.volume, wanted.type)
        try:
            filesystems.make(wanted.type, device.path, wanted.owner, wanted.mode)
        except ProgramTimeout:
            raise  # it may still be writing
        except DeviceError:
            # It has ended: what is there when somebody looks again need not be its work.
            self._attachments.save(dataclasses.replace(record, filesystem=None))
            raise
        made = dataclasses.replace(wanted, made=MADE)
        self._attachments.save(dataclasses.replace(record, filesystem=made))

    def _look_at(self, attachment: Attachment, device: BlockDevice, request: MountRequest) -> None:
        record = attachment.record
        superblock = filesystems.read_superblock(device.path)
        if superblock is None:
            raise DeviceError(
                f"volume {record.volume} was written before, but holds neither ext4 nor xfs that "
                f"can be recognised; it is not formatted, since that would destroy what it holds: "
                f"look at {device.path}, or mount a new volume"
            )
        if record.filesystem is None or record.filesystem.type != superblock.type:
            found = FilesystemRecord(type=superblock.type, made=FOUND)
            record = dataclasses.replace(record, filesystem=found)
            self._attachments.save(record)
        self._check(attachment, device, request.fsck, superblock)

    def _check(
        self, attachment: Attachment, device: BlockDevice, mode: str, superblock: Superblock
    ) -> None:
        record, kind = attachment.record, filesystem(superblock.type)
        if mode == "never" or record.read_only or (superblock.clean and mode != "repair"):
            return
        log.info("checking the filesystem of volume %s", record.volume)
        if mode != "repair":
            kind.check(device.path)
            return
        attachment.problem = self._repairs.repair(
            record, lambda: kind.is_damaged(device.path), lambda: kind.repair(device.path)
        )
        if attachment.problem:
            log.info("volume %s: %s", record.volume, attachment.problem)

    def require_kind(self, attachment: Attachment, request: MountRequest) -> None:
        """Raise InvalidArgument if another kind of filesystem is asked for than there is."""
        found = attachment.record.filesystem
        if found is not None and request.filesystem not in ("", found.type):
            raise InvalidArgument(
                f"volume {request.volume} holds {found.type}, not {request.filesystem}: "
                "mount it as that"
            )

    def mount(self, attachment: Attachment, device: BlockDevice, wanted: MountRecord) -> None:
        """Mount a device whose filesystem is in order, where it is wanted."""
        record = attachment.record
        assert record.filesystem
        kind = filesystem(record.filesystem.type)
        read_only = wanted.read_only or record.read_only
        options = [option for option in wanted.options.split(",") if option]
        if not options and not read_only:
            options = list(kind.mount_options)
        options += [option for option in kind.needed_options if option not in options]
        options += ["ro"] if read_only else []
        self._repairs.forget(record)
        mounts.mount(device.make_node(), wanted.path, record.filesystem.type, options)
        try:
            self.complete(attachment, device, wanted)
        except BaseException:
            with contextlib.suppress(NbdstoreError):  # the reason why is what people are to know
                mounts.unmount(wanted.path)
            raise

    def complete(self, attachment: Attachment, device: BlockDevice, wanted: MountRecord) -> None:
        """Do what follows mounting, by this agent or by one that was killed before it had done it;
        the device must be connected, or this waits for it.

        Raises:
            DeviceError: it cannot be done.
        """
        if wanted.propagation:
            mounts.propagate(wanted.path, wanted.propagation)
        complete = tuple(
            dataclasses.replace(mount, complete=True) if mount.path == wanted.path else mount
            for mount in attachment.record.mounts
        )
        record = attachment.record
        self._attachments.save(dataclasses.replace(record, mounts=complete))
        if not (wanted.read_only or record.read_only):
            self.grow(attachment, device, wanted.path)

    def grow(self, attachment: Attachment, device: BlockDevice, path: str) -> None:
        """Let a mounted filesystem fill its device, if it is smaller.

        One that cannot grow is as good as it was before: the record tells why (`too_small`), and
        what is mounted stays mounted.
        """
        superblock = filesystems.read_superblock(device.path)
        volume, too_small = attachment.record.volume, ""
        if superblock is not None and device.size - superblock.size >= SLACK_BYTES:
            log.info("growing the filesystem of volume %s", volume)
            try:
                filesystem(superblock.type).grow(device.path, path)
            except DeviceError as error:
                too_small = (
                    f"the filesystem has {exact_size(superblock.size)} of the "
                    f"{exact_size(device.size)} of {device.path}, and cannot grow now: {error}"
                )
        if too_small != attachment.record.too_small:
            self._attachments.save(dataclasses.replace(attachment.record, too_small=too_small))
            if too_small:
                log.info("volume %s: %s", volume, too_small)

    def mounts_of(self, device: BlockDevice | None) -> list[Mount]:
        """List where a device is mounted, as far as this mount namespace shows."""
        if device is None or device.attribute("dev") is None:
            return []
        return mounts.mounts_of(device.number)

    def paths(self, attachment: Attachment) -> list[str]:
        """List mount points, wanted and seen, those that lie within others first."""
        seen = {mount.path for mount in self.mounts_of(attachment.device)}
        wanted = {mount.path for mount in attachment.record.mounts}
        return sorted(seen | wanted, key=len, reverse=True)

    def unmount(
        self, attachment: Attachment, path: str, *, force: bool = False, forget: bool = True
    ) -> None:
        """Unmount, and forget that it was wanted; Busy leaves all as it was.

        Raises:
            Busy: files on it are in use; with `force` it goes nevertheless.
            ProgramTimeout: it waits for its device.
        """
        before = attachment.record
        left = tuple(mount for mount in before.mounts if mount.path != path)
        if forget:
            # Before: what a killed agent has unmounted is not to be mounted again.
            too_small = before.too_small if left else ""
            self._attachments.save(dataclasses.replace(before, mounts=left, too_small=too_small))
        timeout_s = FORCED_TIMEOUT_S if force else mounts.UNMOUNT_TIMEOUT_S
        try:
            while self._is_ours(attachment, path):
                mounts.unmount(path, lazily=force, timeout_s=timeout_s)
        except Busy:
            self._attachments.save(before)
            raise

    def _is_ours(self, attachment: Attachment, path: str) -> bool:
        found = mounts.mounted_at(path)
        device = attachment.device
        if found is None:
            return False
        if device is not None and device.attribute("dev") is not None:
            return found.device == device.number
        return found.source == f"/dev/{attachment.record.device}"


def _require_no_other(device: BlockDevice, begun: FilesystemRecord, volume: str) -> None:
    """Raise DeviceError if a device holds what the mkfs that was begun did not make."""
    found = filesystems.read_superblock(device.path)
    if found is not None and found.type != begun.type:
        raise DeviceError(
            f"formatting volume {volume} with {begun.type} was interrupted, but {device.path} "
            f"holds {found.type} now; it is not formatted, since that would destroy what it "
            f"holds: 'nbdstore detach {volume}', and mount it again as it is"
        )


def _clear_head(device: BlockDevice) -> None:
    with device.claimed() as descriptor:
        os.pwrite(descriptor, bytes(min(HEAD_BYTES, device.size)), 0)
        os.fsync(descriptor)
