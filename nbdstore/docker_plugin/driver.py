"""What Docker asks for: create, remove, mount, unmount, look.

Owns how a promise to Docker is kept through kills at any moment: the record says what was begun
before it is begun, and every call may come again::

    create   record (creating) -> volume made in the store -> record (ready, the volume's uuid)
    mount    record (the user's ID) -> mounted by the agent
    unmount  record (without the ID) -> unmounted by the agent, if it was the last
    remove   record (no users) -> unmounted -> volume deleted, if it was made here -> no record

A volume that is in the store already is used, not made, if it is what was asked for; it is never
deleted from here. Neither is one that took the place of one made here: uuids are compared. A volume
that is "creating" was promised to nobody: if it was never written, it is made anew. What is deleted
goes into the store's trash.

Looking answers from the records and never waits for the server: Docker takes an error for "no such
volume", and forgets it. What is wrong stands in the status. Only the size is the store's, if it can
be had at once: a volume may have been resized.

A mount ID that Docker never takes back (it was killed, or the plugin was, in the middle) keeps a
volume mounted until it is removed. Docker asks that only for a volume that no container uses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from typing import Any, Final, Protocol

from nbdstore.agent.requests import AttachmentStatus, MountRequest
from nbdstore.control.model import VolumeInfo
from nbdstore.control.service import VolumeService
from nbdstore.docker_plugin.options import VolumeOptions
from nbdstore.docker_plugin.records import CREATING, READY, Records, VolumeRecord
from nbdstore.docker_plugin.stored_size import StoredSizes
from nbdstore.docker_plugin.turns import Turns
from nbdstore.errors import AlreadyExists, InvalidArgument, NbdstoreError, NotFound, StoreError
from nbdstore.sizes import exact_size, format_size

# Docker waits 120 s for Create and Mount, 60 s for the others.
LONG_PATIENCE_S: Final = 100.0
SHORT_PATIENCE_S: Final = 45.0
SWEEP_PATIENCE_S: Final = 5.0
BY: Final = "docker"

log = logging.getLogger(__name__)


class Agent(Protocol):
    """What is asked of the agent; see `nbdstore.agent.api.AgentClient`."""

    def mount(self, request: MountRequest) -> AttachmentStatus: ...
    def umount(self, volume: str, path: str = "", *, force: bool = False) -> None: ...
    def status(self) -> list[AttachmentStatus]: ...


class VolumeDriver:
    """The volumes that Docker knows on this machine.

    Arguments:
        records: what was promised; nobody else changes them.
        service: the store.
        agent: mounts on this machine, where Docker sees it.
        default_size: bytes of a volume that is created without a size; 0 = it must have one.
    """

    def __init__(
        self, records: Records, service: VolumeService, agent: Agent, *, default_size: int = 0
    ) -> None:
        self._records = records
        self._service = service
        self._agent = agent
        self._default_size = default_size
        self._turns = Turns()
        self._sizes = StoredSizes(service)

    # Each call may raise any NbdstoreError.

    def create(self, name: str, given: dict[str, str]) -> None:
        """Create a volume, or take the one of the store that is what was asked for."""
        options = VolumeOptions.parse(given)
        what = " ".join(["creating", *(f"{key}={text}" for key, text in given.items())])
        self._turns.take(
            name, what, lambda: self._create(name, options), patience_s=LONG_PATIENCE_S
        )

    def remove(self, name: str) -> None:
        """Forget a volume, and delete it and its data if it was made here."""
        self._turns.take(name, "removing", lambda: self._remove(name), patience_s=SHORT_PATIENCE_S)

    def mount(self, name: str, user: str) -> str:
        """Mount a volume for a user, and return where."""
        self._turns.take(
            name,
            f"mounting (for {user[:12]})",
            lambda: self._mount(name, user),
            patience_s=LONG_PATIENCE_S,
        )
        return str(self._records.mount_path(name))

    def unmount(self, name: str, user: str) -> None:
        """Let a user go, and unmount the volume if that was the last."""
        self._turns.take(
            name,
            f"unmounting (for {user[:12]})",
            lambda: self._unmount(name, user),
            patience_s=SHORT_PATIENCE_S,
        )

    def sweep(self) -> None:
        """Unmount what could not be unmounted when its last user went, as when no agent ran."""
        attachments = self._attachments()
        if isinstance(attachments, str):
            return
        for record in self._records.all():
            found = attachments.get(record.name)
            path = str(self._records.mount_path(record.name))
            if record.users or found is None or path not in [it["path"] for it in found.mounts]:
                continue
            try:
                self._turns.take(
                    record.name,
                    "unmounting (for nobody)",
                    functools.partial(self._unmount_unused, record.name),
                    patience_s=SWEEP_PATIENCE_S,
                )
            except NbdstoreError as error:
                log.warning("volume %s is mounted for nobody: %s", record.name, error)

    def path(self, name: str) -> str:
        """Return where a volume is mounted; "" if it is not."""
        record = self._find(name)
        return str(self._records.mount_path(name)) if record.users else ""

    def describe(self, name: str) -> dict[str, Any]:
        """Describe one volume as the protocol wants it."""
        described = self._describe(self._find(name), self._attachments())
        if size := self._sizes.of(name):
            described["Status"]["size_bytes"] = size
        return described

    def list(self) -> list[dict[str, Any]]:
        """Describe all volumes; see `describe`."""
        attachments = self._attachments()
        records = [record for record in self._records.all() if record.state != CREATING]
        return [self._describe(record, attachments) for record in records]

    # Create

    def _create(self, name: str, options: VolumeOptions) -> None:
        record = self._records.get(name)
        if record is not None and record.state == READY:
            _require_same(record, options)
            return
        info = self._volume(name)
        if info is not None and (record is None or info.written):
            _require_fitting(info, options)
            self._records.save(dataclasses.replace(VolumeRecord.new(name, options), state=READY))
            return
        if info is not None:
            self._service.delete_volume(name, now=True)
        self._make(name, options)

    def _make(self, name: str, options: VolumeOptions) -> None:
        """Make a volume that is not there."""
        size = options.size or self._default_size
        if not size and not options.clone:
            raise InvalidArgument(
                f"there is no volume {name}: say with '-o size=10G' how large to make it"
            )
        record = self._records.save(VolumeRecord.new(name, options))
        try:
            info = self._make_in_store(name, size, options)
        except (AlreadyExists, InvalidArgument, StoreError):
            self._records.remove(name)  # it was refused, so there is nothing to be completed
            raise
        if options.iops or options.bandwidth:
            self._service.update_volume(
                name, iops=options.iops or None, bandwidth=options.bandwidth or None
            )
        options = dataclasses.replace(options, size=info.size)
        self._records.save(
            dataclasses.replace(record, options=options, made=info.uuid, state=READY)
        )

    def _make_in_store(self, name: str, size: int, options: VolumeOptions) -> VolumeInfo:
        if not options.clone:
            return self._service.create_volume(name, size)
        found = self._service.snapshots(options.clone.partition("@")[0])
        origin = next((item for item in found if item.snapshot == options.clone), None)
        if origin is None:
            raise NotFound(f"there is no snapshot {options.clone}: 'nbdstore snapshot list' lists")
        if options.size and options.size < origin.size:
            raise InvalidArgument(
                f"size={exact_size(options.size)} is less than the {exact_size(origin.size)} of "
                f"{options.clone}: give no size, or a larger one"
            )
        info = self._service.clone(options.clone, name)
        if options.size > info.size:
            info = self._service.update_volume(name, size=options.size)
        return info

    def _volume(self, name: str) -> VolumeInfo | None:
        with contextlib.suppress(NotFound):
            return self._service.volume(name)
        return None

    # Remove

    def _remove(self, name: str) -> None:
        record = self._find(name)
        record = self._records.save(dataclasses.replace(record, users=()))
        self._unmount_now(record)
        info = self._volume(name) if record.made else None
        if info is not None and info.uuid == record.made:
            self._service.delete_volume(name)
        else:
            log.info("volume %s, if it is in the store, was not made here and stays", name)
        self._records.remove(name)

    # Mount

    def _mount(self, name: str, user: str) -> None:
        record = self._find(name)
        if user not in record.users:
            before, record = (
                record,
                self._records.save(dataclasses.replace(record, users=(*record.users, user))),
            )
        else:
            before = dataclasses.replace(
                record, users=tuple(item for item in record.users if item != user)
            )
        path = self._records.mount_path(name)
        path.mkdir(exist_ok=True)
        options = record.options
        try:
            self._agent.mount(
                MountRequest(
                    volume=name,
                    path=str(path),
                    filesystem=options.fs,
                    options=options.options,
                    owner=options.owner,
                    mode=options.mode,
                    by=BY,
                )
            )
        except NbdstoreError:
            self._records.save(before)
            raise

    def _unmount(self, name: str, user: str) -> None:
        record = self._records.get(name)
        if record is None or user not in record.users:
            log.warning("volume %s was not mounted for %s", name, user)
            return
        left = tuple(item for item in record.users if item != user)
        record = self._records.save(dataclasses.replace(record, users=left))
        if not left:
            self._unmount_now(record)

    def _unmount_unused(self, name: str) -> None:
        record = self._records.get(name)
        if record is not None and not record.users:
            self._unmount_now(record)

    def _unmount_now(self, record: VolumeRecord) -> None:
        with contextlib.suppress(NotFound):
            self._agent.umount(record.name, str(self._records.mount_path(record.name)))
        with contextlib.suppress(OSError):  # there is none, or something is mounted on it
            self._records.mount_path(record.name).rmdir()

    # Look

    def _find(self, name: str) -> VolumeRecord:
        """Return a record; one of a volume that was never finished was promised to nobody."""
        record = self._records.get(name)
        if record is None or record.state == CREATING:
            raise NotFound(f"there is no volume {name}")
        return record

    def _attachments(self) -> dict[str, AttachmentStatus] | str:
        """Ask the agent, which answers at once, how its volumes are; or say what is wrong."""
        try:
            return {status.volume: status for status in self._agent.status()}
        except NbdstoreError as error:
            return str(error)

    def _describe(
        self, record: VolumeRecord, attachments: dict[str, AttachmentStatus] | str
    ) -> dict[str, Any]:
        status: dict[str, Any] = {"state": record.state, "users": len(record.users)}
        if record.options.size:
            status["size_bytes"] = record.options.size
        if isinstance(attachments, str):
            status["trouble"] = attachments
        elif (found := attachments.get(record.name)) is not None:
            status |= {
                "state": found.state,
                "size_bytes": found.size,
                "device": found.device,
                "filesystem": found.filesystem,
            }
            if found.message:
                status["trouble"] = found.message
        mount_path = str(self._records.mount_path(record.name)) if record.users else ""
        return {
            "Name": record.name,
            "Mountpoint": mount_path,
            "CreatedAt": record.created,
            "Status": status,
        }


def _require_same(record: VolumeRecord, options: VolumeOptions) -> None:
    """Raise AlreadyExists if a volume was created with other options than are given now."""
    there = record.options
    for field in dataclasses.fields(options):
        wanted = getattr(options, field.name)
        if wanted and wanted != getattr(there, field.name):
            raise AlreadyExists(
                f"there is a volume {record.name} with {field.name}={getattr(there, field.name)}, "
                f"not {wanted}: give another name; 'nbdstore volume' resizes and limits it"
            )


def _require_fitting(info: VolumeInfo, options: VolumeOptions) -> None:
    """Raise AlreadyExists if the volume of the store is not what is asked for."""
    name = info.name
    if options.clone and options.clone != info.origin:
        raise AlreadyExists(
            f"the store has a volume {name} already, so it cannot be made as a clone of "
            f"{options.clone}: give another name, or no clone, to use it as it is"
        )
    if options.size and options.size != info.size:
        raise AlreadyExists(
            f"the store has a volume {name} already, of {format_size(info.size)} and not "
            f"{format_size(options.size)}: give another name, or no size, to use it as it is"
        )
