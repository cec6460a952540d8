"""What the agent itself costs: time for an attach, memory for a thousand of them.

``python -m benchmarks.agent time`` (as root, with a server's control URL in NBDSTORE_SERVER)
attaches and mounts new volumes and tells how long each took, and how much of that was spent in
other programs (mkfs, mount, losetup): the rest is the agent's own, and should be under 300 ms.

``python -m benchmarks.agent memory 1000`` starts an agent, has it attach so many new volumes, and
tells what its process takes while it watches them; it should stay under 100 MiB. The server must
allow as many connections, and the kernel must have nbd; with ``--guest``, both are started, the
kernel in an emulated machine, where everything takes 20 times as long, but as much memory (see
`agent_in_a_guest`). With ``--keep`` the volumes stay attached.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click

from benchmarks import process
from nbdstore.agent import programs
from nbdstore.agent.api import AgentClient
from nbdstore.agent.local import LocalAgent, Setting, open_agent
from nbdstore.agent.requests import AttachRequest, MountRequest
from nbdstore.control.client import ControlClient

N_ROUNDS = 10
WATCHED_S = 20.0
READY_EVERY_S = 0.05
SIZE = 1 << 30
SMALL = 1 << 20


def token() -> str | None:
    """Read the token for the server's control API, if it wants one."""
    path = os.environ.get("NBDSTORE_TOKEN_FILE")
    return Path(path).read_text().strip() if path else None


@contextmanager
def agent(directory: str) -> Iterator[LocalAgent]:
    token_file = os.environ.get("NBDSTORE_TOKEN_FILE")
    setting = Setting(
        state=Path(directory) / "state",
        control_url=os.environ["NBDSTORE_SERVER"],
        token=token(),
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


@contextmanager
def agent_process(directory: Path) -> Iterator[tuple[AgentClient, int]]:
    """Run ``nbdstore agent``; yield who asks it, and its process id.

    When it ends it leaves what is attached as it is.
    """
    places = ("--state", str(directory / "state"), "--socket", str(directory / "agent.sock"))
    client = AgentClient(directory / "agent.sock")
    words = ("-m", "nbdstore", "agent", "--driver", "kernel", "--keep", "--log-level", "warning")
    with subprocess.Popen([sys.executable, *words, *places]) as running:
        try:
            while not client.reachable():
                if running.poll() is not None:
                    sys.exit("the agent did not start")
                time.sleep(READY_EVERY_S)
            yield client, running.pid
        finally:
            running.terminate()


def memory_mib(pid: int, field: str) -> float:
    """Return VmRSS (now) or VmHWM (at its peak) of a process."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found
    return int(found[1]) / 1024


def measure_memory(n_volumes: int, *, keep: bool) -> None:
    """Print what an agent's process takes with so many idle attachments."""
    control = ControlClient(os.environ["NBDSTORE_SERVER"], token=token())
    names = [f"bench-{os.getpid()}-{n}" for n in range(n_volumes)]
    with (
        tempfile.TemporaryDirectory() as directory,
        agent_process(Path(directory)) as (client, pid),
    ):
        print(f"without any: {memory_mib(pid, 'VmRSS'):.1f} MiB", flush=True)
        begun_s = time.monotonic()
        for name in names:
            control.create_volume(name, SMALL)
            client.attach(AttachRequest(volume=name))
        print(f"{n_volumes} attached in {time.monotonic() - begun_s:.0f} s", flush=True)
        states = Counter(status.state for status in client.status())
        assert states == {"attached": n_volumes}, states
        begun_s, begun_cpu_s = time.monotonic(), process.cpu_s(pid)
        time.sleep(WATCHED_S)
        busy = (process.cpu_s(pid) - begun_cpu_s) / (time.monotonic() - begun_s)
        now, peak = memory_mib(pid, "VmRSS"), memory_mib(pid, "VmHWM")
        print(f"{n_volumes} attachments: {now:.1f} MiB, {peak:.1f} MiB at the peak")
        print(f"watching them takes {busy:.1%} of a processor", flush=True)
        if keep:
            return
        begun_s = time.monotonic()
        for name in names:
            client.detach(name)
            control.delete_volume(name)
        print(f"all detached in {time.monotonic() - begun_s:.0f} s")


@click.group()
def main() -> None:
    """Measure the agent; see benchmarks/README.md."""


@main.command("time")
def time_() -> None:
    """Tell what mounting a new volume takes, and how much of that is the agent's own."""
    measure_time()


@main.command()
@click.argument("n_volumes", type=click.IntRange(min=1))
@click.option("--keep", is_flag=True, help="Leave the volumes attached.")
@click.option("--guest", is_flag=True, help="Do it in an emulated machine, whose kernel has nbd.")
def memory(n_volumes: int, keep: bool, guest: bool) -> None:
    """Tell what N_VOLUMES idle attachments cost the agent's process."""
    if guest:
        from benchmarks import agent_in_a_guest

        click.echo(agent_in_a_guest.measure_memory(n_volumes), nl=False)
    else:
        measure_memory(n_volumes, keep=keep)


if __name__ == "__main__":
    main()
