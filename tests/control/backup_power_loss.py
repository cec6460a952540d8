"""Backups that break off: both ends lose their power, again and again, until all has come.

Owns one seed: a chain of snapshots in one pool, their way into another one, and what may be there
at any moment of it.  Each pool has a simulated disk of its own; both live in virtual time::

    python -m tests.control.backup_power_loss --seed 1000 --count 1000

What may be there after a crash is backup_model.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import replace
from typing import Any, Final
from unittest import mock

from nbdstore.control.stream import Buffer
from nbdstore.errors import AlreadyExists, BadStream, InvalidArgument, NbdstoreError, WrongBase
from nbdstore.store import Pool
from tests.control.backup_model import (
    Known,
    Oracle,
    Sent,
    half_received,
    is_left_over,
    known_at,
)
from tests.control.backup_pools import BLOCK, Changing, Site
from tests.control.sums import assert_all_adds_up
from tests.seeds import main
from tests.store import virtual_clock
from tests.store.crashes import KILLED, Crash, crash_images, killed_at
from tests.store.power_loss import assert_clean, new_pool
from tests.store.simulated_disk import PLACE, Images, SimulatedDisk, adversarial

CAPACITY: Final = 24 << 20
SECTOR: Final = 512
N_CRASHES: Final = 4
"""Moments of each life of the receiver at which its power fails for a look."""


# -- the pool that sends -----------------------------------------------------------------------


class Sender:
    """A pool with a chain of snapshots, which is written while it sends, and dies now and then.

    Attributes:
        chain: its snapshots, the oldest first.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._disk = SimulatedDisk(new_pool(BLOCK, CAPACITY))
        self._site: Site | None = None
        self.chain: list[Sent] = []
        virtual_clock.run(self._make())

    async def _make(self) -> None:
        rng, here = self._rng, await self._open()
        await here.pool.create_volume("db", rng.randint(20, 200) * BLOCK)
        changing = Changing(here, "db", rng.randrange(1 << 30))
        for number in range(rng.randint(2, 4)):
            if number and rng.random() < 0.4:
                await changing.resize(rng.randint(20 * 8, 200 * 8) * SECTOR)
            await changing.change(rng.randint(1, 8))
            name = f"db@{number}"
            await here.snapshot(name)
            self.chain.append(Sent(name, here.uuid(name), await here.content(name)))
        await here.pool.close()

    async def _open(self) -> Site:
        return Site(await Pool.open(PLACE, adversarial(), host=self._disk.host))

    async def begin(self) -> None:
        """Open the pool, in the loop that runs now."""
        self._site = await self._open()

    async def die(self) -> None:
        """Lose the power, and come up again."""
        assert self._site is not None
        await ended(self._site.pool)
        moment = len(self._disk.events)
        images = crash_images(self._disk, moment, Crash.random(self._rng), self._rng)
        self._disk = SimulatedDisk(images, self._rng.randrange(1 << 30))
        await self.begin()

    async def end(self) -> None:
        """Close the pool."""
        assert self._site is not None
        await self._site.pool.close()

    def assert_clean(self) -> None:
        """Assert that a check of the closed pool finds nothing."""
        assert_clean(self._disk.images)

    async def stream(self, name: str, since: str | None) -> AsyncGenerator[Buffer, None]:
        """Send a snapshot."""
        assert self._site is not None
        async for buffer in self._written(self._site.backups.send(name, since)):
            yield buffer

    async def rest(self, token: str) -> AsyncGenerator[Buffer, None]:
        """Go on with one."""
        assert self._site is not None
        async for buffer in self._written(self._site.backups.resume(token)):
            yield buffer

    async def _written(
        self, frames: AsyncGenerator[list[Buffer], None]
    ) -> AsyncGenerator[Buffer, None]:
        """Pass a stream on; meanwhile the volume is written."""
        assert self._site is not None
        changing = Changing(self._site, "db", self._rng.randrange(1 << 30))
        async with contextlib.aclosing(frames):
            async for frame in frames:
                if self._rng.random() < 0.1:
                    await changing.change(1)
                for buffer in frame:
                    yield buffer


async def ended(pool: Pool) -> None:
    """End what runs in a pool, as the death of its process does."""
    tasks = [*pool._tasks]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# -- receiving ---------------------------------------------------------------------------------


class Receiver:
    """One life of the pool that receives."""

    def __init__(
        self,
        there: Site,
        sender: Sender,
        oracle: Oracle,
        known: Known,
        rng: random.Random,
        figures: Counter[str],
    ) -> None:
        self._there = there
        self._disk: Any = there.pool._core.disk
        self._sender = sender
        self._chain = oracle.chain
        self._known = known
        self._rng = rng
        self._figures = figures
        self._tokens: list[str] = []

    def _know(self, **news: Any) -> None:
        self._known = replace(self._known, **news)
        self._disk.mark(self._known)

    async def run(self, *, safely: bool = False) -> None:
        """Go on until all has come; `safely` without anything that can go wrong."""
        if self._known.strayed:
            await self._straighten()
        neighbour = asyncio.create_task(self._write_beside())
        try:
            while self._known.n < len(self._chain):
                await (self._receive("") if safely else self._do_something())
            await self._give_up()  # does nothing but let the volume be used, if it cannot be yet
        finally:
            neighbour.cancel()
            await asyncio.gather(neighbour, return_exceptions=True)

    async def _write_beside(self) -> None:
        """Somebody else uses the pool."""
        pool = self._there.pool
        volume = pool.volumes.get("beside") or await pool.create_volume("beside", 64 * BLOCK)
        while True:
            await asyncio.sleep(self._rng.choice((0, 0.001, 0.1)))
            await volume.write(self._rng.randrange(63) * BLOCK, self._rng.randbytes(BLOCK))
            if self._rng.random() < 0.3:
                await volume.flush()
            elif self._rng.random() < 0.1:
                await pool.checkpoint()

    async def _do_something(self) -> None:
        ways = (self._receive, self._receive_wrong, self._give_up, self._stray)
        (way,) = self._rng.choices(ways, (10, 2, 1, 1))
        if way == self._receive:
            await self._receive(self._rng.choice(("", "cut", "cut", "cut", "died", "flipped")))
        else:
            await way()

    # -- what comes -------------------------------------------------------------------------

    async def _receive(self, fault: str) -> None:
        """Take the next one in, by what goes on or from the beginning."""
        half = half_received(self._there)
        if half is not None:
            self._tokens.append(half.token)
        if half is not None and self._rng.random() < 0.6:
            source = self._sender.rest(half.token)
            self._figures["resumed"] += 1
        else:
            source = self._next()
        position = half.position if half else 0
        self._know(on_its_way=True, position=position)
        try:
            await self._take(source, fault)
        except (BadStream, InvalidArgument) as error:
            if not fault:
                raise AssertionError("what is whole was refused") from error
            self._note_what_is_there()
            self._figures["broken off"] += 1
        else:
            assert fault != "flipped", "damage was not noticed"
            self._has_come()
        if fault == "died":
            await self._sender.die()
            self._figures["senders that died"] += 1

    def _has_come(self) -> None:
        self._know(n=self._known.n + 1, position=0, on_its_way=False, left_over=False)
        self._figures["received"] += 1

    def _note_what_is_there(self) -> None:
        half = half_received(self._there)
        self._know(
            position=half.position if half else 0,
            on_its_way=half is not None,
            left_over=is_left_over(self._there),
        )

    def _next(self) -> AsyncGenerator[Buffer, None]:
        n = self._known.n
        return self._sender.stream(self._chain[n].name, self._chain[n - 1].name if n else None)

    async def _take(self, source: AsyncGenerator[Buffer, None], fault: str) -> None:
        async with contextlib.aclosing(source):
            await self._there.backups.receiving.receive("db", self._on_the_way(source, fault))

    async def _on_the_way(
        self, source: AsyncGenerator[Buffer, None], fault: str
    ) -> AsyncIterator[Buffer]:
        """What a network makes of a stream: chunks of any length, and it may end anywhere."""
        rng, is_hurt = self._rng, False
        left = rng.randint(1, len(self._chain[self._known.n].content) + 1000)
        most = rng.choice((50, 5000, 70_000))
        async for buffer in source:
            for at in range(0, len(buffer), most):
                chunk = bytes(buffer[at : at + most])
                if fault == "flipped" and not is_hurt and left <= len(chunk):
                    chunk, is_hurt = chunk[:-1] + bytes([chunk[-1] ^ 4]), True
                elif fault in ("cut", "died") and left < len(chunk):
                    yield chunk[:left]
                    if rng.random() < 0.5:
                        raise InvalidArgument("the stream was not sent whole")
                    return
                left -= len(chunk)
                yield chunk
        if fault == "flipped" and not is_hurt:
            yield b"!"

    # -- what is refused --------------------------------------------------------------------

    async def _receive_wrong(self) -> None:
        """What does not fit is refused, and nothing changes."""
        chain, n = self._chain, self._known.n
        there, half = self._there, half_received(self._there)
        if self._tokens and self._rng.random() < 0.5:
            await self._receive_old_token()
            return
        streams = [(later.name, chain[n].name) for later in chain[n + 1 :]]
        streams += [(sent.name, None) for sent in chain[:n]]
        if half is not None or n:
            streams += [(later.name, None) for later in chain[n + 1 :]]
        if not streams or is_left_over(there):
            return
        name, since = self._rng.choice(streams)
        before = await there.content("db") if "db" in there.pool.volumes else None
        try:
            await self._take(self._sender.stream(name, since), "")
        except (WrongBase, AlreadyExists):
            pass
        else:
            raise AssertionError(f"{name} since {since} was received after {n}, {half}")
        assert half_received(there) == half
        after = await there.content("db") if "db" in there.pool.volumes else None
        assert before == after, "what was refused has changed the volume"
        self._figures["refused"] += 1

    async def _receive_old_token(self) -> None:
        """Go on with what some token of the past says: it fits, or it is refused."""
        half = half_received(self._there)
        self._know(on_its_way=True, position=half.position if half else 0)
        n = self._known.n
        try:
            await self._take(self._sender.rest(self._rng.choice(self._tokens)), "")
        except (WrongBase, AlreadyExists):
            assert half_received(self._there) == half
            self._note_what_is_there()
            self._figures["refused"] += 1
        else:
            assert self._chain[n].name in self._there.pool.snapshots
            self._has_come()

    async def _give_up(self) -> None:
        if half_received(self._there) is None and not is_left_over(self._there):
            return
        self._know(going=True)
        await self._there.backups.receiving.abort("db")
        self._know(going=False, on_its_way=False, left_over=False, position=0)
        self._figures["given up"] += 1

    async def _stray(self) -> None:
        """Somebody writes to the volume: what builds on the last snapshot does not fit any more."""
        if not self._known.n or self._there.operations.volume("db").importing:
            return
        self._know(strayed=True)
        volume = self._there.pool.volumes["db"]
        await volume.write(0, b"\xee" * BLOCK)
        try:
            await self._take(self._next(), "")
        except WrongBase:
            self._figures["refused"] += 1
        else:
            raise AssertionError("what was written was overwritten")
        await self._straighten()

    async def _straighten(self) -> None:
        pool = self._there.pool
        last = pool.snapshots[self._chain[self._known.n - 1].name]
        await pool.rollback(pool.volumes["db"], last)
        self._know(strayed=False)


# -- one seed ----------------------------------------------------------------------------------


@contextlib.contextmanager
def small_steps(rng: random.Random) -> Iterator[None]:
    """Frames of some blocks, and a note of what is there after each, or never."""
    frame, save = rng.choice((1, 3, 20)) * BLOCK, rng.choice((1, 50_000, 1 << 30))
    with (
        mock.patch("nbdstore.control.sending.PIECE_BYTES", frame),
        mock.patch("nbdstore.control.sending._BATCH_BYTES", 2 * frame),
        mock.patch("nbdstore.control.receiving._SAVE_BYTES", save),
        mock.patch("nbdstore.control.receiving._SAVE_S", 1e9),
    ):
        yield


class _Seed:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._figures = Counter[str]()
        self._sender = Sender(self._rng)
        chain = self._sender.chain  # a receiver need not have all of it
        chosen = sorted(self._rng.sample(range(len(chain)), self._rng.randint(2, len(chain))))
        self._oracle = Oracle([chain[number] for number in chosen])

    def run(self) -> Counter[str]:
        """Receive with crashes, then without any."""
        images: Images = {n: bytearray(raw) for n, raw in new_pool(BLOCK, CAPACITY).items()}
        disk, known = SimulatedDisk(images), Known()
        with small_steps(self._rng):
            for _ in range(self._rng.randint(1, 3)):
                disk, known = self._life(disk, known)
            self._live(disk, known, safely=True)
        known = Known(n=len(self._oracle.chain))
        assert_clean(disk.images)
        self._sender.assert_clean()
        self._look(SimulatedDisk(disk.images), known)
        return self._figures

    def _life(self, disk: SimulatedDisk, known: Known) -> tuple[SimulatedDisk, Known]:
        """Receive; die at some moments; return what the last one has left."""
        rng = self._rng
        since = len(disk.events)
        self._live(disk, known)
        moments = sorted(rng.randint(since, len(disk.events)) for _ in range(N_CRASHES))
        for moment in moments:
            then, crash = known_at(disk, moment, known), Crash.random(rng)
            is_kill = rng.random() < 0.3
            if is_kill:
                crash, after = KILLED, killed_at(disk, moment, rng.randrange(1 << 30))
            else:
                after = SimulatedDisk(crash_images(disk, moment, crash, rng), rng.randrange(9999))
            self._figures["kills" if is_kill else "crashes"] += 1
            try:
                found = self._look(after, then)
            except BaseException as error:
                error.add_note(f"event {moment} of {len(disk.events)}: {crash}, known: {then}")
                raise
        return after, found

    def _live(self, disk: SimulatedDisk, known: Known, *, safely: bool = False) -> None:
        async def live() -> None:
            pool = await Pool.open(PLACE, adversarial(), host=disk.host)
            await self._sender.begin()
            receiver = Receiver(
                Site(pool), self._sender, self._oracle, known, self._rng, self._figures
            )
            await receiver.run(safely=safely)
            await self._sender.end()
            await (pool.close() if safely else ended(pool))

        virtual_clock.run(live())

    def _look(self, disk: SimulatedDisk, known: Known) -> Known:
        """Assert that what a crash has left may be; the pool is closed, or killed again."""
        assert_clean(disk.images)

        async def look() -> Known:
            pool = await Pool.open(PLACE, adversarial(), host=disk.host)
            found = await self._oracle.look(Site(pool), known)
            await assert_all_adds_up(pool)
            await (pool.close() if self._rng.random() < 0.5 else ended(pool))
            return found

        found = virtual_clock.run(look())
        assert_clean(disk.images)
        return found


def run_seed(seed: int) -> Counter[str]:
    """Run one seed; return figures."""
    try:
        return _Seed(seed).run()
    except NbdstoreError as error:
        raise AssertionError(f"seed {seed}: {error}") from error


if __name__ == "__main__":
    main("tests.control.backup_power_loss", run_seed)
