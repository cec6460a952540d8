"""Filesystems on volumes: made once, checked when unclean, grown when the volume has grown.

Owns what ext4 and xfs need. Whether a volume may be formatted is not decided here, and never by
what stands on the device: a damaged filesystem looks like none. What is read from superblocks is
used to choose between checking, mounting and growing, all of which keep the data.

Superblock fields (the kernel's Documentation/filesystems/ext4/super.rst; XFS Algorithms & Data
Structures, "Superblocks"; offsets from the start of the device)::

    ext4, little-endian, at 1024:  +0x04 blocks (low 32 bits)   +0x18 log2(block size) - 10
          +0x38 magic 0xEF53       +0x3A state: 1 clean, 2 errors   +0x60 features: 4 = needs replay
          +0x150 blocks (high 32 bits, with feature 0x80)
    xfs, big-endian, at 0:         "XFSB"   +4 block size   +8 blocks (64 bits)
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Final, Protocol

from nbdstore.agent import programs
from nbdstore.errors import DeviceError, InvalidArgument

HEAD_BYTES: Final = 4096
EXT4_START: Final = 1024
EXT4_MAGIC: Final = 0xEF53
EXT4_CLEAN: Final = 0x1
EXT4_ERRORS: Final = 0x2
EXT4_RECOVER: Final = 0x4
EXT4_64BIT: Final = 0x80
CHECK_TIMEOUT_S: Final = 24 * 3600.0
"""Large filesystems take hours to check; whoever started it can see it run."""
FSCK_MODES: Final = ("auto", "never", "repair")

E2FSCK_REPAIRED: Final = (0, 1, 2)
"""Exit status (e2fsck(8)): nothing wrong, errors corrected, corrected and a reboot advised, which
is meant for the root filesystem."""
XFS_JOURNAL_IN_USE: Final = 2
XFS_REPAIRED: Final = 4
"""Exit statuses of xfs_repair(8): the journal must be replayed before, and, with -e, it has
repaired something."""
IN_NAMESPACE: Final = ("unshare", "--mount", "--propagation", "slave", "sh", "-c")
"""A shell whose mounts are its own: they cover nothing of anybody's, and end with it."""
REPLAY_XFS: Final = 'mount -t xfs -o nouuid -- "$0" /tmp && umount /tmp'
OWN: Final = """
mount -t "$1" -- "$0" /tmp && { [ -z "$2" ] || chown "$2" /tmp; } &&
{ [ -z "$3" ] || chmod "$3" /tmp; } && umount /tmp
"""


@dataclass(frozen=True)
class Superblock:
    """What a superblock says. type: "ext4" or "xfs". size: bytes of the filesystem."""

    type: str
    size: int
    clean: bool


class Damaged(DeviceError):
    """A filesystem needs a repair that may lose data."""


class Filesystem(Protocol):
    """One kind of filesystem; `path` is a device's node, `mountpoint` where it is mounted."""

    @property
    def mount_options(self) -> tuple[str, ...]:
        """What it is mounted with unless a person says otherwise."""

    @property
    def needed_options(self) -> tuple[str, ...]:
        """What it is mounted with in any case."""

    def make(self, path: str) -> None:
        """Format a device that holds nothing."""

    def check(self, path: str) -> None:
        """Put right what is wrong, and can be put right without a loss.

        Raises:
            Damaged: more is wrong.
        """

    def is_damaged(self, path: str) -> bool:
        """Tell whether there is something to repair; what `check` does may be done for that."""

    def repair(self, path: str) -> bool:
        """Put right what is wrong, even if that loses data; return whether anything was.

        Raises:
            DeviceError: that cannot be done.
        """

    def grow(self, path: str, mountpoint: str) -> None:
        """Let a mounted filesystem fill its device; nothing if it does. DeviceError: it cannot."""


class Ext4:
    """ext2, ext3 and ext4 alike; new ones are ext4."""

    mount_options = ("discard",)
    needed_options = ()

    def make(self, path: str) -> None:
        # A new volume reads as zeros, so there is nothing to discard and no table to clear.
        extended = "nodiscard,assume_storage_prezeroed=1"
        if programs.run("mkfs.ext4", "-q", "-E", extended, path, accept=(0, 1)).status == 1:
            # Before e2fsprogs 1.47 the option is unknown, which is refused before any write.
            programs.run("mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=1", path)

    def check(self, path: str) -> None:
        done = _run_check("e2fsck", "-p", path)
        if done.status not in E2FSCK_REPAIRED:
            raise Damaged(
                f"the filesystem on {path} needs repair that may lose data (e2fsck status "
                f"{done.status}): mount it with --fsck repair, which takes a snapshot before; "
                f"e2fsck said: {_shown(done)}"
            )

    def is_damaged(self, path: str) -> bool:
        try:
            self.check(path)
        except Damaged:
            return True
        return False

    def repair(self, path: str) -> bool:
        done = _run_check("e2fsck", "-y", path)
        if done.status not in E2FSCK_REPAIRED:
            raise DeviceError(
                f"the filesystem on {path} cannot be repaired (e2fsck status {done.status}); "
                f"e2fsck said: {_shown(done)}"
            )
        return done.status != 0

    def grow(self, path: str, mountpoint: str) -> None:
        done = programs.run("resize2fs", path, accept=range(256))
        if done.status:
            said = _shown(done)
            lacking = "" if "Permission denied" not in said else "it takes CAP_SYS_RESOURCE; "
            raise DeviceError(f"{lacking}resize2fs ended with status {done.status}: {said}")


class Xfs:
    """xfs: replays its journal when mounted, and is repaired only when a person asks for it."""

    mount_options = ("discard",)
    # Or of a volume and its clones one alone could be mounted on a machine, since the kernel takes
    # a uuid that is mounted already for the same disk by another path. That a disk is mounted by
    # one path is what leases are for. A uuid of its own would have to be written into each clone.
    needed_options = ("nouuid",)

    def make(self, path: str) -> None:
        programs.run("mkfs.xfs", "-q", "-K", path)

    def check(self, path: str) -> None:
        """Nothing: see above."""

    def is_damaged(self, path: str) -> bool:
        # Also if the journal is not empty: whether that is all, only a replay shows, which writes.
        return _run_check("xfs_repair", "-n", path).status != 0

    def repair(self, path: str) -> bool:
        done = _run_check("xfs_repair", "-e", path)
        if done.status == XFS_JOURNAL_IN_USE:
            replay = _run_check(*IN_NAMESPACE, REPLAY_XFS, path)
            done = _run_check("xfs_repair", "-e", path)
            if done.status == XFS_JOURNAL_IN_USE:
                raise DeviceError(
                    f"the xfs on {path} is not repaired, for its journal cannot be replayed "
                    f"({_shown(replay)}). The last resort: 'nbdstore attach' its volume, and run "
                    "'xfs_repair -L' on the device, which gives up what stands in the journal"
                )
        if done.status not in (0, XFS_REPAIRED):
            raise DeviceError(
                f"the xfs on {path} cannot be repaired (xfs_repair status {done.status}); "
                f"xfs_repair said: {_shown(done)}"
            )
        return done.status == XFS_REPAIRED

    def grow(self, path: str, mountpoint: str) -> None:
        programs.run("xfs_growfs", mountpoint)


def make(kind: str, path: str, owner: str = "", mode: str = "") -> None:
    """Format a device that holds nothing, and give the root directory its owner and mode.

    Arguments:
        owner: "UID:GID"; mode: octal; "" leaves it as mkfs makes it.

    Raises:
        DeviceError: that failed; what is on the device need not be whole.
    """
    filesystem(kind).make(path)
    if not (owner or mode):
        return
    # Before it is mounted where it is wanted: if that fails, and is tried again otherwise, it is a
    # filesystem that was there before, whose root is its owner's business.
    mode = mode and f"{int(mode, 8):o}"  # chmod(1) does not know of "0o755", and adds "+755"
    done = programs.run(*IN_NAMESPACE, OWN, path, kind, owner, mode, accept=range(256))
    if done.status:
        given = " and ".join(word for word in (owner, mode) if word)
        raise DeviceError(
            f"the root of the new filesystem on {path} cannot be given {given} ({_shown(done)}): "
            "mount it without, and change that there"
        )


def _run_check(*argv: str) -> programs.Done:
    return programs.run(*argv, accept=range(256), timeout_s=CHECK_TIMEOUT_S)


def _shown(done: programs.Done) -> str:
    return " ".join(done.output.split())[-programs.MAX_SHOWN :]


FILESYSTEMS: Final[dict[str, Filesystem]] = {"ext4": Ext4(), "xfs": Xfs()}


def filesystem(kind: str) -> Filesystem:
    """Return the filesystem of a name; InvalidArgument if it is none that can be made."""
    try:
        return FILESYSTEMS[kind]
    except KeyError:
        names = " and ".join(FILESYSTEMS)
        raise InvalidArgument(
            f"'{kind}' is no filesystem that volumes are formatted with: {names} are"
        ) from None


def parse_superblock(head: bytes) -> Superblock | None:
    """Read a superblock from the first HEAD_BYTES of a device; None if there is none known."""
    if head[:4] == b"XFSB":
        block_size, n_blocks = struct.unpack_from(">IQ", head, 4)
        # Whether the journal is empty cannot be told from here; mounting replays it in any case.
        return Superblock("xfs", block_size * n_blocks, True)
    if len(head) >= EXT4_START + 1024:
        (magic, state) = struct.unpack_from("<HH", head, EXT4_START + 0x38)
        if magic == EXT4_MAGIC:
            return _ext4(head, state)
    return None


def _ext4(head: bytes, state: int) -> Superblock:
    (low,) = struct.unpack_from("<I", head, EXT4_START + 0x04)
    (log_size,) = struct.unpack_from("<I", head, EXT4_START + 0x18)
    (features,) = struct.unpack_from("<I", head, EXT4_START + 0x60)
    (high,) = struct.unpack_from("<I", head, EXT4_START + 0x150)
    n_blocks = low | (high << 32 if features & EXT4_64BIT else 0)
    clean = bool(state & EXT4_CLEAN) and not state & EXT4_ERRORS and not features & EXT4_RECOVER
    return Superblock("ext4", n_blocks << (10 + min(log_size, 6)), clean)


def read_superblock(path: str) -> Superblock | None:
    """Read the superblock of a device; DeviceError if the device cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return parse_superblock(os.pread(descriptor, HEAD_BYTES, 0))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DeviceError(f"{path} cannot be read: {error.strerror}") from error
