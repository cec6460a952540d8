"""The agent's memory where the kernel has nbd: in an emulated machine, with the server outside it.

Owns the guest and the server, and tells `benchmarks.agent` of them; measures nothing itself. The
guest has this machine's files, so what runs in it is this checkout.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

from tests.agent.served import Served
from tests.children import Children
from tests.clients.served_pool import ServedPool
from tests.guest.guest import HOST, Guest

ROOT = Path(__file__).parents[1]
MEMORY_MIB = 2048
# An attach takes half a second in an emulated machine, and more on a busy one.
PATIENCE_S = 300.0
PATIENCE_FOR_EACH_S = 3.0
SPARE_CONNECTIONS = 16


def measure_memory(n_volumes: int) -> str:
    """Run ``python -m benchmarks.agent memory`` in a guest, as root; return what it wrote.

    Raises:
        CommandError: it failed; with what it wrote.
        GuestError: the guest did.
    """
    # A guest's network is QEMU's, which has a descriptor here for each connection.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as directory, Children(Path(directory)) as children:
        pool = ServedPool(children, Path(directory))
        pool.create("--capacity", "2G", "--journal-size", "8M")
        most = str(n_volumes + SPARE_CONNECTIONS)
        served = Served(pool, Path(directory), "--max-connections", most)
        with Guest(children, Path(directory), memory_mib=MEMORY_MIB) as guest:
            written = guest.run(
                f"export PYTHONPATH={ROOT} NBDSTORE_SERVER=http://{HOST}:{served.control_port} "
                f"NBDSTORE_TOKEN_FILE={served.token_file} NBDSTORE_NBD={HOST}:{pool.port}\n"
                # Detaching takes as long again, and the guest's end does it at once.
                f"cd /run; {sys.executable} -m benchmarks.agent memory {n_volumes} --keep",
                timeout_s=PATIENCE_S + n_volumes * PATIENCE_FOR_EACH_S,
            )
        pool.close()
        return written
