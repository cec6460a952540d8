"""Two served pools, a backup from one into the other, and `kill -9` of either amid it.

Each round writes the volume of the first pool over NBD, makes a snapshot of it, and sends that
until it has been received, whoever is killed on the way: the sender, the receiver, or both, when
so many bytes have passed, or soon after the last one. After each kill the pool is checked, served
again, and looked at: what was acknowledged is there; the volume of the second pool is absent, or
half received and nobody's, or as in the last snapshot. What arrives is compared with what was
written.

``python -m tests.kills.backups --seed N --minutes M`` does it for as long as one likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import xxhash

from nbdstore.control.client import ControlClient
from nbdstore.control.stream import Buffer
from nbdstore.errors import BadStream, ControlError, NbdstoreError, NotFound
from tests.children import Children
from tests.clients.served_pool import ServedPool
from tests.seeds import main
from tests.server.nbd_client import NbdClient, is_refused

MIB: Final = 1 << 20
SIZE: Final = 92 * MIB
"""A receiver notes durably how far it is after each 64 MiB."""
PIECE: Final = MIB
ROUNDS: Final = 6
SOON_S: Final = 0.05
"""After the last byte has passed: the snapshot is made in some tens of milliseconds."""


class Side:
    """One of the pools, and its server."""

    def __init__(self, children: Children, directory: Path) -> None:
        directory.mkdir()
        self.pool = ServedPool(children, directory)
        self.pool.create("--capacity", "1G", "--journal-size", "4M")
        self.control = ControlClient(f"unix:{self.pool.directory}/control.sock")
        self.pool.start()

    def kill(self) -> None:
        """Kill the server; it is not waited for."""
        assert self.pool.process
        self.pool.process.kill()

    def revive(self) -> None:
        """Check what a kill has left, and serve it again."""
        assert self.pool.process
        self.pool.process.wait(60)
        self.pool.process = None
        self.pool.check()
        self.pool.restart()

    def refuses(self, export: str) -> bool:
        """Tell whether nobody can attach an export."""
        return asyncio.run(is_refused(f"unix:{self.pool.socket_path}", export))

    async def client(self, export: str) -> NbdClient:
        client = await NbdClient.connect(f"unix:{self.pool.socket_path}")
        await client.go(export)
        return client

    async def digest(self, export: str, size: int) -> str:
        """The checksum of all that an export of `size` bytes holds."""
        client, digest = await self.client(export), xxhash.xxh3_128()
        for offset in range(0, size, 4 * PIECE):
            digest.update(await client.read(offset, 4 * PIECE))
        client.close()
        await client.writer.wait_closed()
        return digest.hexdigest()


class BackupKills:
    """See the module.

    Arguments:
        size: of the volume; a multiple of 4 MiB.

    Attributes:
        digests: checksums of what the snapshots hold, in their order.
    """

    def __init__(
        self, children: Children, directory: Path, source: random.Random, size: int = SIZE
    ) -> None:
        self.figures = Counter[str]()
        self.digests: list[str] = []
        self._source = source
        self._here = Side(children, directory / "here")
        self._there = Side(children, directory / "there")
        self._content = bytearray(size)
        self._here.control.create_volume("db", size)
        self._n_received = 0
        self._position = 0
        self._timers: list[threading.Timer] = []

    def round(self) -> None:
        """Write, make a snapshot, and send it until it has come."""
        n_bytes = asyncio.run(self._write())
        number = len(self.digests)
        self._here.control.create_snapshots([f"db@{number}"])
        self.digests.append(xxhash.xxh3_128_hexdigest(self._content))
        while self._n_received <= number:
            self._transfer(number, n_bytes)
        self._position = 0
        self._compare(f"db@{number}", "db")

    def close(self) -> None:
        """All that was ever received is there; both pools are in perfect order."""
        self._compare(*(f"db@{number}" for number in range(len(self.digests))))
        for side in (self._here, self._there):
            side.pool.close()

    async def _write(self) -> int:
        """Change the volume; return how many bytes were written, or zeroed."""
        client = await self._here.client("db")
        if not self.digests:
            ranges = [(offset, PIECE) for offset in range(0, len(self._content) - PIECE, PIECE)]
        else:
            sizes = [self._source.randint(1, PIECE) for _ in range(self._source.randint(1, 12))]
            ranges = [(self._source.randrange(len(self._content) - PIECE), size) for size in sizes]
        for offset, length in ranges:
            is_zero = self._source.random() < 0.1
            data = bytes(length) if is_zero else self._source.randbytes(length)
            await client.write(offset, data)
            self._content[offset : offset + length] = data
        client.close()
        await client.writer.wait_closed()
        return sum(length for _, length in ranges)

    def _compare(self, *names: str) -> None:
        for name in names:
            number = int(name.partition("@")[2] or self._n_received - 1)
            found = asyncio.run(self._there.digest(name, len(self._content)))
            assert found == self.digests[number], f"{name} is not what db@{number} was"

    # --- A transfer ---

    def _transfer(self, number: int, n_bytes: int) -> None:
        """Send once; somebody may be killed meanwhile."""
        victims: list[list[Side]] = [[self._here], [self._there], [self._here, self._there], []]
        (chosen,) = self._source.choices(victims, (3, 4, 1, 2))
        limit = self._source.randint(0, int(n_bytes * 1.2))
        try:
            self._there.control.backups.receive("db", self._passing(number, chosen, limit))
        except (ControlError, BadStream, NotFound, OSError) as error:
            assert chosen, f"nobody was killed: {error}"
            self.figures["transfers broken off"] += 1
        else:
            self._n_received = number + 1
            self.figures["received"] += 1
        for timer in self._timers:
            timer.join()
        self._timers.clear()
        for side in chosen:
            side.kill()  # if it lives yet
            side.revive()
            self.figures["kills"] += 1
        self._look(number)

    def _passing(self, number: int, victims: list[Side], limit: int) -> Iterator[Buffer]:
        """What the pipe between both sides passes on; it ends as a pipe does."""
        n_passed = 0
        with contextlib.suppress(NbdstoreError, OSError):  # the sender is dead
            for chunk in self._stream(number):
                yield chunk
                n_passed += len(chunk)
                if n_passed >= limit:
                    for side in victims:
                        side.kill()
        for side in victims:
            self._timers.append(threading.Timer(self._source.uniform(0, SOON_S), side.kill))
            self._timers[-1].start()

    def _stream(self, number: int) -> Iterator[Buffer]:
        with contextlib.suppress(NotFound):
            if self._source.random() < 0.8:
                token = self._there.control.backups.receiving("db").token
                chunks = self._here.control.backups.resume(token)
                self.figures["resumed"] += 1
                return chunks
        since = f"db@{number - 1}" if number else None
        return self._here.control.backups.send(f"db@{number}", since)

    # --- Afterwards ---

    def _look(self, number: int) -> None:
        """Assert that what there is may be, and learn of it."""
        control = self._there.control
        found = sorted(info.snapshot for info in control.snapshots())
        n = len(found)
        assert found == [f"db@{n}" for n in range(n)], f"snapshots {found}"
        assert n in {self._n_received, number + 1}, f"{found}, but received {self._n_received}"
        infos = {info.name: info for info in control.volumes()}
        if n > self._n_received:  # it has come, and nobody was told
            self._n_received = n
            assert not infos["db"].importing, "it has come, and cannot be attached"
            return
        if "db" not in infos:
            assert not n and not self._position, "the volume is gone"
        elif infos["db"].importing:
            half = control.backups.receiving("db")
            assert n <= number and half.snapshot == f"db@{number}", half
            assert half.position >= self._position, f"{half.position} left of {self._position}"
            self._position = half.position
            assert self._there.refuses("db"), "what is half received can be attached"
        else:
            assert n, "a volume without a snapshot can be used"
            self._compare("db")


def kill_amid_backups(seed: int) -> Mapping[str, int]:
    """Do the rounds of one seed; return what they came to."""
    directory = Path(tempfile.mkdtemp(prefix=f"nbdstore-backups-{seed}-"))
    try:
        with Children(directory) as children:
            kills = BackupKills(children, directory, random.Random(seed))
            for _ in range(ROUNDS):
                kills.round()
            kills.close()
    except BaseException as error:
        error.add_note(f"the pools and the servers' logs are in {directory}")
        raise
    shutil.rmtree(directory)
    return kills.figures


if __name__ == "__main__":
    main("tests.kills.backups", kill_amid_backups)
