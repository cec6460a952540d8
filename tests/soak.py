"""``make soak SEED=... MINUTES=...``: the long tests, for as long as one likes.

Owns how the time is shared among the parts, and what a person sees of them.  Each part is a
program of its own that takes a seed and a number of minutes and tells how far it is; at a fault
it prints the command that replays it, and exits with 1::

    python -m tests.soak --seed 7 --minutes 60
    python -m tests.soak --minutes 5 --only simulation --only power-loss

Each part begins with the same seed; how far it gets in its time is up to the machine.  Parts run
side by side, as many as there are processors.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import time
from asyncio.subprocess import PIPE, STDOUT
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import click


@dataclass(frozen=True)
class Part:
    """One long test.

    Attributes:
        module: what to run.
        proves: what it proves, in a few words.
        share: of the time.
        options: what it takes beside the seed and the minutes.
    """

    module: str
    proves: str
    share: float = 1.0
    options: tuple[str, ...] = ()

    def command(self, seed: int, minutes: float) -> list[str]:
        """What to run, as an argument vector."""
        given = ("--seed", str(seed), "--minutes", f"{minutes:.2f}", *self.options)
        return [sys.executable, "-m", self.module, *given]


PARTS: Final = {
    "power-loss": Part("tests.store.power_loss", "no acknowledged flush is lost", share=2),
    "exhaustive": Part("tests.store.exhaustive", "every short sequence, crashed at every moment"),
    "faults": Part("tests.store.fault_sweep", "whatever call of the disk fails, nothing is lost"),
    "state-machine": Part("tests.store.state_machine", "a pool holds what bytearrays hold"),
    "backups": Part(
        "tests.control.backup_power_loss", "backups arrive, whoever dies on the way", share=0.5
    ),
    "simulation": Part("tests.simulation", "the whole server, in simulated worlds", share=2),
    "damage": Part("tests.store.damage", "damage is reported, and costs no more than it must"),
    "fuzz": Part("tests.fuzz", "no bytes of a peer do harm"),
    "kills": Part("tests.kills", "SIGKILL loses nothing that was acknowledged"),
    "backup-kills": Part("tests.kills.backups", "nor of what is on its way", share=0.5),
    "guest": Part("tests.kills.guest", "nor does it with the kernel's client"),
    "load": Part("tests.load", "200 connections, nobody starves, nothing grows"),
}

GRACE_S: Final = 300.0  # beyond its time, for a part to end by itself: a guest boots, a seed ends
_KEPT_LINES: Final = 60


@dataclass
class Outcome:
    """How a part ended.

    Attributes:
        status: of its process; None = it had to be killed.
        last: its last lines.
    """

    status: int | None = None
    seconds: float = 0.0
    last: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))

    @property
    def verdict(self) -> str:
        """In a few words."""
        if self.status is None:
            return "HUNG"
        return "ok" if self.status == 0 else "FAILED"


async def _run_part(name: str, command: list[str], limit_s: float) -> Outcome:
    """Run one part to its end, passing its lines on; kill it if it does not come to one."""
    outcome = Outcome()
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=PIPE,
        stderr=STDOUT,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(limit_s):
            async for raw in process.stdout:
                line = raw.decode(errors="replace").rstrip()
                outcome.last.append(line)
                click.echo(f"{name:>12} | {line}")
            outcome.status = await process.wait()
    except TimeoutError:
        click.echo(f"{name:>12} | did not end in {limit_s:.0f} s, killed")
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: the part and its children
            await process.wait()
    outcome.seconds = time.monotonic() - began
    return outcome


async def run_parts(
    parts: Mapping[str, Part],
    seed: int,
    minutes: float,
    n_processes: int,
    grace_s: float = GRACE_S,
) -> dict[str, Outcome]:
    """Run `parts` for `minutes` all together, `n_processes` side by side."""
    total = sum(part.share for part in parts.values())
    turns = asyncio.Semaphore(n_processes)

    async def run(name: str, part: Part) -> Outcome:
        async with turns:
            own = minutes * min(1.0, n_processes * part.share / total)
            return await _run_part(name, part.command(seed, own), own * 60 + grace_s)

    outcomes = await asyncio.gather(*(run(name, part) for name, part in parts.items()))
    return dict(zip(parts, outcomes, strict=True))


def _show(parts: Mapping[str, Part], outcomes: Mapping[str, Outcome], seed: int) -> None:
    click.echo("")
    for name, outcome in outcomes.items():
        summary = outcome.last[-1] if outcome.last else "no output"
        click.echo(f"{outcome.verdict:6}  {name:12}  {outcome.seconds:6.0f} s  {summary}")
    failed = [name for name, outcome in outcomes.items() if outcome.status != 0]
    for name in failed:
        click.echo(f"\n--- {name} ({parts[name].proves}): its last lines\n")
        click.echo("\n".join(outcomes[name].last))
    told = ", ".join(failed) if failed else "nothing"
    click.echo(f"\nseed {seed}: {told} failed")


@click.command()
@click.option("--seed", type=int, help="Of all that is random; chosen and told if not given.")
@click.option("--minutes", type=float, default=10.0, show_default=True, help="All parts together.")
@click.option("--only", type=click.Choice([*PARTS]), multiple=True, help="Just this part.")
@click.option("--processes", type=int, default=os.cpu_count(), show_default=True)
def main(seed: int | None, minutes: float, only: tuple[str, ...], processes: int) -> None:
    """Run the long tests: simulated crashes, real kills, damage, hostile clients, load."""
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    parts = {name: PARTS[name] for name in only or PARTS}
    click.echo(f"seed {seed}, {minutes:g} minutes: {', '.join(parts)}")
    outcomes = asyncio.run(run_parts(parts, seed, minutes, processes))
    _show(parts, outcomes, seed)
    sys.exit(any(outcome.status != 0 for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
