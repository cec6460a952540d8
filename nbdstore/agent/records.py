"""The agent's memory on disk: one record for each attachment, written before anything is done.

Owns the state directory and the format in it; knows nothing of devices or servers::

    STATE/lock                  held by whoever acts: the agent, or a command while none runs
    STATE/agent.json            {"version": 1, "id": 8 hex digits}: who this agent is, for ever
    STATE/attachments/ID.json   one AttachRecord (version 2); ID is 16 hex digits, new for each
                                attachment, and part of the device's identifier
    STATE/attachments/ID.new    a record being written when the machine stopped: without meaning

A record is replaced as a whole: written beside it, synced, renamed, the directory synced. It holds
the lease's secret, so all of STATE is for its owner only.

Version 1 remembered of a mount neither fsck nor whether it was complete; its records are read as if
"auto" had been asked, and completed once more. Members that are not known are left out.

A record is a wish. What is found at the start beside it says how far its fulfilment had come::

    state       device   at the start
    attached    there    adopt it; new connections if its own are dead; mount what is not mounted,
                         and complete what is
    attached    none     (the machine was restarted, or the agent died before) attach and mount
    detaching   any      detach; unless somebody has mounted the device: then leave it, and say so
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from nbdstore.errors import Busy, DeviceError

VERSION: Final = 2
READ_VERSIONS: Final = (1, VERSION)
AGENT_VERSION: Final = 1
ATTACHED: Final = "attached"
DETACHING: Final = "detaching"
DIRECTORY_MODE: Final = 0o700
FILE_MODE: Final = 0o600
LOCK_RETRY_S: Final = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class MountRecord:
    """A mount point that is wanted, as it was asked for (see `MountRequest`), until it is unmounted
    by request: it is mounted so again by each agent that comes.

    complete: what follows mounting (its propagation) has been done, too, since it was mounted.
    """

    path: str
    options: str = ""
    read_only: bool = False
    fsck: str = "auto"
    propagation: str = ""
    by: str = ""
    complete: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesystemRecord:
    """The filesystem on a volume, and how far its making has come.

    made: "found" (it was there before this attachment), "begun" (mkfs was started: the volume held
    nothing when it was), "made" (and its root directory has its owner and mode; records of version
    1 say "owned" then).
    """

    type: str
    made: str
    owner: str = ""
    mode: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttachRecord:
    """One attachment of one volume to this machine.

    export: the name that is asked of the server, with the lease's secret. epoch: the lease's; 0
    without one. device: the name that it got last. sockets: inode numbers of the connections that
    the kernel was given. explicit: whether it was asked for by itself, so that it outlives its
    mounts. too_small: why its filesystem could not grow to fill its device, for people.
    """

    id: str
    volume: str
    volume_uuid: str
    driver: str
    created: str
    read_only: bool = False
    export: str
    epoch: int = 0
    address: str
    size: int = 0
    flags: int = 0
    request_timeout_s: int
    dead_timeout_s: int
    sockets: tuple[int, ...] = ()
    device: str = ""
    explicit: bool = False
    too_small: str = ""
    filesystem: FilesystemRecord | None = None
    mounts: tuple[MountRecord, ...] = ()
    state: str = ATTACHED

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> AttachRecord:
        """Rebuild a record; members that are not known are ignored.

        Raises:
            ValueError: it is no record, or of a version not known here.
        """
        if not isinstance(value, dict) or value.get("version") not in READ_VERSIONS:
            raise ValueError(f"not a record of version {VERSION}")
        members = _known(cls, value)
        try:
            members["mounts"] = tuple(
                MountRecord(**_known(MountRecord, mount)) for mount in members.get("mounts", ())
            )
            members["sockets"] = tuple(members.get("sockets", ()))
            if members.get("filesystem") is not None:
                found = _known(FilesystemRecord, members["filesystem"])
                members["filesystem"] = FilesystemRecord(**found)
            return cls(**members)
        except TypeError as error:
            raise ValueError(str(error)) from error


def _known(kind: type[Any], value: Any) -> dict[str, Any]:
    """Keep the members that a class has; TypeError if there are none, since it is no object."""
    if not isinstance(value, dict):
        raise TypeError(f"not a {kind.__name__}: {value!r:.80}")
    known = {field.name for field in dataclasses.fields(kind)}
    return {name: member for name, member in value.items() if name in known}


def new_id() -> str:
    """Make the id of an attachment."""
    return secrets.token_hex(8)


class Records:
    """The state directory, held from `open` to `close`. Calls are durable when they return."""

    def __init__(self, directory: Path, lock: int) -> None:
        self.directory = directory
        self._lock = lock
        self.agent_id = self._load_agent_id()

    @classmethod
    def open(cls, directory: Path, *, patience_s: float = 0.0) -> Records:
        """Take hold of a state directory, which is made if there is none.

        Raises:
            Busy: another process holds it, and still does after `patience_s`.
            DeviceError: it cannot be made or read.
        """
        try:
            (directory / "attachments").mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            directory.chmod(DIRECTORY_MODE)
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        except OSError as error:
            raise DeviceError(
                f"the agent's state directory {directory} cannot be used: {error.strerror}"
            ) from error
        deadline_s = time.monotonic() + patience_s
        while not _locked(lock):
            if time.monotonic() >= deadline_s:
                os.close(lock)
                raise Busy(f"another agent, or a command, is at work with {directory}: try again")
            time.sleep(LOCK_RETRY_S)
        return cls(directory, lock)

    def close(self) -> None:
        """Let the directory go."""
        os.close(self._lock)

    def load(self) -> list[AttachRecord]:
        """Read all records, and remove what was being written when the machine stopped.

        Raises:
            DeviceError: a record cannot be understood.
        """
        records = []
        for path in sorted((self.directory / "attachments").iterdir()):
            if path.suffix == ".new":
                path.unlink()
            elif path.suffix == ".json":
                records.append(read_record(path))
        return records

    def path(self, record: AttachRecord) -> Path:
        """Name the file of a record."""
        return self.directory / "attachments" / f"{record.id}.json"

    def save(self, record: AttachRecord) -> None:
        """Write a record."""
        write_durably(self.path(record), record.to_json())

    def remove(self, record: AttachRecord) -> None:
        """Forget a record; nothing if it is not there."""
        remove_durably(self.path(record))

    def _load_agent_id(self) -> str:
        path = self.directory / "agent.json"
        try:
            return str(json.loads(path.read_text())["id"])
        except FileNotFoundError:
            agent_id = secrets.token_hex(4)
            write_durably(path, {"version": AGENT_VERSION, "id": agent_id})
            return agent_id
        except (ValueError, KeyError, TypeError) as error:
            raise DeviceError(f"{path} holds no agent's id ({error}): restore it") from error


def _locked(descriptor: int) -> bool:
    """Take a lock if it is free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_record(path: Path) -> AttachRecord:
    """Read one record.

    Raises:
        DeviceError: it cannot be understood.
    """
    try:
        return AttachRecord.from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise DeviceError(
            f"the record {path} cannot be read ({error}): it is of another version of nbdstore, "
            "or damaged; move it away if the volume is not attached on this machine"
        ) from error


def write_durably(path: Path, value: dict[str, Any]) -> None:
    """Make JSON the content of a file: after a crash it holds this, or what it held before."""
    fresh = path.with_suffix(".new")
    with _created(fresh) as descriptor:
        data = json.dumps(value, indent=1).encode()
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    fresh.rename(path)
    _sync_directory(path.parent)


def remove_durably(path: Path) -> None:
    """Remove a file, for good on return; nothing if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    _sync_directory(path.parent)


@contextlib.contextmanager
def _created(path: Path) -> Iterator[int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    descriptor = os.open(path, flags, FILE_MODE)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
