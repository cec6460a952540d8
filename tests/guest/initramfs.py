"""The guest's first root: busybox, the kernel's modules and two scripts, as a cpio archive.

Knows the archive's format ("newc", the kernel's Documentation/driver-api/early-userspace/
buffer-format.rst); what the scripts do stands in init.sh and agent.sh.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from tests.guest.kernel import Kernel

DIRECTORIES = ("bin", "dev", "proc", "sys", "modules", "lower", "upper", "root")
SCRIPTS = Path(__file__).parent

Entry = tuple[str, int, bytes]  # name, mode, content


def write_initramfs(path: Path, kernel: Kernel) -> None:
    """Write the archive that boots ``kernel`` to ``path``."""
    busybox = shutil.which("busybox")
    assert busybox, "the test that boots a guest requires busybox"
    modules = kernel.modules
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in DIRECTORIES]
    entries += [program("bin/busybox", Path(busybox))]
    entries += [program("init", SCRIPTS / "init.sh"), program("agent.sh", SCRIPTS / "agent.sh")]
    entries += [program(f"modules/{module.name}", module) for module in modules]
    order = "".join(f"{module.name}\n" for module in modules)
    entries.append(("modules/load-order", stat.S_IFREG | 0o644, order.encode()))
    path.write_bytes(archive(entries))


def program(name: str, source: Path) -> Entry:
    return name, stat.S_IFREG | 0o755, source.read_bytes()


def archive(entries: Iterable[Entry]) -> bytes:
    """Put the entries into a cpio archive; a directory must come before what it holds."""
    out = bytearray()
    for inode, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        path = name.encode() + b"\0"
        uid = gid = mtime = major = minor = rmajor = rminor = check = 0
        n_links = 1
        header = [inode, mode, uid, gid, n_links, mtime, len(content)]
        header += [major, minor, rmajor, rminor, len(path), check]
        out += b"070701" + b"".join(b"%08x" % number for number in header) + path
        pad(out)
        out += content
        pad(out)
    return bytes(out)


def pad(out: bytearray) -> None:
    """Headers and contents start at multiples of four."""
    out += bytes(-len(out) % 4)
