"""Clients that harm: each does one bad thing for a while, leaves without a word, and comes again.

They write only to a volume of their own, whose content nobody looks at.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nbdstore.protocol.client import build_option
from nbdstore.protocol.constants import REQUEST, REQUEST_MAGIC, Command, Option
from tests.server.nbd_client import NbdClient

if TYPE_CHECKING:
    from tests.load.scene import Scene

MIB: Final = 1 << 20
STAY_S: Final = (0.5, 6.0)
"""How long one of them stays, unless it is thrown out."""
DRIP_S: Final = 0.05


async def never_reads(client: NbdClient, source: random.Random) -> None:
    """Asks for much more than any buffer takes."""
    await client.go("hostile")
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    length = source.choice([4096, MIB, 32 * MIB])
    client.send(request(Command.READ, 0, min(length, 32 * MIB)) * 200)
    await asyncio.sleep(source.uniform(*STAY_S))


async def sends_slowly(client: NbdClient, source: random.Random) -> None:
    """A byte now and then."""
    await client.go("hostile")
    data = request(Command.WRITE, 0, 100) + bytes(100)
    for byte in data[: source.randrange(1, len(data))]:
        if client.writer.transport.is_closing():
            break  # cut off: at this rate a request takes too long
        client.send(bytes([byte]))
        await asyncio.sleep(DRIP_S)


async def hangs_in_a_payload(client: NbdClient, source: random.Random) -> None:
    """Announces a payload and sends a part of it."""
    await client.go("hostile")
    length = source.choice([1000, 100_000, MIB, 32 * MIB])
    client.send(request(Command.WRITE, 0, length) + bytes(source.randrange(length)))
    await asyncio.sleep(source.uniform(*STAY_S))


async def leaves_with_requests_in_flight(client: NbdClient, source: random.Random) -> None:
    await client.go("hostile")
    for _ in range(source.randrange(1, 50)):
        offset = source.randrange(0, 16 * MIB, 512)
        client.send(request(Command.WRITE, offset, 4096) + bytes(4096))
        client.send(request(Command.FLUSH, 0, 0) + request(Command.READ, offset, 65536))


async def hangs_in_the_handshake(client: NbdClient, source: random.Random) -> None:
    option = build_option(Option.INFO, bytes(1000))
    client.send(option[: source.randrange(len(option))])
    await asyncio.sleep(source.uniform(*STAY_S))


async def floods_with_options(client: NbdClient, source: random.Random) -> None:
    client.send(build_option(Option.LIST) * source.randrange(1000))
    await client.until_closed()


async def talks_nonsense(client: NbdClient, source: random.Random) -> None:
    await client.go("hostile")
    client.send(b"\xff" + source.randbytes(100_000))
    await client.until_closed()


MISDEEDS: Final = (
    never_reads,
    sends_slowly,
    hangs_in_a_payload,
    leaves_with_requests_in_flight,
    hangs_in_the_handshake,
    floods_with_options,
    talks_nonsense,
)


async def misbehave(scene: Scene, source: random.Random, go_on: Callable[[], bool]) -> None:
    """Do one bad thing after the other."""
    while go_on():
        client: NbdClient | None = None
        misdeed = source.choice(MISDEEDS)
        try:
            client = await NbdClient.connect(scene.address(source))
            await misdeed(client, source)
        except (ConnectionError, AssertionError, TimeoutError):
            pass  # thrown out, as it should be
        finally:
            if client is not None:
                client.writer.transport.abort()
        scene.misdeeds[misdeed.__name__] += 1


def request(command: int, offset: int, length: int) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, 0, command, bytes(8), offset, length)
