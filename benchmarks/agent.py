"""What the agent itself costs: time for an attach, memory for a thousand of them.

``python -m benchmarks.agent time`` (as root, with a server's control URL in NBDSTORE_SERVER)
attaches and mounts new volumes and tells how long each took, and how much of that was spent in
other programs (mkfs, mount, losetup): the rest is the agent's own, and should be under 300 ms.

``python -m benchmarks.agent memory 1000`` attaches so many volumes and watches them; it should stay
under 100 MiB. The server must allow as many connections, and the kernel must have nbd.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from nbdstore.agent import programs
from nbdstore.agent.local import LocalAgent, Setting, open_agent
from nbdstore.agent.requests import AttachRequest, MountRequest
from nbdstore.agent.watch import TICK_S, Watch

N_ROUNDS = 10
N_TICKS = 10
SIZE = 1 << 30
SMALL = 1 << 20


@contextmanager
def agent(directory: str) -> Iterator[LocalAgent]:
    token_file = os.environ.get("NBDSTORE_TOKEN_FILE")
    setting = Setting(
        state=Path(directory) / "state",
        control_url=os.environ["NBDSTORE_SERVER"],
        token=Path(token_file).read_text().strip() if token_file else None,
        token_file=Path(token_file) if token_file else None,
        nbd=os.environ.get("NBDSTORE_NBD", ""),
    )
    with open_agent(setting) as opened:
        yield opened


class Meter:
    """Sums up the time that `programs` spends in other programs."""

    def __init__(self) -> None:
        self.elapsed_s = 0.0

    def around(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.elapsed_s += time.perf_counter() - begun_s

        return timed


def measure_time() -> None:
    """Print, in milliseconds, what mounting a new volume takes."""
    totals, owns, cpu = [], [], []
    meter = Meter()
    with (
        tempfile.TemporaryDirectory() as directory,
        agent(directory) as opened,
        mock.patch.object(programs, "run", meter.around(programs.run)),
        mock.patch.object(programs, "start_detached", meter.around(programs.start_detached)),
    ):
        for n in range(N_ROUNDS):
            name, meter.elapsed_s = f"bench-{os.getpid()}-{n}", 0.0
            opened.server.control.create_volume(name, SIZE)
            begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
            opened.mount(MountRequest(volume=name, path=f"{directory}/mnt"))
            totals.append((time.perf_counter() - begun_s) * 1000)
            owns.append(totals[-1] - meter.elapsed_s * 1000)
            cpu.append((time.process_time() - begun_cpu_s) * 1000)
            opened.umount(name)
            opened.server.control.delete_volume(name)
    print(f"attach to mounted: median {statistics.median(totals):.0f} ms, of which the agent's own")
    print(f"median {statistics.median(owns):.0f} ms, worst {max(owns):.0f} ms; of that on the CPU")
    print(f"median {statistics.median(cpu):.0f} ms")


def peak_mib() -> float:
    """Return the largest resident memory that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(n_volumes: int) -> None:
    """Print the largest resident memory with so many idle attachments, and the watch's CPU time."""
    with tempfile.TemporaryDirectory() as directory, agent(directory) as opened:
        print(f"without any: {peak_mib():.0f} MiB")
        for n in range(n_volumes):
            opened.server.control.create_volume(f"bench-{n}", SMALL)
            opened.attach(AttachRequest(volume=f"bench-{n}"))
        watch = Watch(opened)
        watch.start()
        begun_s = time.process_time()
        time.sleep(N_TICKS * TICK_S)
        busy_s = time.process_time() - begun_s
        watch.stop()
        print(f"{n_volumes} attachments: {peak_mib():.0f} MiB, watching them takes")
        print(f"{busy_s / N_TICKS * 1000:.0f} ms of CPU each {TICK_S:g} s", flush=True)
        for n in range(n_volumes):
            opened.detach(f"bench-{n}")


if __name__ == "__main__":
    if sys.argv[1:] == ["time"]:
        measure_time()
    elif len(sys.argv) == 3 and sys.argv[1] == "memory" and sys.argv[2].isdigit():
        measure_memory(int(sys.argv[2]))
    else:
        sys.exit("say 'time', or 'memory' and a number of volumes")
