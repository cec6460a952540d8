"""Measure how long it takes to trim a whole volume."""

from __future__ import annotations

import time

from benchmarks import fio
from benchmarks.filling import fill
from benchmarks.model import Sample, Stage
from benchmarks.server import Server
from benchmarks.tools import Tools


def trim_all(server: Server, stage: Stage, tools: Tools) -> Sample:
    """Trim the volume in requests of 1 GiB, one after the other; it is filled again before."""
    fill(server, stage, tools)
    before_s = server.cpu_s()
    began = time.monotonic()
    result = fio.run_nbd(server, "trim-all", {}, tools)
    took_s = time.monotonic() - began
    return Sample(took_s, result.operations, server.cpu_s() - before_s)
