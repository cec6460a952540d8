"""Where a run was made: what it ran on, with which versions, of which commit.

Figures without these are hearsay, so every report carries them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.peers import ROOT, Peer

PACKAGES_FILE: Final = Path(__file__).parent / "debian-packages.txt"
_LIBRARIES: Final = ("uvloop", "numpy", "xxhash", "aiohttp", "click")
_ADMIN_DIRECTORIES: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def find_admin_programs() -> None:
    """Put the administrator's programs into PATH: mkfs.ext4 is not in every user's."""
    parts = os.environ.get("PATH", os.defpath).split(os.pathsep)
    missing = [directory for directory in _ADMIN_DIRECTORIES if directory not in parts]
    os.environ["PATH"] = os.pathsep.join(parts + missing)


def why_missing(name: str) -> str | None:
    """Say why this machine lacks ``name`` (a program, a path, or "root"); None if it has it."""
    if name == "root":
        return None if os.geteuid() == 0 else "needs root"
    if name.startswith("/"):
        if os.access(name, os.R_OK):
            return None
        return "this host's kernel has no nbd driver" if "nbd" in name else f"needs {name}"
    if shutil.which(name):
        return None
    package = packages_by_program().get(name)
    return f"{name} is not installed" + (f" (Debian package {package})" if package else "")


def packages_by_program() -> dict[str, str]:
    """Which Debian package brings which program, from the list that installs them."""
    lines = re.findall(r"^([\w.+-]+)\s+#(.*)$", PACKAGES_FILE.read_text(), re.MULTILINE)
    return {program: package for package, programs in lines for program in programs.split()}


def describe(disk: Path) -> dict[str, str]:
    """The machine, and the disk that ``disk`` lies on."""
    facts = {
        "processor": f"{_cpu_model()}, {os.cpu_count()} CPUs",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / (1 << 30):.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
        "filesystem": _first_line(
            ["findmnt", "--noheadings", "--output", "FSTYPE,SOURCE,OPTIONS", "--target", str(disk)]
        ),
        "load before": load(),
    }
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.exists():
        facts["frequency governor"] = governor.read_text().strip()
    return facts


def load() -> str:
    """The load average of the last minute."""
    return f"{os.getloadavg()[0]:.2f}"


def is_busy() -> bool:
    """Whether others use this machine so much that figures mean little."""
    return os.getloadavg()[0] > 0.3 * (os.cpu_count() or 1)


def versions(peers: Sequence[Peer]) -> dict[str, str]:
    """The versions of all that is measured and measured with."""
    found = {
        "fio": _first_line(["fio", "--version"]),
        "nbdcopy": _first_line(["nbdcopy", "--version"]),
        "python": platform.python_version(),
    }
    found |= {name: importlib.metadata.version(name) for name in _LIBRARIES}
    for peer in peers:
        if peer.checkout:
            found[peer.name] = commit(peer.checkout)
        else:
            found[peer.name] = _first_line([*peer.version])
    return found


def commit(checkout: Path) -> str:
    """The commit of a checkout; "-dirty" if it holds changes."""
    return _first_line(
        [
            "git",
            "-C",
            str(checkout),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=40",
            "--exclude=*",
        ]
    )


def this_commit() -> str:
    return commit(ROOT)


def _first_line(argv: Sequence[str]) -> str:
    """What a program says first; "unknown" if there is no such program, or it fails."""
    try:
        done = subprocess.run(
            argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False, timeout=30
        )
    except FileNotFoundError:
        return "unknown"
    lines = done.stdout.decode(errors="replace").split("\n")
    return " ".join(lines[0].split()) if done.returncode == 0 and lines[0] else "unknown"


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return found[1] if found else platform.machine()
