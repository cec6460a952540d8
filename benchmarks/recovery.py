"""Measure recovery: kill the server with a journal of a given length, and start it again.

Only nbdstore keeps a journal. A server that is killed without one starts as if nothing had
happened, which is what the row of length 0 compares with.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from benchmarks import fio
from benchmarks.model import BenchmarkFailed, Sample, Stage
from benchmarks.peers import Nbdstore
from benchmarks.scale import MIB
from benchmarks.server import Server
from benchmarks.tools import Tools

_FIRST_WRITES: Final = 2000
_FILL_TIMEOUT_S: Final = 50.0  # a checkpoint every minute empties the journal


@dataclass(frozen=True)
class Recovery:
    """Kill and restart.

    Attributes:
        journal_bytes: how long the journal is at least when the server is killed.
    """

    journal_bytes: int

    def __call__(self, server: Server, stage: Stage, tools: Tools) -> Sample:
        assert isinstance(server, Nbdstore), "peers without a journal are left out of these rows"
        server.control().checkpoint()
        n_writes = self._write(server, tools)
        used = _journal_used(server)
        server.kill()
        took_s = server.start(stage.transport)
        return Sample(took_s, details={"journal MiB": used / MIB, "writes": n_writes})

    def _write(self, server: Nbdstore, tools: Tools) -> int:
        """Overwrite at random until the journal is long enough; return how many writes."""
        deadline = time.monotonic() + _FILL_TIMEOUT_S
        n_writes, n_next = 0, _FIRST_WRITES
        while (missing := self.journal_bytes - _journal_used(server)) > 0:
            if n_writes:
                n_next = 1 + int(missing * n_writes / (self.journal_bytes - missing))
            if time.monotonic() > deadline:
                raise BenchmarkFailed(f"the journal is {missing} bytes short after {n_writes}")
            options = {"number_ios": str(n_next), "end_fsync": "0"}
            n_writes += fio.run_nbd(server, "age", options, tools).operations
        return n_writes


def _journal_used(server: Nbdstore) -> int:
    return server.control().pool().journal["used"]
