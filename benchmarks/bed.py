"""What rows of one stage are measured on: every peer's disks, filled and aged, and its server.

Disks are made anew for each stage, so that no row finds what a row of another stage left. They
are made one peer after the other and measured in turns.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks.filling import fill
from benchmarks.model import LeftOut, Stage, Transport
from benchmarks.peers import Peer
from benchmarks.server import Server
from benchmarks.tools import FAULTS, Tools, end_if_interrupted, told
from tests.children import Children

# Beyond what is written: copies that copy-on-write makes, journals, what ext4 keeps for itself.
_SPACE_FACTOR: Final = 2.5
_SPARE_BYTES: Final = 256 << 20


def check_space(directory: Path, stage: Stage, n_peers: int) -> None:
    """Raise LeftOut if the disk is too small for all peers' volumes of `stage`."""
    written = stage.written_bytes * n_peers
    needed = written * _SPACE_FACTOR + _SPARE_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise LeftOut(f"needs {needed / 1e9:.0f} GB of free disk, there are {free / 1e9:.0f} GB")


def prepare(
    peer: Peer, stage: Stage, children: Children, directory: Path, credentials: Path, tools: Tools
) -> Server:
    """Make, fill and start one peer's server.

    Raises:
        FAULTS: it went wrong; nothing is left running.
    """
    server = peer.build(children, directory, credentials)
    try:
        server.create(stage)
        # Filled over the unix socket, whatever is measured: it is quicker, and always the same.
        server.start(Transport.UNIX)
        fill(server, stage, tools)
        if stage.transport is not Transport.UNIX:
            server.stop()
            server.start(stage.transport)
    except BaseException:
        server.close()
        raise
    return server


@contextlib.contextmanager
def bed(
    stage: Stage,
    peers: Sequence[Peer],
    directory: Path,
    credentials: Path,
    tools: Tools,
    failed: Callable[[Peer, str], None],
) -> Iterator[dict[str, Server]]:
    """The running servers of all peers that can be prepared, by name; gone afterwards.

    Arguments:
        directory: for the disks; made, and removed again.
        failed: told of each peer that cannot be prepared, and why.
    """
    directory.mkdir(parents=True)
    try:
        check_space(directory, stage, len(peers))
        with Children(directory) as children, contextlib.ExitStack() as stack:
            servers = {}
            for peer in peers:
                place = directory / peer.name
                try:
                    server = prepare(peer, stage, children, place, credentials, tools)
                except FAULTS as error:
                    failed(peer, told(error))
                    end_if_interrupted(error)
                    continue
                servers[peer.name] = server
                stack.callback(server.close)
            yield servers
    finally:
        shutil.rmtree(directory)
