"""Rows in an emulated machine: those through the kernel's nbd driver, where the kernel has none.

Shows that they work, with every peer. How fast, it cannot show: emulation takes twenty times the
CPU, more for an interpreter, and the servers' files are in the guest's memory.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import ROOT
from tests.children import Children
from tests.guest.guest import Guest

MEMORY_MIB = 3072
PATIENCE_S = 1800.0
DIRECTORY = "/run/benchmarks"
"""In the guest, which keeps in memory all that it writes."""


def run(rows: Sequence[str], peers: Sequence[str]) -> str:
    """Boot a guest and run `rows` there; return what was written, progress included.

    Raises:
        CommandError: something could not be measured; with what was written.
        GuestError: the guest failed.
    """
    with (
        tempfile.TemporaryDirectory() as directory,
        Children(Path(directory)) as children,
        Guest(children, Path(directory), memory_mib=MEMORY_MIB) as guest,
    ):
        return run_in(guest, *rows, "--peers", ",".join(peers))


def run_in(guest: Guest, *arguments: str) -> str:
    """Run the benchmarks at their smallest in `guest`."""
    command = [
        *(sys.executable, "-m", "benchmarks", "run", *arguments, "--smoke", "--runtime", "0.3"),
        *("--no-plots", "--disk", DIRECTORY, "--output", f"{DIRECTORY}/output"),
    ]
    return guest.run(
        f"mkdir -p {DIRECTORY}; cd {shlex.quote(str(ROOT))}\n{shlex.join(command)}",
        timeout_s=PATIENCE_S,
    )
