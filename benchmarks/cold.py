"""Measure reads that the page cache cannot serve."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import fio, page_cache
from benchmarks.model import Sample, Stage, Unit
from benchmarks.server import Server
from benchmarks.tools import Tools


@dataclass(frozen=True)
class ColdJob:
    """Drop the server's files from the page cache, then read, every block once at most."""

    job: str
    unit: Unit = Unit.IOPS

    def __call__(self, server: Server, stage: Stage, tools: Tools) -> Sample:
        page_cache.drop(server.files())
        options: fio.Options = {
            "time_based": None,
            "runtime": fio.milliseconds(tools.runtime_s),
        }
        before_s = server.cpu_s()
        result = fio.run_nbd(server, self.job, options, tools)
        return fio.sample(result, self.unit, server.cpu_s() - before_s)
