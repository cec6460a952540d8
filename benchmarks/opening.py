"""Measure what opening costs: the time until a client has its export, and memory after use."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import fio
from benchmarks.model import Sample, Stage
from benchmarks.scale import MIB
from benchmarks.server import Server
from benchmarks.tools import Tools


def open_time(server: Server, stage: Stage, tools: Tools) -> Sample:
    """Stop the server, start it, and be its first client."""
    server.stop()
    took_s = server.start(stage.transport)
    return Sample(took_s, details={"memory MiB": server.memory_bytes() / MIB})


@dataclass(frozen=True)
class Memory:
    """Start the server, visit each volume, use the first one, and look at its memory.

    Attributes:
        job: the job of fio that uses it.
    """

    job: str
    is_scattered: bool = False

    def __call__(self, server: Server, stage: Stage, tools: Tools) -> Sample:
        server.stop()
        server.start(stage.transport)
        for volume in range(stage.n_volumes):
            server.attach(volume)
        fio.FioJob(self.job, is_scattered=self.is_scattered)(server, stage, tools)
        return Sample(server.memory_bytes() / MIB)
