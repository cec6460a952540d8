"""Measure with nbdcopy: a whole volume out of a server, and into it."""

from __future__ import annotations

import random
import time
from pathlib import Path

from benchmarks.model import Sample, Stage
from benchmarks.scale import MIB
from benchmarks.server import Server
from benchmarks.tools import Tools


def copy_out(server: Server, stage: Stage, tools: Tools) -> Sample:
    """Read the whole volume with nbdcopy."""
    return _timed(server, stage, tools, server.uri(), "null:")


def copy_in(server: Server, stage: Stage, tools: Tools) -> Sample:
    """Overwrite the whole volume with nbdcopy, from a file in the page cache, and flush."""
    return _timed(server, stage, tools, "--flush", _image(tools, stage.size), server.uri())


def _timed(server: Server, stage: Stage, tools: Tools, *arguments: str | Path) -> Sample:
    before_s = server.cpu_s()
    began = time.monotonic()
    tools.children.run("nbdcopy", *arguments, timeout_s=600)
    took_s = time.monotonic() - began
    used_s = server.cpu_s() - before_s
    # Counted in MiB, since nbdcopy chooses the size of its requests.
    return Sample(stage.size / 1e6 / took_s, stage.size // MIB, used_s)


def _image(tools: Tools, size: int) -> Path:
    """A file of `size` random bytes, made once."""
    path = tools.directory / f"image-{size}"
    if not path.exists():
        piece = random.Random(size).randbytes(MIB)
        with path.open("wb") as file:
            for _ in range(size // MIB):
                file.write(piece)
    return path
