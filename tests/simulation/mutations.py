"""Ways to break the server and the store that worlds must notice.

Owns the mutations, each the kind of mistake that a change could bring, and the plan of the worlds
that look for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final
from unittest import mock

from nbdstore.control import sending
from nbdstore.control.backup_stream import Part
from nbdstore.control.receiving import Receiving, _Reception
from nbdstore.protocol.constants import Command
from nbdstore.protocol.replies import Buffer, SimpleReplies
from nbdstore.protocol.transmission import Request
from nbdstore.server import Server
from nbdstore.server.exports import Exports
from nbdstore.server.session import Session
from nbdstore.store import Image, Pool, Snapshot, Volume
from nbdstore.store.administration import Administration
from nbdstore.store.core import Core
from nbdstore.store.durability import Committer, OnDurable
from nbdstore.store.slots import Slots
from nbdstore.store.trash import Trash
from nbdstore.store.writing import Writing
from tests.simulation.network import Weather
from tests.simulation.plan import NARROW, Plan

CRASHES: Final = Plan(
    n_exports=1,
    n_jobs=3,
    n_requests=60,
    cells=256,
    moments_s=(0.005, 0.02),
    actions={"crash": 3, "wait": 1},
)
"""Worlds of much writing and many crashes."""

PEACE: Final = replace(CRASHES, actions={"crash": 0, "wait": 1})

CROWDED: Final = replace(
    PEACE,
    n_requests=100,
    cells=2048,
    limits=NARROW,
    weather=Weather(buffer_bytes=(4 << 10,), whole=0.5),
)
"""Worlds in which there is never enough room."""

ROLLBACKS: Final = replace(
    CRASHES, actions={"crash": 0, "snapshot": 1, "drop": 1, "roll_back": 3, "wait": 1}
)
"""Worlds in which volumes are rolled back under their users."""

TRASH: Final = replace(
    CRASHES,
    n_exports=2,
    actions={"crash": 2, "create": 1, "trash": 2, "restore": 2, "empty": 1, "wait": 1},
)
"""Worlds in which volumes are put into the trash, and taken out again."""

SCRUBS: Final = replace(
    CRASHES,
    n_requests=300,
    actions={
        **{"scrub": 6, "snapshot": 1, "drop": 1, "grow": 1, "shrink": 1},
        **{"settle": 2, "evict": 1, "crash": 1},
    },
)
"""Worlds in which volumes and snapshots are scrubbed all the time."""

LEASES: Final = replace(
    CRASHES,
    n_exports=2,
    actions={
        **{"lease": 4, "end_lease": 1, "limit": 2, "rename": 1, "trash": 1, "restore": 1},
        **{"snapshot": 1, "roll_back": 1, "crash": 2, "create": 1},
    },
)
"""Worlds in which leases change hands under the users of volumes."""

BACKUPS: Final = replace(
    CRASHES,
    n_jobs=1,
    n_requests=300,
    moments_s=(0.02, 0.1),
    actions={"crash": 1, "restart": 1, "snapshot": 4, "drop": 1, "wait": 2},
    n_transfers=30,
)
"""Worlds in which snapshots are carried to another pool and back."""


@dataclass(frozen=True)
class Mutation:
    """One way to break it.

    Attributes:
        says: what the finding says.
        n_seeds: worlds that are enough to find it.
    """

    name: str
    patch: Callable[[], Any]
    says: str
    plan: Plan = CRASHES
    n_seeds: int = 40

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While this lasts, it is broken."""
        with self.patch():
            yield


# --- The server ----------------------------------------------------------------------------------


def _flush_too_early(self: Volume, done: OnDurable) -> bool:
    _FLUSH_SOON(self, lambda _: None)
    return False


def _ignore_fua(self: Session, flushes: list[Request], out: list[Buffer], began_ns: int) -> int:
    written = [request for request in flushes if request[0] == Command.WRITE]
    wanted = [request for request in flushes if request[0] != Command.WRITE]
    n_bytes = self._replies.all_done(out, written) if written else 0
    return n_bytes + (_FLUSH(self, wanted, out, began_ns) if wanted else 0)


_FLUSH_SOON: Final = Volume.flush_soon
_FLUSH: Final = Session._flush


def _remember_writes() -> Any:
    """As if a flush covered only what came over its own connection."""

    @contextmanager
    def patches() -> Iterator[None]:
        write = Session._write

        def remembering(self: Session, *args: Any) -> bool:
            self.__dict__["has_written"] = True
            return write(self, *args)

        def flush_own(
            self: Session, flushes: list[Request], out: list[Buffer], began_ns: int
        ) -> int:
            if self.__dict__.pop("has_written", False):
                return _FLUSH(self, flushes, out, began_ns)
            return self._replies.all_done(out, flushes)

        with (
            mock.patch.object(Session, "_write", remembering),
            mock.patch.object(Session, "_flush", flush_own),
        ):
            yield

    return patches()


def _answer_twice(self: SimpleReplies, out: list[Buffer], cookie: bytes, offset: int) -> int:
    return _DONE(self, out, cookie, offset) + _DONE(self, out, cookie, offset)


_DONE: Final = SimpleReplies.done


def _lose_wake_up(self: Session) -> None:
    """As Session._send_more, without looking whether there is something to do now."""
    if self._channel.flush(self._outbox):
        self._blocked = False
        self._channel.unwatch_writable()


def _answer_before_writing(self: Session, data: Sequence[Any]) -> bool:
    async def later() -> None:
        await asyncio.sleep(0.001)
        for offset, payload in kept:
            await self.volume.write(offset, payload)

    kept = [(offset, bytes(payload)) for offset, payload in data]
    asyncio.get_running_loop().create_task(later())
    return True


def _write_half(self: Volume, writes: Sequence[tuple[int, Any]], *, n_clients: int = 1) -> bool:
    """As if a batch was more than one record, and a crash came between them."""
    return all(self.writing.now([part]) for part in _halves(writes))


def _halves(writes: Sequence[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    for offset, data in writes:
        half = len(data) // 8192 * 4096
        if half:
            yield offset + half, data[half:]
        yield offset, data[:half] if half else data


# --- The store -----------------------------------------------------------------------------------


def _reuse_at_once(self: Slots, slots: Any, seq: int) -> None:
    self._unmark(slots)


async def _flush_only(self: Pool, volume: Volume, snapshot: Snapshot) -> None:
    await volume.flush()


async def _fence_nobody(self: Server, volume: Image, why: str) -> int:
    return 0


def _always_durable(self: Committer, volume: Any, seq: int) -> bool:
    return True


def _forget_overwrites() -> Any:
    """As if what another write has changed meanwhile was not looked at again."""

    async def attempt(self: Writing, offset: int, data: memoryview) -> Any:
        first = offset >> self._shift
        stop = ((offset + len(data) - 1) >> self._shift) + 1
        await self._volume.load(first, stop)
        old = await self._read_ends(offset, len(data))
        current = {
            block: (self._volume.map.words[2 * block], content)
            for block, (_, content) in old.items()
        }
        return self._try([(offset, data)], current)

    return mock.patch.object(Writing, "_attempt", attempt)


def _changes_without_commit(*ops: str) -> Any:
    """As if it was enough that some changes are journalled, until the next sync."""

    async def change(self: Administration, *args: Any) -> None:
        if args[1]["op"] not in ops:
            await _CHANGE(self, *args)
            return
        with mock.patch.object(Committer, "commit_all", mock.AsyncMock()):
            await _CHANGE(self, *args)

    return mock.patch.object(Administration, "change", change)


def _empty_too_soon(self: Trash) -> None:
    oldest = self._oldest()
    if oldest is not None:
        self._delete(oldest, "its time in the trash is up")


_CHANGE: Final = Administration.change


# --- Backups -------------------------------------------------------------------------------------


async def _send_the_volume(snapshot: Any, piece: Any) -> Any:
    return await _READ(snapshot.volume, piece)


async def _note_before_writing(self: _Reception, part: Part) -> int:
    """As if what came was noted as durable before it is written."""
    before, self._position = self._position, max(self._position, part.stop)
    await self._save()
    self._position = before
    return await _WRITE_PART(self, part)


async def _abort_without_rollback(self: Receiving, name: str) -> None:
    with mock.patch.object(type(self._pool), "rollback", mock.AsyncMock()):
        await _ABORT(self, name)


_READ: Final = sending._read
_WRITE_PART: Final = _Reception._write
_ABORT: Final = Receiving.abort


MUTATIONS: Final = (
    Mutation(
        "a flush is answered too early",
        lambda: mock.patch.object(Volume, "flush_soon", _flush_too_early),
        "crash",
    ),
    Mutation("FUA is ignored", lambda: mock.patch.object(Session, "_flush", _ignore_fua), "crash"),
    Mutation("a flush covers its own connection only", _remember_writes, "crash"),
    Mutation(
        "requests are answered twice",
        lambda: mock.patch.object(SimpleReplies, "done", _answer_twice),
        "reply to nothing",
        PEACE,
    ),
    Mutation(
        "a drained outbox wakes nobody up",
        lambda: mock.patch.object(Session, "_send_more", _lose_wake_up),
        "not answered",
        CROWDED,
    ),
    Mutation(
        "writes are answered before they are done",
        lambda: mock.patch.object(Session, "_write", _answer_before_writing),
        "",
        PEACE,
    ),
    Mutation(
        "a write is two records",
        lambda: mock.patch.object(Volume, "write_now", _write_half),
        "torn",
        replace(CRASHES, moments_s=(0.02, 0.1)),
        n_seeds=300,
    ),
    Mutation(
        "freed slots are used again at once",
        lambda: mock.patch.object(Slots, "free_later", _reuse_at_once),
        "",
    ),
    Mutation(
        "the store's commit does nothing",
        lambda: mock.patch.object(Committer, "_is_durable", _always_durable),
        "crash",
    ),
    Mutation(
        "a rollback keeps what was written",
        lambda: mock.patch.object(Pool, "rollback", _flush_only),
        "",
        ROLLBACKS,
    ),
    Mutation(
        "a fence ends no connection",
        lambda: mock.patch.object(Server, "fence", _fence_nobody),
        "after a fence",
        ROLLBACKS,
    ),
    Mutation(
        "a merge does not look again",
        _forget_overwrites,
        "",
        replace(PEACE, share_uncached=0.9, cells=64, n_requests=200),
    ),
    Mutation(
        "what a scrub reads may be used again meanwhile",
        lambda: mock.patch.object(
            Core, "read_in_thread", lambda core, call: core.disk.offload(call)
        ),
        "a scrub takes what is intact for damaged",
        replace(SCRUBS, share_uncached=0.0),
    ),
    Mutation(
        "what is in the trash is not durably there",
        lambda: _changes_without_commit("trash", "restore"),
        "",
        TRASH,
    ),
    Mutation(
        "leases and limits are not durably there",
        lambda: _changes_without_commit("properties"),
        "has kept",
        LEASES,
    ),
    Mutation(
        "a lease leaves the connections of before",
        lambda: mock.patch.object(Server, "fence", _fence_nobody),
        "after a fence",
        LEASES,
    ),
    Mutation(
        "a lease that has ended is good enough",
        lambda: mock.patch.object(Exports, "_lease_refusal", lambda *_: None),
        "its lease has ended",
        LEASES,
    ),
    Mutation(
        "the trash is emptied too soon",
        lambda: mock.patch.object(Trash, "empty_in_time", _empty_too_soon),
        "is deleted since its time",
        TRASH,
    ),
    Mutation(
        "a send reads the volume, not its snapshot",
        lambda: mock.patch.object(sending, "_read", _send_the_volume),
        "not as",
        BACKUPS,
    ),
    Mutation(
        "a receive notes what it has before that is written",
        lambda: mock.patch.object(_Reception, "_write", _note_before_writing),
        "not as sent",
        BACKUPS,
    ),
    Mutation(
        "a receive that is given up leaves what came",
        lambda: mock.patch.object(Receiving, "abort", _abort_without_rollback),
        "is not as in",
        BACKUPS,
        n_seeds=150,
    ),
)
