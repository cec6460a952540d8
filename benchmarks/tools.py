"""What every way of measuring is handed: a place for files, a group of processes, the time."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.model import BenchmarkFailed
from benchmarks.scale import Scale
from nbdstore.errors import NbdstoreError
from tests.children import Children, CommandError

FAULTS: Final = (
    BenchmarkFailed,
    CommandError,
    NbdstoreError,
    OSError,
    subprocess.TimeoutExpired,
)
"""What may go wrong with one peer and lets the run go on with the others; it is told in the end."""


@dataclass(frozen=True)
class Tools:
    """For one run.

    Attributes:
        children: clients are run through it, so that none outlives the run.
        directory: for files that are the same for all peers.
        runtime_s: how long one sample takes, where that is for us to choose.
        pki_home: a home directory whose ``.pki/libnbd`` trusts the servers' certificates.
    """

    children: Children
    directory: Path
    scale: Scale
    runtime_s: float
    pki_home: Path


def end_if_interrupted(error: BaseException) -> None:
    """Raise KeyboardInterrupt if `error` came while a run was broken off, and so took its place.

    What is stopped and put away then may fail, and only that is seen by who lets the run go on.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        cause = cause.__context__


def told(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[-600:] or type(error).__name__
