"""Mounted filesystems: what is mounted where, mounting and unmounting.

Reads /proc/self/mountinfo (proc(5)) and never looks at a mount point itself: a look at one whose
device waits for its server would wait, too. Knows devices by number, nothing of volumes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdstore.agent import programs
from nbdstore.errors import Busy, DeviceError, InvalidArgument

MOUNTINFO = Path("/proc/self/mountinfo")
PROPAGATIONS = ("private", "rprivate", "slave", "rslave", "shared", "rshared")
READ_ONLY = frozenset({"ro", "emergency_ro"})
"""Options; newer kernels say the latter of a filesystem that errors have made read-only."""
UNMOUNT_TIMEOUT_S = 60.0
"""Unmounting writes out what is dirty; it waits as long as the server is away."""


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo. root: what of the filesystem is mounted, "/" for all of it.

    read_only: this mount, or the filesystem as a whole, as the kernel makes it after errors.
    """

    device: tuple[int, int]
    root: str
    path: str
    type: str
    source: str
    shared: bool
    read_only: bool


def parse(text: str) -> list[Mount]:
    """Read the lines of mountinfo, in their order: a later mount lies over an earlier one."""
    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        _, _, device, root, path, options, *optional = before.split(" ")
        kind, source, *of_filesystem = after.split(" ")
        major, _, minor = device.partition(":")
        mounts.append(
            Mount(
                (int(major), int(minor)),
                _unescaped(root),
                _unescaped(path),
                kind,
                _unescaped(source),
                any(field.startswith("shared:") for field in optional),
                not READ_ONLY.isdisjoint(",".join((options, *of_filesystem)).split(",")),
            )
        )
    return mounts


def _unescaped(text: str) -> str:
    """Undo the octal escapes of blanks and backslashes."""
    raw = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), os.fsencode(text))
    return os.fsdecode(raw)


def mounts() -> list[Mount]:
    """List what is mounted in this mount namespace."""
    return parse(MOUNTINFO.read_text(errors="surrogateescape"))


def mounts_of(device: tuple[int, int]) -> list[Mount]:
    """List where a device is mounted."""
    return [mount for mount in mounts() if mount.device == device]


def mounted_at(path: str) -> Mount | None:
    """Return what is mounted at a path, the uppermost."""
    found = [mount for mount in mounts() if mount.path == path]
    return found[-1] if found else None


def checked_path(path: str) -> str:
    """Return the path of a mount point as mountinfo will have it: absolute, without links.

    Raises:
        InvalidArgument: it is not absolute, or is the root directory.
    """
    if not path.startswith("/"):
        raise InvalidArgument(f"'{path}' is no mount point: give an absolute path")
    real = os.path.realpath(path)
    if real == "/":
        raise InvalidArgument("a volume cannot be mounted over the root directory")
    return real


def mount(source: str, path: str, kind: str, options: Sequence[str]) -> None:
    """Mount a filesystem; the mount point is made if there is none.

    Raises:
        DeviceError: mount(8) failed.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeviceError(f"the mount point {path} cannot be made: {error.strerror}") from error
    chosen = ("-o", ",".join(options)) if options else ()
    programs.run("mount", "-t", kind, *chosen, "--", source, path)


def propagate(path: str, propagation: str) -> None:
    """Set how what is mounted at a path, or below it, is seen by other mount namespaces.

    Raises:
        DeviceError: mount(8) failed.
    """
    programs.run("mount", f"--make-{propagation}", "--", path)


def unmount(path: str, *, lazily: bool = False, timeout_s: float = UNMOUNT_TIMEOUT_S) -> None:
    """Unmount what is mounted at a path; with `lazily`, let go of it even while it is in use.

    Raises:
        Busy: files on it are in use.
        ProgramTimeout: it waits for its device.
        DeviceError: umount(8) failed.
    """
    arguments = ("--lazy", "--", path) if lazily else ("--", path)
    done = programs.run("umount", *arguments, accept=range(256), timeout_s=timeout_s)
    if done.status == 0:
        return
    if "busy" in done.output:
        raise Busy(
            f"{path} is in use: end the programs that have files open there "
            f"('fuser -vm {path}' names them), and try again"
        )
    raise DeviceError(f"umount {path} failed: {' '.join(done.output.split())}")
