"""How much memory the server takes: next to nothing when idle, under 1 GiB with 100 TiB to serve.

What costs memory is the map: 16 bytes for each block in use, in leaves that map 1 MiB each. The
usual run writes one block to every leaf that 1 GiB of files and the metadata of a filesystem of
1 TiB use, so the map grows to what it would be; `make memory-test` writes that 1 GiB in full.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from nbdstore.control.client import ControlClient
from tests.children import Children
from tests.clients.libnbd import nbdsh
from tests.clients.served_pool import ServedPool

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

FULL = os.environ.get("NBDSTORE_MEMORY_TEST") == "full"
N_VOLUMES = 100

WRITE = """
source = random.Random(1)
connections = []
for n in range(N_VOLUMES):
    connection = nbd.NBD()
    connection.connect_uri(URI.replace("NAME", f"volume-{n}"))
    connections.append(connection)

# As ext4 does: files in one place, metadata of every group of 2 GiB.
metadata = [(n << 31, 4096) for n in range(512)]
files = [(n << 20, 1 << 20 if FULL else 4096) for n in range(1024)]
data = {length: nbd.Buffer.from_bytearray(bytearray(source.randbytes(length)))
        for length in (4096, 1 << 20)}
for connection in connections:
    in_flight = []
    for offset, length in metadata + files:
        in_flight.append(connection.aio_pwrite(data[length], offset))
        while len(in_flight) >= 32:
            connection.poll(-1)
            in_flight = [c for c in in_flight if not connection.aio_command_completed(c)]
    while in_flight:
        connection.poll(-1)
        in_flight = [c for c in in_flight if not connection.aio_command_completed(c)]
connections[0].flush()
"""


def memory(pool: ServedPool, field: str) -> int:
    """Return a field of the server's /proc/PID/status, in bytes: VmRSS now, VmHWM at its peak."""
    assert pool.process
    status = Path(f"/proc/{pool.process.pid}/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.M)
    assert found
    return int(found[1]) << 10


@pytest.fixture
def empty(children: Children, tmp_path: Path) -> ServedPool:
    """A pool without volumes, of a capacity that needs a large free map."""
    pool = ServedPool(children, tmp_path)
    pool.create("--capacity", "200G")
    return pool


@pytest.mark.requires("nbdinfo")
def test_an_idle_server_stays_under_80_mib(empty: ServedPool, children: Children) -> None:
    empty.start()
    children.run("nbdinfo", "--list", empty.uri(""))
    assert memory(empty, "VmRSS") < 80 * MIB
    empty.close()


@pytest.mark.requires("nbdsh")
@pytest.mark.timeout(7200 if FULL else 900)
def test_a_hundred_volumes_of_1_tib_stay_under_1_gib(
    empty: ServedPool, children: Children, tmp_path: Path
) -> None:
    if FULL and shutil.disk_usage(tmp_path).free < 110 * GIB:
        pytest.skip(f"{tmp_path} has less than 110 GiB of free space")
    empty.start()
    control = ControlClient(f"unix:{empty.directory}/control.sock")
    for n in range(N_VOLUMES):
        control.create_volume(f"volume-{n}", TIB)
    constants = {"N_VOLUMES": N_VOLUMES, "FULL": FULL, "URI": empty.unix_uri("NAME")}
    head = "".join(f"{name} = {value!r}\n" for name, value in constants.items())
    nbdsh(children, "", head + WRITE, timeout_s=3600 if FULL else 600)
    assert memory(empty, "VmHWM") < GIB

    empty.stop()
    empty.restart()
    for n in range(N_VOLUMES):
        children.run("nbdinfo", "--map", "--totals", empty.unix_uri(f"volume-{n}"))
    assert memory(empty, "VmHWM") < GIB
    empty.close()
