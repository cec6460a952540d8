"""Measure through the Linux kernel's nbd driver, on hosts that have it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import devices, fio
from benchmarks.model import Sample, Stage, Unit
from benchmarks.server import Server
from benchmarks.tools import Tools


@dataclass(frozen=True)
class KernelJob:
    """Measure with a job of fio on a block device, past the client's page cache."""

    job: str
    unit: Unit = Unit.IOPS

    def __call__(self, server: Server, stage: Stage, tools: Tools) -> Sample:
        with devices.kernel(server, tools) as device:
            options: fio.Options = {
                "runtime": fio.milliseconds(tools.runtime_s),
                "uri": None,
                "ioengine": "libaio",
                "direct": "1",
                "filename": str(device),
            }
            before_s = server.cpu_s()
            result = fio.run(tools.children, self.job, options, env={}, as_nobody=False)
            return fio.sample(result, self.unit, server.cpu_s() - before_s)
