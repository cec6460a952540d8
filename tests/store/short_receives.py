"""Backups that are received in a short play: whole, in part, resumed, given up.

Owns these operations, what is sent, and what must be true of a volume that is received into
whatever the moment of a crash.  The receiving is the control API's own; noted_pool.py notes each
change that it asks the store for.  What is sent are two snapshots of a volume: `a` in full, `b` as
what has changed since `a`, the end of the volume among it.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final
from unittest import mock

from nbdstore.control.backup_stream import ResumeToken
from nbdstore.control.stream import Buffer
from nbdstore.errors import BadStream
from nbdstore.store import Pool
from tests.control.backup_pools import Site, frame_ends
from tests.store import virtual_clock
from tests.store.power_loss import new_pool
from tests.store.short_administration import operations
from tests.store.short_plays import CAPACITY, Play
from tests.store.short_states import BLOCK, Found
from tests.store.simulated_disk import PLACE, SimulatedDisk

VOLUME: Final = "r"
"""What is received into."""
NAMES: Final = ("a", "b")


@dataclass(frozen=True)
class Sent:
    """A snapshot where it is sent.

    Attributes:
        stream: all of it, over the one before.
        rests: by the place where it goes on, what is left of that.
    """

    uuid: str
    content: bytes
    base: str | None
    stream: bytes
    rests: dict[int, bytes]


@functools.cache
def sent() -> dict[str, Sent]:
    """What comes, by name."""
    made: dict[str, Sent] = {}
    maker = threading.Thread(target=lambda: virtual_clock.run(_make(made)))
    maker.start()  # a loop may run in this thread
    maker.join()
    return made


async def _make(made: dict[str, Sent]) -> None:
    disk = SimulatedDisk(new_pool(BLOCK, CAPACITY))
    here = Site(await Pool.open(PLACE, host=disk.host))
    volume = await here.pool.create_volume(VOLUME, 4 * BLOCK)
    await volume.write(0, b"1" * 2 * BLOCK)
    await volume.write(3 * BLOCK, b"2" * BLOCK)
    await here.snapshot("r@a")
    await volume.write(0, b"3" * BLOCK)
    await volume.trim(BLOCK, BLOCK)
    await here.pool.resize_volume(volume, 3 * BLOCK, force=True)
    await volume.write(2 * BLOCK, b"4" * BLOCK)
    await here.snapshot("r@b")
    base = None
    for name in ("r@a", "r@b"):
        uuid, since = here.uuid(name), f"{VOLUME}@a" if base else None
        with mock.patch("nbdstore.control.sending.PIECE_BYTES", BLOCK):
            stream = await here.stream(name, since)
            rests = {
                start: await here.resumed(ResumeToken(uuid=uuid, base=base, start=start).encode())
                for start in range(0, 3 * BLOCK, BLOCK)
            }
        made[name[-1]] = Sent(uuid, await here.content(name), base, stream, rests)
        base = uuid
    await here.pool.close()


# -- the operations ----------------------------------------------------------------------------


def _next(play: Play) -> Sent:
    """What comes next: the first that has not come."""
    name = next(n for n in NAMES if play.histories[f"{VOLUME}@{n}"].now is None)
    return sent()[name]


async def _take(play: Play, stream: bytes) -> None:
    """Each part is noted with the volume as soon as it is there."""

    async def chunks() -> AsyncIterator[Buffer]:
        yield stream

    with (
        mock.patch("nbdstore.control.receiving._SAVE_BYTES", 1),
        mock.patch("nbdstore.control.receiving._SAVE_S", 1e9),
    ):
        await operations(play).backups.receiving.receive(VOLUME, chunks())


async def _receive(play: Play) -> None:
    """All of the next one, from its beginning."""
    await _take(play, _next(play).stream)


async def _receive_in_part(play: Play) -> None:
    """The beginning of the next one, and a block."""
    stream = _next(play).stream
    try:
        await _take(play, stream[: [*frame_ends(stream)][1]])
    except BadStream:
        pass
    else:
        raise AssertionError("what was cut off was taken for whole")


async def _resume(play: Play) -> None:
    """What is left of the next one."""
    half = operations(play).backups.receiving.show(VOLUME)
    await _take(play, _next(play).rests[half.position])


async def _abort(play: Play) -> None:
    await operations(play).backups.receiving.abort(VOLUME)


RECEIVES: Final[dict[str, Callable[[Play], Awaitable[None]]]] = {
    "receive": _receive,
    "receive-part": _receive_in_part,
    "resume": _resume,
    "abort": _abort,
}


# -- after a crash -----------------------------------------------------------------------------


def judge_received(found: Found) -> None:
    """Assert that what was received is whole, or says how far it is, and is as far as that."""
    there = [name for name in NAMES if f"{VOLUME}@{name}" in found]
    for name in there:
        snapshot = found[f"{VOLUME}@{name}"]
        assert snapshot.properties == sent()[name].uuid, f"snapshot {name} has another uuid"
        assert snapshot.content == sent()[name].content, f"snapshot {name} is not as sent"
    volume = found.get(VOLUME)
    if volume is None:
        assert not there
        return
    marks = json.loads(volume.properties or "{}")
    half = marks.get("receiving")
    assert bool(half) == bool(marks.get("importing")), "nobody can go on, or use it"
    if half is None:
        assert there, "what has no snapshot can be used"
        assert volume.content == sent()[there[-1]].content, "it is not as its snapshot"
        return
    name = next(name for name in NAMES if sent()[name].uuid == half["uuid"])
    wanted, before = sent()[name].content, b""
    if name in there:
        assert volume.content == wanted, "its snapshot has come, and it is not like that"
        return
    if name == "b":
        before = sent()["a"].content
    at = half["position"]
    assert volume.content[:at] == wanted[:at], f"not all of the {at} bytes are there"
    for place in range(at, len(volume.content), BLOCK):
        block = volume.content[place : place + BLOCK]
        allowed = [whole[place : place + BLOCK].ljust(BLOCK, b"\0") for whole in (before, wanted)]
        assert block in allowed, f"at {place} there is something of neither"
