"""What volumes hold before they are measured."""

from __future__ import annotations

from benchmarks import fio, page_cache
from benchmarks.model import Filling, Stage
from benchmarks.server import Server
from benchmarks.tools import Tools


def fill(server: Server, stage: Stage, tools: Tools) -> None:
    """Write to the first volume what the stage says that it holds, and age it."""
    match stage.filling:
        case Filling.WHOLE:
            fio.run_nbd(server, "fill-in-order", {}, tools)
        case Filling.SCATTERED:
            options = {"zonerange": str(stage.spacing_bytes), "number_ios": str(stage.n_scattered)}
            fio.run_nbd(server, "fill-scattered", options, tools)
        case Filling.MAPPED:
            server.map_whole()
        case Filling.NOTHING:
            pass
    if stage.aging_writes:
        fio.run_nbd(server, "age", {"number_ios": str(stage.aging_writes)}, tools)
    if stage.n_snapshots:
        server.keep_snapshots(stage.n_snapshots)
        # It was restarted, and has its map in memory again once all was read.
        fio.run_nbd(server, "sequential-read-1m", {"time_based": None, "runtime": None}, tools)
    page_cache.sync(server.files())
