"""The carrier of a world: takes snapshots to another pool, and back, while everything else goes on.

Owns the transfers: which snapshot, full or since another one, gone on with or given up, and where
they break off: in the pipe, or since either end dies or is restarted.  What is there then is told
by received.py.  A chain that has come back becomes a volume like others, and has clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdstore.control.stream import Buffer
from nbdstore.errors import NbdstoreError, NoSpace, NotFound
from nbdstore.store import Snapshot
from tests.simulation.oracle import Wrong
from tests.simulation.pipe import Pipe
from tests.simulation.pool_process import PoolProcess, ProcessDied
from tests.simulation.received import Received, Sent, look
from tests.simulation.snapshots import key_of
from tests.simulation.vault import Vault
from tests.simulation.world_loop import is_ghost

if TYPE_CHECKING:
    from nbdstore.control.backups import Backups
    from tests.simulation.world import World

Frames = AsyncGenerator[list[Buffer], None]

_MOST_RESTORED: Final = 3
_MOST_KEPT: Final = 6
"""Volumes of the vault."""
_MOMENTS_S: Final = (0.0, 0.01, 0.1)
"""Between two transfers."""
_PAUSES_S: Final = (0.0, 0.0001, 0.002, 0.05)
"""Of what sends, now and then."""
_CUT_BYTES: Final = (300, 5000, 50_000, 1_000_000)


@dataclass
class _Restoring:
    """A chain on its way back."""

    chain: list[Sent]
    kept: Received
    received: Received


class Carrier:
    """Carries one thing after the other, until he is told to stop.

    Attributes:
        figures: of transfers.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(world.random.random())
        self._left = world.plan.n_transfers
        self._kept: dict[int, Received] = {}
        self._restoring: _Restoring | None = None
        self._n_restored = 0
        self.vault = Vault(world)
        self.figures = Counter[str]()
        self.stopped = False

    async def run(self) -> None:
        while self._left > 0 and not self.stopped:
            await asyncio.sleep(self._random.choice(_MOMENTS_S))
            if self.stopped or not self._world.is_up:
                continue
            try:
                await self._random.choice((self._store, self._restore))()
            except ProcessDied:
                await self._world.until_up()
            except NbdstoreError as error:
                self._world.trace.note("carrier: refused:", type(error).__name__)
                self.figures["transfers refused"] += 1

    # --- To the vault ------------------------------------------------------------------------

    async def _store(self) -> None:
        there = await self.vault.up()
        here = self._world.process
        if not self._world.is_up or here.is_stopping:
            return
        snapshot = self._world.snapshots.choose(self._random)
        content = None if snapshot is None else self._world.snapshots.known[key_of(snapshot)]
        if snapshot is None or content is None:
            return
        received = self._kept.get(snapshot.volume.id)
        if received is not None and (received.coming or received.marked):
            await self._go_on(here, there, received)
            return
        sent = Sent(snapshot.info.name, snapshot.info.uuid, content)
        base = self._base(snapshot, received)
        if base is None:
            received = self._shelf(snapshot.volume.id)
        if received is not None and sent.name not in [one.name for one in received.have]:
            frames = _backups(here).send(snapshot.name, base)
            await self._transfer(here, frames, there, received, sent)

    def _base(self, snapshot: Snapshot, received: Received | None) -> str | None:
        """The snapshot that the vault has last of the volume, if it is there yet."""
        if received is None or not received.have or self._random.random() < 0.1:
            return None
        base = snapshot.volume.snapshots.get(received.have[-1].name)
        return None if base is None or base.info.uuid != received.have[-1].uuid else base.name

    def _shelf(self, volume_id: int) -> Received | None:
        """A new volume of the vault, if there is room."""
        if len(self.vault.received) >= _MOST_KEPT:
            return None
        name = f"kept{len(self.vault.received)}"
        received = Received(name, self._world.plan.spread)
        self.vault.received[name] = self._kept[volume_id] = received
        return received

    # --- And back ----------------------------------------------------------------------------

    async def _restore(self) -> None:
        there = await self.vault.up()
        here = self._world.process
        if not self._world.is_up or here.is_stopping:
            return
        way = self._restoring or self._begin_restoring()
        if way is None:
            return
        received, n = way.received, len(way.received.have)
        if received.coming or received.marked:
            await self._go_on(there, here, received)
        elif n < len(way.chain):
            sent = way.chain[n]
            base = f"{way.kept.name}@{way.chain[n - 1].name}" if n else None
            frames = _backups(there).send(f"{way.kept.name}@{sent.name}", base)
            await self._transfer(there, frames, here, received, sent)
        else:
            self._put_to_use(received)

    def _begin_restoring(self) -> _Restoring | None:
        full = [kept for kept in self.vault.received.values() if kept.have]
        if not full or self._n_restored >= _MOST_RESTORED or not self._world.has_room:
            return None
        self._n_restored += 1
        kept = self._random.choice(full)
        numbers = range(len(kept.have))
        chosen = sorted(self._random.sample(numbers, self._random.randint(1, len(numbers))))
        received = Received(f"restored{self._n_restored}", self._world.plan.spread)
        self._world.received[received.name] = received
        self._restoring = _Restoring([kept.have[number] for number in chosen], kept, received)
        return self._restoring

    def _put_to_use(self, received: Received) -> None:
        """All has come: it is a volume as others are from now on."""
        self._restoring = None
        del self._world.received[received.name]
        volume = self._world.pool.volumes[received.name]
        for sent in received.have:
            self._world.snapshots.known[volume.id, sent.name] = sent.content
        self._world.adopt(volume.id, received.name, received.have[-1].content)
        self.figures["volumes restored"] += 1

    # --- Transfers ---------------------------------------------------------------------------

    async def _go_on(self, here: PoolProcess, there: PoolProcess, received: Received) -> None:
        """Go on with what broke off, or give it up."""
        receiving = _backups(there).receiving
        if received.coming is not None and self._random.random() < 0.7:
            with contextlib.suppress(NotFound):  # the snapshot is not there any more
                frames = _backups(here).resume(receiving.show(received.name).token)
                self.figures["transfers resumed"] += 1
                await self._transfer(here, frames, there, received, received.coming)
                return
        received.going = True
        self._world.trace.note("carrier: gives up", received.name)
        await there.ask(receiving.abort(received.name))
        self.figures["transfers given up"] += 1
        await self._look(there, received)

    async def _transfer(
        self, here: PoolProcess, frames: Frames, there: PoolProcess, received: Received, sent: Sent
    ) -> None:
        """Send a snapshot until it has come, or that breaks off."""
        self._left -= 1
        self._world.trace.note("carrier:", sent.name, "into", received.name, "of", there.name)
        received.coming = sent
        cut = self._random.randint(1, self._random.choice(_CUT_BYTES))
        if self._random.random() < 0.6:
            cut = 0
        if self._random.random() < 0.3:
            vault = there if there is not self._world.process else here
            self.vault.let_die(vault, self._random.choice((20, 100, 400)))
        pipe = Pipe()
        pumping = here.stream(self._pump(frames, pipe, cut))
        hearing = asyncio.ensure_future(_hear_of_death(here, pipe))
        try:
            await there.ask(_backups(there).receiving.receive(received.name, pipe.chunks()))
        except NbdstoreError as error:
            self._check_reason(error, pipe, is_cut=bool(cut) or not here.alive or here.is_stopping)
            self.figures["transfers broken off"] += 1
        else:
            self._has_come(received, sent)
        finally:
            pipe.end()
            hearing.cancel()
            await _ended(pumping, here)
        await self._look(there, received)

    def _has_come(self, received: Received, sent: Sent) -> None:
        received.have.append(sent)
        received.coming, received.position, received.marked = None, 0, False
        self.figures["transfers received"] += 1
        self._world.trace.note("carrier: has come")

    def _check_reason(self, error: NbdstoreError, pipe: Pipe, *, is_cut: bool) -> None:
        """Assert that there was a reason to break off."""
        self._world.trace.note("carrier: broken off:", type(error).__name__)
        in_trouble = self._world.plan.trouble or self._world.process.is_stopping
        if not (is_cut or in_trouble or pipe.error or isinstance(error, NoSpace)):
            raise Wrong(f"what was whole was refused: {error}") from error

    async def _pump(self, frames: Frames, pipe: Pipe, cut: int) -> None:
        """Pass on what is sent, in chunks of any length; `cut` after so many bytes, 0 = never."""
        rng, n_bytes = random.Random(self._random.random()), 0
        most, pause = rng.choice((50, 5000, 70_000)), rng.choice(_PAUSES_S)
        try:
            async with contextlib.aclosing(frames):
                async for buffer in _buffers(frames):
                    for at in range(0, len(buffer), most):
                        await pipe.put(buffer[at : at + most])
                        n_bytes += most
                        if cut and n_bytes >= cut:
                            return
                        if pause and rng.random() < 0.2:
                            await asyncio.sleep(pause)
        except BrokenPipeError:
            pass
        except NbdstoreError as error:
            pipe.error = error
        finally:
            if not is_ghost():
                pipe.end()

    async def _look(self, there: PoolProcess, received: Received) -> None:
        """Compare what is there with what may be."""

        async def found() -> None:
            assert there.pool is not None
            volume = there.pool.volumes.get(received.name)
            received.compare(None if volume is None else await look(volume, received.spread))

        await there.ask(found())


async def _buffers(frames: Frames) -> AsyncGenerator[bytes, None]:
    async for frame in frames:
        for buffer in frame:
            yield bytes(buffer)


async def _hear_of_death(process: PoolProcess, pipe: Pipe) -> None:
    await process.died.wait()
    pipe.end()


async def _ended(pumping: asyncio.Task[None], process: PoolProcess) -> None:
    """Wait for the end of what sends; of a dead process nobody waits for anything."""
    dead = asyncio.ensure_future(process.died.wait())
    await asyncio.wait([pumping, dead], return_when=asyncio.FIRST_COMPLETED)
    dead.cancel()
    if process.alive and not pumping.cancelled():
        pumping.result()


def _backups(process: PoolProcess) -> Backups:
    assert process.operations is not None
    return process.operations.backups
