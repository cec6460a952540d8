"""One world: a server, its clients, a network, a disk, an administrator; one seed, one course.

Owns the course of things: it begins, the server dies and comes up again, what it comes up with is
compared with what may be left, everybody goes on, it ends.  At the end nothing may be left over: no
task, no connection, no held write, no finding of a check.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Coroutine, Iterator
from typing import Any, Final
from unittest import mock

import numpy as np

from nbdstore.errors import NbdstoreError, StoreError
from nbdstore.protocol.constants import Errno
from nbdstore.server.channel import Channel
from nbdstore.store import Pool, Volume
from tests.control.backup_power_loss import small_steps
from tests.simulation.administrator import MOST_EXPORTS, Administrator
from tests.simulation.carrier import Carrier
from tests.simulation.export import Export
from tests.simulation.jobs import Job
from tests.simulation.kept import Keeping
from tests.simulation.network import Network
from tests.simulation.oracle import CELL, History, Stamps, Wrong, stamps_of
from tests.simulation.plan import Plan
from tests.simulation.pool_process import Death, ProcessDied, new_pool
from tests.simulation.received import Received, look
from tests.simulation.server_process import ServerProcess
from tests.simulation.snapshots import Snapshots
from tests.simulation.trash import Trash
from tests.simulation.world_loop import Trace, WorldLoop, is_ghost
from tests.store.power_loss import assert_clean
from tests.store.simulated_disk import Images, SimulatedDisk

END_S: Final = 10_000.0
"""A world that has not ended after this hangs."""
SETTLED_S: Final = 1000.0
"""After this every end of a connection has heard of the other one's death."""


class World:
    """See the module.

    Attributes:
        exports: those that exist, by id.
        maybe_created: what volumes shall hold whose making has begun, by name.
        snapshots: what is known of them.
        trash: what is known of it.
        keeping: what is known of leases and limits.
        received: the volumes that backups are received into, by name; nobody uses them yet.
        carrier: who does that; None = nobody.
        process: the server, alive or dead.
        n_...: figures.
    """

    def __init__(self, seed: int, plan: Plan) -> None:
        loop = asyncio.get_running_loop()
        self.plan = plan
        self.random = random.Random(seed)
        self.trace = Trace(loop)
        self.network = Network(loop, self.trace, self.random.randrange(1 << 30), plan.weather)
        self.exports: dict[int, Export] = {}
        self.maybe_created: dict[str, Stamps] = {}
        self.snapshots = Snapshots(self)
        self.trash = Trash(self)
        self.keeping = Keeping(self)
        self.received: dict[str, Received] = {}
        self.carrier: Carrier | None = None
        self.process: ServerProcess
        self.n_answered = self.n_lost = self.n_resent = self.n_stalls = self.n_timeouts = 0
        self.n_attached = self.n_changes = self.n_refused = self.n_restarts = self.n_errors = 0
        self.n_killed = self.n_powerless = self.n_at_places = self.n_rollbacks = 0
        self.n_scrubs = 0
        self.remains: list[Images] = []
        """At the end: what is on the disk, and what could be if the power failed then."""
        self._serial = 0
        self._n_processes = 0
        self._failure: asyncio.Future[None] = loop.create_future()
        self._up = asyncio.Event()
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._jobs: list[asyncio.Task[None]] = []
        self._restarting = False
        self._loop = loop
        loop.set_exception_handler(self._on_loop_error)

    # --- For the inhabitants -----------------------------------------------------------------

    @property
    def pool(self) -> Pool:
        assert self.process.pool is not None
        return self.process.pool

    @property
    def is_up(self) -> bool:
        return self._up.is_set() and self.process.alive

    async def until_up(self) -> None:
        """Wait until the server serves."""
        while not self.is_up:
            await (asyncio.sleep(0.1) if self._up.is_set() else self._up.wait())

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task of an inhabitant; if it fails, the world does."""
        task = self._loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the world: something went wrong."""
        if not self._failure.done():
            self._failure.set_exception(error)

    @property
    def has_room(self) -> bool:
        """Whether there may be another volume."""
        return len(self.exports) + len(self.received) < MOST_EXPORTS

    def next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def volume(self, export: Export) -> Volume:
        """The volume of an export; it must exist."""
        return next(v for v in self.pool.volumes.values() if v.id == export.id)

    def history(self, volume_id: int) -> History:
        """What is known of a volume, in the trash or not."""
        export = self.exports.get(volume_id)
        return (export or self.trash.held[volume_id].export).history

    def allowed_errors(self, export: Export) -> set[int]:
        """The errors that there is a reason for now."""
        allowed: set[int] = set()
        if self.plan.trouble == "errors" or self.process.has_failed:
            allowed.add(Errno.EIO)
        if self.plan.may_fill:
            allowed.add(Errno.ENOSPC)
        if export.leaving or export.trashing or export.leasing or export.rolling_to is not None:
            allowed.add(Errno.ESHUTDOWN)
        return allowed

    # --- Exports -----------------------------------------------------------------------------

    def adopt(self, volume_id: int, name: str, content: Stamps) -> None:
        """A volume exists, and holds `content`: let it be used."""
        export = Export(self, volume_id, name, content, self.plan.spread)
        self.exports[volume_id] = export
        export.claim = self.keeping.claim(volume_id)
        export.machine.start()
        for _ in range(self.plan.n_jobs):
            self._jobs.append(self.start(Job(self, export, self.plan.n_requests).run()))

    def forget(self, export: Export) -> None:
        """A volume does not exist any more."""
        self.snapshots.volume_gone(export.id)
        self.exports.pop(export.id, None)
        export.machine.stop()

    # --- The server's lives ------------------------------------------------------------------

    async def _boot(self, disk: SimulatedDisk, *, lossless: bool) -> None:
        """Bring a server up on `disk`, however often it dies on the way."""
        while True:
            self._n_processes += 1
            self.process = process = ServerProcess(self, disk, self._n_processes)
            if self.random.random() < 0.15 and self.plan.actions["crash"]:
                process.plan(Death(self.random.random() < 0.7, self.random.randint(1, 60)))
            in_trouble = bool(self.plan.trouble) and self.random.random() < 0.3
            opening = process.start(process.open(in_trouble=in_trouble))
            await asyncio.wait([opening])
            if process.alive:
                error = opening.exception()
                if error is None:
                    break
                if not (in_trouble and isinstance(error, StoreError)):
                    raise error
                self.trace.note(process.name, "cannot open:", type(error).__name__)
                # If a sync has failed, nobody knows which pages the kernel has dropped.
                process.die(Death(power=self.plan.trouble == "broken"))
            self._count_death(process)
            lossless &= process.lossless
            disk = await process.remains()
        self._compare(process, lossless=lossless)
        await asyncio.wait([serving := process.start(process.serve())])
        serving.result()
        self._up.set()

    def _count_death(self, process: ServerProcess) -> None:
        assert process.death is not None
        self.n_powerless += process.death.power
        self.n_killed += not process.death.power
        self.n_at_places += process.death.place is not None

    async def supervise(self) -> None:
        """Bring the server up again whenever it dies; a pool that has failed is killed."""
        while True:
            if self._restarting:
                await asyncio.sleep(0.1)
                continue
            process = self.process
            dead = asyncio.ensure_future(process.died.wait())
            await asyncio.wait([dead], timeout=1.0)
            if not dead.done():
                dead.cancel()
                if process.has_failed and process.alive and not self._restarting:
                    process.die(Death(power=True))  # which pages the kernel dropped is not known
                continue
            if self._restarting:
                continue  # who restarts it sees to it
            self._up.clear()
            self.network.cut_all()
            self._count_death(process)
            disk = await process.remains()
            await self._settle()
            await asyncio.sleep(self.random.choice((0.0, 0.1, 3.0)))
            await self._boot(disk, lossless=process.lossless)

    async def restart(self) -> None:
        """Stop the server properly, and start it again."""
        process = self.process
        self._up.clear()
        self._restarting = True
        stopping = process.start(process.stop())
        await asyncio.wait([stopping])
        await asyncio.sleep(0)
        error = stopping.exception()
        if process.alive and process.has_failed:
            process.die(Death(power=True))
        if process.alive:
            if error is not None:
                raise error
            self.n_restarts += 1
            self.network.cut_all()
            disk = process.end()
        else:
            self.network.cut_all()
            self._count_death(process)
            disk = await process.remains()
        await self._settle()
        await self._boot(disk, lossless=process.lossless)
        self._restarting = False

    async def _settle(self) -> None:
        """Wait until all clients know that their connections are gone."""
        async with asyncio.timeout(SETTLED_S):
            while not all(link.client.closed for link in self.network.old_links):
                await asyncio.sleep(0.1)
        self.network.old_links.clear()

    def _compare(self, process: ServerProcess, *, lossless: bool) -> None:
        """Assert that what the server came up with is what may be left."""
        found = dict(process.found)
        self.snapshots.compare(process.found_snapshots, self.trace.now)
        for received in self.received.values():
            received.compare(process.found_received.get(received.name))
        for export in list(self.exports.values()):
            if export.id not in found:
                if export.trashing and export.id in process.found_trash:
                    continue
                if not export.leaving:
                    raise Wrong(f"volume {export.id} {export.names} is gone")
                self.forget(export)
                continue
            name, size, stamps = found.pop(export.id)
            if name not in export.names:
                raise Wrong(f"volume {export.id} is called {name}, not {export.names}")
            export.names, export.leaving, export.trashing = [name], False, False
            if export.rolling_to is not None and np.array_equal(stamps, export.rolling_to):
                export.begin_anew(stamps)
                continue
            sizes = {export.n_cells, export.resizing_to or export.n_cells}
            if size not in {n * CELL for n in sizes}:
                raise Wrong(f"volume {export.id} has {size} bytes, not {sizes} cells")
            export.history.cut(size // CELL)
            try:
                export.history.check_crash(stamps, self.trace.now, lossless=lossless)
            except Wrong as error:
                raise Wrong(f"volume {export.id}: {error}") from None
            export.begin_anew(stamps)
        self.trash.compare(process.found_trash, found)
        for volume_id, (name, size, stamps) in found.items():
            content = self.maybe_created.get(name)
            if content is None or len(content) * CELL != size or (stamps != content).any():
                raise Wrong(f"volume {volume_id} {name} of {size} bytes comes from nowhere")
            self.adopt(volume_id, name, content)
        self.maybe_created.clear()
        self.keeping.compare(process.found_kept)
        self.trace.note("up", process.name, len(process.found), "volumes")

    # --- The course --------------------------------------------------------------------------

    async def run(self) -> None:
        """Live."""
        course = self._loop.create_task(self._live())
        try:
            async with asyncio.timeout(END_S):
                await asyncio.wait([course, self._failure], return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise Wrong(f"the world has not ended after {END_S:g} s") from None
        if self._failure.done():
            self._failure.result()
        course.result()

    async def _live(self) -> None:
        files = new_pool(self.plan.capacity, self.plan.block_size)
        await self._boot(SimulatedDisk(files), lossless=True)
        supervising = self.start(self.supervise())
        administrator = Administrator(self)
        while len(self.exports) < self.plan.n_exports:
            await self.until_up()
            try:
                await administrator.create()
            except (NbdstoreError, ProcessDied):
                await asyncio.sleep(0.5)
        working = [self.start(administrator.run())]
        if self.plan.n_transfers:
            self.carrier = Carrier(self)
            working.append(self.start(self.carrier.run()))
        await self._until_idle()
        administrator.stopped = True
        if self.carrier is not None:
            self.carrier.stopped = True
        await asyncio.wait(working)
        await self._until_idle()
        await self._end(supervising)

    async def _until_idle(self) -> None:
        """Wait until all jobs are done."""
        while waiting := [job for job in self._jobs if not job.done()]:
            await asyncio.wait(waiting)

    async def _end(self, supervising: asyncio.Task[Any]) -> None:
        """Let everybody leave; nothing may be left over."""
        await self.until_up()
        for export in list(self.exports.values()):
            await export.machine.leave()
        while not self.is_up or self.process.has_failed:
            await asyncio.sleep(0.1)
        supervising.cancel()
        process = self.process
        process.spare()
        await self._until_left(process)
        await asyncio.wait([reading := process.start(self._read_all(process))])
        await asyncio.wait([stopping := process.start(process.stop())])
        await asyncio.sleep(0)
        reading.result()
        stopping.result()
        self.remains = [process.disk.images, process.end().images]
        if self.carrier is not None:
            self.remains += await self.carrier.vault.end()
        left = [link.name for link in self.network.links if not link.server.closed]
        if left:
            raise Wrong(f"the server has ended, but not its connections: {left}")

    async def _until_left(self, process: ServerProcess) -> None:
        assert process.server is not None
        until = self._loop.time() + SETTLED_S
        while process.server.connections:
            if self._loop.time() > until:
                raise Wrong(f"nobody is there, but connected: {process.server.connections}")
            await asyncio.sleep(1)
        status = self.pool.status()
        if status["held_writes"]:
            raise Wrong(f"nobody is there, but {status['held_writes']} writes are held")

    async def _read_all(self, process: ServerProcess) -> None:
        """Compare what is there with what must be, now that everything is answered."""
        for export in self.exports.values():
            volume = self.volume(export)
            found = await export.spread.read(volume)
            export.history.check_crash(stamps_of(found), self.trace.now, lossless=True)
            for snapshot in volume.snapshots.values():
                await self.snapshots.look(snapshot)
        await self.trash.look_at_all()
        for received in self.received.values():
            there = self.pool.volumes.get(received.name)
            received.compare(None if there is None else await look(there, self.plan.spread))

    def figures(self) -> dict[str, int]:
        """What happened, in numbers."""
        return {
            "events": self.trace.now,
            "requests answered": self.n_answered,
            "requests lost": self.n_lost,
            "requests sent again": self.n_resent,
            "errors": self.n_errors,
            "connections": self.n_attached,
            "resets": self.network.n_resets,
            "vanished peers": self.network.n_vanished,
            "stalled readers": self.n_stalls,
            "timeouts": self.n_timeouts,
            "power losses": self.n_powerless,
            "kills": self.n_killed,
            "of both at failpoints": self.n_at_places,
            "restarts": self.n_restarts,
            "changes": self.n_changes,
            "snapshots made": self.snapshots.n_made,
            "rollbacks": self.n_rollbacks,
            "scrubs": self.n_scrubs,
            "leases taken": self.keeping.n_leases,
            "limits set": self.keeping.n_limits,
            "clients with an old lease turned away": self.keeping.n_turned_away,
            "volumes put into the trash": self.trash.n_put,
            "of them restored": self.trash.n_restored,
            "emptied": self.trash.n_emptied,
            "deleted by the pool": self.trash.n_reclaimed,
            "changes refused": self.n_refused,
            **(self.carrier.figures if self.carrier else {}),
            "virtual seconds": int(self._loop.time()),
        }

    # --- What went wrong ---------------------------------------------------------------------

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not is_ghost():
            error = context.get("exception") or Wrong(context["message"])
            self.fail(error)


class _Alarm(logging.Handler):
    """Fails the world when the product logs a bug of its own."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and not is_ghost():
            error = record.exc_info[1]
            wrong = Wrong(f"the log says: {record.getMessage()}")
            wrong.__cause__ = error
            self._world.fail(wrong)


@contextlib.contextmanager
def _punching(soon: bool) -> Iterator[None]:
    """While this lasts, freed space goes back to the host `soon`, or as usual."""
    if not soon:
        yield
        return
    with (
        mock.patch("nbdstore.store.punching.KEEP_BYTES", 0),
        mock.patch("nbdstore.store.punching.KEEP_SHARE", 1 << 30),
        mock.patch("nbdstore.store.punching.WHILE_S", 0.5),
    ):
        yield


def run_world(seed: int, plan: Plan) -> World:
    """Run one world to its end."""
    worlds: list[World] = []

    async def main() -> None:
        world = World(seed, plan)
        worlds.append(world)
        alarm = _Alarm(world)
        log = logging.getLogger("nbdstore")
        log.addHandler(alarm)
        try:
            await world.run()
        finally:
            log.removeHandler(alarm)

    before = logging.root.manager.disable
    logging.disable(logging.ERROR - 1)
    try:
        with (
            _punching(plan.punches),
            small_steps(random.Random(seed)),
            mock.patch.object(Channel, "has_hung_up", lambda channel: channel.sock.has_hung_up()),
            asyncio.Runner(loop_factory=WorldLoop) as runner,
        ):
            runner.run(main())
        for images in worlds[0].remains:
            assert_clean(images)
    except BaseException as error:
        if worlds:
            error.add_note(f"plan: {plan}")
            error.add_note("\n".join(["the last events:", *list(worlds[0].trace.recent)[-25:]]))
        raise
    finally:
        logging.disable(before)
    return worlds[0]
