"""What an administrator does in a short play: names, limits, leases, scrubs, sizes, sending.

Owns these operations.  Limits, leases and the records of scrubs are the control API's own, which
keeps them as properties of a volume; noted_pool.py notes each change that it makes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final
from unittest import mock

from nbdstore.control.backup_stream import BackupReader, Data
from nbdstore.control.operations import Operations
from tests.store.noted_pool import NotedPool
from tests.store.short_plays import CAPACITY, OTHER_NAME, Play, delete
from tests.store.short_states import BLOCK, FIRST, State
from tests.store.simulated_disk import SimulatedHost

FAST: Final = 1 << 30
"""Bytes per second of a scrub."""
LATER_S: Final = 90_000.0
"""After this the time in the trash is up."""


def operations(play: Play) -> Operations:
    """The control API's operations on the pool of a play, as after a start of its server."""
    noted: Any = NotedPool(play)
    return Operations(noted)


def properties_of(play: Play) -> dict[str, Any]:
    """What the first volume has."""
    found: dict[str, Any] = json.loads(play.state.properties or "{}")
    return found


def kept(play: Play, name: str) -> Any:
    """One of the first volume's properties, which must be there."""
    found = properties_of(play)
    assert name in found, f"{name} is not kept with the volume: {found}"
    return found[name]


# -- names, sizes, the trash -------------------------------------------------------------------


async def _rename(play: Play) -> None:
    name = "v" if play.state.renamed else OTHER_NAME
    after = replace(play.state, renamed=not play.state.renamed)
    await play.do(play.pool.rename_volume(play.volume, name), after)
    play.durable()


async def _enlarge(play: Play) -> None:
    """The pool."""
    capacity = play.state_of("pool").size + CAPACITY
    after = replace(play.state_of("pool"), size=capacity)
    await play.do(play.pool.grow(capacity), after, name="pool")
    play.durable("pool")


async def _expire(play: Play) -> None:
    """The pool deletes what has been in the trash for as long as it may."""
    (volume,) = play.pool.trash
    later = play.pool._core.host.time() + LATER_S

    async def in_time() -> None:
        with mock.patch.object(SimulatedHost, "time", return_value=later):
            play.pool._trash.empty_in_time()
        deleting = play.pool._trash._deleting
        assert deleting is not None
        await asyncio.wait([deleting])

    await delete(play, volume, in_time())


async def _resize_beside(play: Play, n_blocks: int) -> None:
    """Resize the first volume; meanwhile it is written below its new end, again and again."""
    volume, history, old = play.volume, play.histories["v"], play.state
    size, start = FIRST + n_blocks * BLOCK, len(play.disk.events)
    cleared = old.cleared(size, old.size - size) if size < old.size else old
    course = [cleared, cleared.resized(size)]  # what the volume goes through from here on
    history.states += course
    sure, n_turns = 0, 0
    play.note()
    resizing = asyncio.ensure_future(play.pool.resize_volume(volume, size, force=True))
    try:
        while not resizing.done():
            await asyncio.sleep(0)
            if volume.size == size and not sure:
                sure, course = len(history.states) - 1, course[-1:]
            if len(play.disk.events) > start:  # the end that is cut off is cleared
                n_turns += 1
                if n_turns % 5 == 1:
                    course = await _write_amid(play, course, n_turns // 5)
    finally:
        await resizing
    history.acknowledge()
    history.n_durable = max(history.n_durable, sure or history.n_acknowledged)
    play.note()


async def _write_amid(play: Play, course: list[State], number: int) -> list[State]:
    """Write the first block while a volume goes through `course`; return what it goes through then.

    Arguments:
        number: of the write.
    """
    data, history = bytes([0x80 + play.number * 8 + number % 8]) * BLOCK, play.histories["v"]
    after = [state.written(FIRST, data) for state in course]
    history.states += after
    play.note()
    await play.put(FIRST, data)
    history.n_acknowledged = len(history.states) - len(after)
    play.note()
    return after


async def _shrink_beside(play: Play) -> None:
    await _resize_beside(play, 1)


async def _grow_beside(play: Play) -> None:
    await _resize_beside(play, 6)


# -- limits and leases -------------------------------------------------------------------------


async def _limit(play: Play) -> None:
    iops = 100 * (play.number + 1)
    await operations(play).update_volume(play.volume.name, iops=iops)
    assert kept(play, "qos")["iops"] == iops


async def _lease(play: Play) -> None:
    """Take it, from whoever has it."""
    epoch = properties_of(play).get("lease_epoch", 0) + 1
    with (
        mock.patch("nbdstore.lease.secrets.token_hex", return_value=f"{epoch:032x}"),
        mock.patch("nbdstore.control.leases.datetime") as clock,
    ):
        clock.now().isoformat.return_value = "2026-01-01T00:00:00+00:00"
        leases = operations(play).leases
        granted = await leases.acquire(play.volume.name, f"node-{epoch}", force=True)
    assert granted.epoch == kept(play, "lease_epoch") == kept(play, "lease")["epoch"] == epoch


async def _break_lease(play: Play) -> None:
    epoch = kept(play, "lease_epoch")
    await operations(play).leases.break_(play.volume.name)
    assert kept(play, "lease") is None and kept(play, "lease_epoch") == epoch


# -- scrubs ------------------------------------------------------------------------------------


async def _scrub(play: Play) -> None:
    """To the end, on from where an earlier one was stopped."""
    before = properties_of(play).get("scrub")
    await _scrubbed(play, stops=False)
    record = kept(play, "scrub")
    assert record["image"] is None and record["done"] and not record["damaged"]
    if before is not None and before["image"] is not None:
        assert record["run"] == before["run"], "it has begun anew"


async def _scrub_in_part(play: Play) -> None:
    """Until it has noted that it has got somewhere, if it is not through then."""
    await _scrubbed(play, stops=True)
    record = kept(play, "scrub")
    assert record["position"] or record["image"] is None


async def _scrubbed(play: Play, *, stops: bool) -> None:
    """Each step is noted with the volume."""
    now = f"2026-01-01T00:00:{play.number:02}+00:00"
    with (
        mock.patch("nbdstore.control.scrub._now", return_value=now),
        mock.patch("nbdstore.control.scrub.STEP_BYTES", 2 * BLOCK),
        mock.patch("nbdstore.control.scrub.SAVE_EVERY_S", 0.0),
    ):
        here = operations(play)
        started, _ = here.scrubs.start(play.volume.name, rate=FAST)
        while here.running.find(started.id).is_running and not (stops and _position(play)):
            await asyncio.sleep(1e-6)  # its pace lets time pass, which turns of the loop do not
        if stops:
            await here.running.cancel(started.id)
        found = here.running.find(started.id)
    assert found.error is None and not found.result["damaged"], found


def _position(play: Play) -> int:
    record = properties_of(play).get("scrub") or {}
    position: int = record.get("position", 0)
    return position


# -- sending -----------------------------------------------------------------------------------


async def _send(play: Play) -> None:
    """The first volume's snapshot, while the volume is written; nothing is kept of it."""
    reader, content = BackupReader(), bytearray(play.volume.size)
    with mock.patch("nbdstore.control.sending.PIECE_BYTES", BLOCK):
        frames = operations(play).backups.send(f"{play.volume.name}@s")
        for n in range(1000):
            n_events = len(play.disk.events)
            frame = await anext(frames, None)
            assert len(play.disk.events) == n_events, "sending has changed something"
            if frame is None:
                break
            for part in (part for buffer in frame for part in reader.feed(buffer)):
                if isinstance(part, Data):
                    content[part.offset : part.stop] = b"".join(part.buffers)
            if n == 0:
                await play.write(FIRST, BLOCK)
    begin, held = reader.end(), play.state_of("v@s")
    assert begin.size == held.size and content[FIRST : held.size] == held.content


ADMINISTRATION: Final[dict[str, Callable[[Play], Awaitable[None]]]] = {
    "rename": _rename,
    "enlarge": _enlarge,
    "expire": _expire,
    "shrink-beside": _shrink_beside,
    "grow-beside": _grow_beside,
    "limit": _limit,
    "lease": _lease,
    "break": _break_lease,
    "scrub": _scrub,
    "scrub-part": _scrub_in_part,
    "send": _send,
}
