"""What a process and its descendants cost: CPU time and memory, from /proc.

A server may fork for each connection (nbd-server does): the time of a child that has ended and was
waited for is in its parent's account.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Fields of /proc/PID/stat behind the command's name, proc(5): utime, stime, cutime, cstime.
_TIMES = slice(11, 15)


def tree(pid: int) -> list[int]:
    """The process `pid` and all that descend from it, children first."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in _read(task / "children").split():
            found += tree(int(child))
    return [*found, pid]


def cpu_s(pid: int) -> float:
    """CPU seconds, user and system, that `pid` and its descendants have used so far."""
    ticks = 0
    for process in tree(pid):  # children first: one that ends meanwhile is in its parent's account
        fields = _read(Path(f"/proc/{process}/stat")).rpartition(")")[2].split()
        ticks += sum(map(int, fields[_TIMES]))
    return ticks / _TICKS_PER_S


def memory_bytes(pid: int) -> int:
    """Proportional set size of `pid` and its descendants: what they share counts once."""
    total_kib = 0
    for process in tree(pid):
        found = re.search(r"^Pss:\s+(\d+) kB", _read(Path(f"/proc/{process}/smaps_rollup")), re.M)
        total_kib += int(found[1]) if found else 0
    return total_kib << 10


def _read(path: Path) -> str:
    """The text of a file of /proc; nothing if the process has ended."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
