"""What can be asked of the agent, and what it tells: plain values, also as JSON.

The same classes are used in this process, travel over the agent's socket, and are printed by the
command line. A reader ignores members that it does not know.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from nbdstore.agent import mounts
from nbdstore.agent.filesystems import FSCK_MODES, filesystem
from nbdstore.errors import InvalidArgument


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttachRequest:
    """Make a volume a block device of this machine.

    driver: "auto", "kernel" or "fuse". force: fence whoever holds the volume's lease now.
    """

    volume: str
    driver: str = "auto"
    read_only: bool = False
    force: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class MountRequest:
    """Mount a volume's filesystem, having attached the volume, and formatted it if it is new.

    filesystem: "" is what the volume holds, ext4 if nothing. options: of mount(8), with commas.
    owner: "UID:GID", and mode: octal, that the root directory gets when it is formatted. fsck:
    "auto" checks what is unclean, "never", or "repair" even if that may lose data. propagation: of
    the mount, as in "shared". size: bytes; creates the volume if there is none, 0 does not. by:
    who asks, a word for people.
    """

    volume: str
    path: str
    filesystem: str = ""
    options: str = ""
    read_only: bool = False
    owner: str = ""
    mode: str = ""
    fsck: str = "auto"
    propagation: str = ""
    driver: str = "auto"
    size: int = 0
    force: bool = False
    by: str = ""

    def checked(self) -> MountRequest:
        """Return the request with its path resolved.

        Raises:
            InvalidArgument: a value makes no sense.
        """
        if self.filesystem:
            filesystem(self.filesystem)
        if self.fsck not in FSCK_MODES:
            raise InvalidArgument(f"fsck is '{self.fsck}': give {', '.join(FSCK_MODES)}")
        if self.propagation not in ("", *mounts.PROPAGATIONS):
            known = ", ".join(mounts.PROPAGATIONS)
            raise InvalidArgument(f"the propagation is '{self.propagation}': give one of {known}")
        parse_owner(self.owner)
        parse_mode(self.mode)
        return dataclasses.replace(self, path=mounts.checked_path(self.path))


Request = TypeVar("Request", AttachRequest, MountRequest)


def from_json(kind: type[Request], value: object) -> Request:
    """Rebuild a request; InvalidArgument if it has other members, or of other types."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(value, dict) or not value.keys() <= fields.keys():
        raise InvalidArgument(f"a {kind.__name__} has {', '.join(fields)}, not {value!r:.200}")
    for name, member in value.items():
        if type(member).__name__ != fields[name].type:
            raise InvalidArgument(f"{name} is {member!r:.80}: it must be {fields[name].type}")
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in value
    ]
    if missing:
        raise InvalidArgument(f"a {kind.__name__} without {', '.join(missing)}")
    return kind(**value)


def parse_owner(text: str) -> tuple[int, int] | None:
    """Read ``UID:GID``; None of nothing."""
    if not text:
        return None
    uid, _, gid = text.partition(":")
    if not (uid.isascii() and uid.isdigit() and gid.isascii() and gid.isdigit()):
        raise InvalidArgument(f"'{text}' is no owner: give numbers, as in 999:999")
    return int(uid), int(gid)


def parse_mode(text: str) -> int | None:
    """Read an octal mode such as ``2775``; None of nothing."""
    if not text:
        return None
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise InvalidArgument(f"'{text}' is no mode: give it in octal, as in 2775")
    return mode


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttachmentStatus:
    """An attachment as it is now.

    state: "attached"; "waiting" (the server is away, requests wait); "fenced" (the lease is lost);
    "failed" (requests fail); "absent" (no device yet, or not mounted where it is wanted);
    "detaching". message: what there is to say about that. path: the device's node. mounts:
    {"path", "by", "read_only"} of each mount point.
    """

    volume: str
    path: str
    device: str
    driver: str
    state: str
    message: str
    size: int
    read_only: bool
    holder: str
    epoch: int
    since: str
    filesystem: str
    explicit: bool
    mounts: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> AttachmentStatus:
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: member for name, member in value.items() if name in known})
