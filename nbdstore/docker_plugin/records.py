"""What Docker was promised, on disk: a file for each volume, written before it is acted upon.

``DIR/volumes/NAME.json``, version 1::

    name, options, created      as given to Create, and when
    made                        the uuid of the volume that the plugin made, and so may delete; ""
                                for a volume that was there
    state                       "creating": there was no volume, and making one was begun; "ready"
    users                       the mount IDs that Docker has named and not taken back
    boot                        the boot during which those were named: none outlives it

and ``DIR/mounts/NAME`` is where a volume is mounted. Docker is never asked what it uses: while it
starts it waits for the plugin, and would wait for itself.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

from nbdstore.agent.records import remove_durably, write_durably
from nbdstore.docker_plugin.options import VolumeOptions
from nbdstore.errors import Busy, DeviceError

VERSION: Final = 1
CREATING, READY = "creating", "ready"
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolumeRecord:
    """A volume that Docker knows; see the module."""

    name: str
    options: VolumeOptions
    created: str
    made: str
    state: str
    users: tuple[str, ...] = ()

    @classmethod
    def new(cls, name: str, options: VolumeOptions) -> Self:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(name=name, options=options, created=created, made="", state=CREATING)


class Records:
    """The records in a directory, which belongs to one plugin at a time.

    Raises:
        Busy: another plugin has it.
        DeviceError: a record cannot be understood.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for name in ("volumes", "mounts"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._lock = (directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise Busy(
                f"another plugin uses {directory}: stop it, or give another --state"
            ) from None
        self._boot = BOOT_ID.read_text().strip()
        self._records: dict[str, VolumeRecord] = {}
        try:
            for path in sorted((directory / "volumes").glob("*.json")):
                record = self._read(path)
                self._records[record.name] = record
        except DeviceError:
            self._lock.close()
            raise

    def _read(self, path: Path) -> VolumeRecord:
        try:
            value = json.loads(path.read_text())
            if value.pop("version") != VERSION:
                raise ValueError("another version")
            if value.pop("boot") != self._boot:
                value["users"] = []
            value["options"] = VolumeOptions(**value["options"])
            value["users"] = tuple(value["users"])
            return VolumeRecord(**value)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DeviceError(
                f"the record {path} cannot be read ({error}): it is of another version of "
                "nbdstore, or damaged; move it away, and create the volume again without a size"
            ) from error

    def close(self) -> None:
        """Let another plugin have the directory."""
        self._lock.close()

    def mount_path(self, name: str) -> Path:
        """Name the directory where a volume is mounted."""
        return self._directory / "mounts" / name

    def get(self, name: str) -> VolumeRecord | None:
        return self._records.get(name)

    def all(self) -> list[VolumeRecord]:
        return list(self._records.values())

    def save(self, record: VolumeRecord) -> VolumeRecord:
        """Write a record; durable on return."""
        value: dict[str, Any] = {"version": VERSION, "boot": self._boot}
        value |= dataclasses.asdict(record)
        write_durably(self._path(record.name), value)
        self._records[record.name] = record
        return record

    def remove(self, name: str) -> None:
        """Forget a record; durable on return."""
        remove_durably(self._path(name))
        self._records.pop(name, None)

    def _path(self, name: str) -> Path:
        return self._directory / "volumes" / f"{name}.json"
