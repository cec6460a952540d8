"""The export of a damaged pool, seen by real clients: what is intact is read, the rest is EIO."""

from __future__ import annotations

import random
import signal
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdstore.errors import Corruption
from nbdstore.store import Pool
from tests.children import Children
from tests.clients.libnbd import nbdsh
from tests.clients.served_pool import NBDSTORE
from tests.readiness import ReadinessSocket
from tests.store.anatomy import Anatomy
from tests.store.pools import FILES, MIB, make_pool, opened
from tests.store.specimen import flip_slot

BLOCK = 4096
STOP_TIMEOUT_S = 60.0
DAMAGED_BLOCK = 5
LOST = (64 * MIB, 65 * MIB)
"""Of "torn": below its damaged leaf."""


@dataclass
class Rescue:
    """A pool that does not open, exported by `nbdstore salvage`.

    Attributes:
        content: of its volumes "whole", "torn" and "gone", before the damage.
    """

    directory: Path
    socket: Path
    content: dict[str, bytes]

    def uri(self, volume: str) -> str:
        return f"nbd+unix:///{volume}?socket={self.socket}"


async def make(directory: Path) -> dict[str, bytes]:
    rng = random.Random(1)
    content = {}
    make_pool(directory, 64 * MIB)
    async with opened(directory) as pool:
        for name in ("whole", "torn", "gone"):
            volume = await pool.create_volume(name, 300 * MIB, {"allow": ["client.example.org"]})
            content[name] = rng.randbytes(MIB)
            await volume.write(0, content[name])
            await volume.write(LOST[0], b"l" * 100_000)
            if name == "whole":
                await pool.create_snapshots([(volume, "kept")])
    return content


def damage(directory: Path) -> None:
    for place in Anatomy(directory).places:
        key = (place.volume, place.kind, place.number)
        if key in (("torn", "data", DAMAGED_BLOCK), ("torn", "leaf", 64)) or (
            (place.volume, place.depth) == ("gone", 2)
        ):
            flip_slot(directory, place)


@pytest.fixture
async def rescue(children: Children, tmp_path: Path) -> Rescue:
    directory = tmp_path / "pool"
    content = await make(directory)
    damage(directory)
    with pytest.raises(Corruption):
        await Pool.open(directory)
    return Rescue(directory, tmp_path / "rescue.sock", content)


@pytest.fixture
def exported(rescue: Rescue, children: Children, tmp_path: Path) -> Iterator[Rescue]:
    """The export, on a directory in which nothing may be written; ended by SIGTERM, status 0."""
    before = {name: (rescue.directory / name).read_bytes() for name in FILES}
    (rescue.directory / "lock").unlink()
    with ReadinessSocket(tmp_path / "notify") as readiness:
        process = children.start(
            *(str(NBDSTORE), "--pool", str(rescue.directory)),
            *("salvage", "--socket", str(rescue.socket)),
            log="salvage.log",
            env=readiness.env,
        )
        readiness.wait(process)
    yield rescue
    process.send_signal(signal.SIGTERM)
    assert process.wait(STOP_TIMEOUT_S) == 0
    assert sorted(path.name for path in rescue.directory.iterdir()) == sorted(FILES)
    assert before == {name: (rescue.directory / name).read_bytes() for name in FILES}
    assert not rescue.socket.exists()


@pytest.mark.requires("nbdcopy")
@pytest.mark.parametrize("name", ["whole", "whole@kept"])
def test_nbdcopy_gets_an_intact_volume_and_its_snapshot_whole(
    exported: Rescue, children: Children, tmp_path: Path, name: str
) -> None:
    children.run("nbdcopy", exported.uri(name), tmp_path / "copy")
    found = (tmp_path / "copy").read_bytes()
    assert found[:MIB] == exported.content["whole"]
    assert found[LOST[0] :][:100_000] == b"l" * 100_000
    assert len(found) == 300 * MIB


@pytest.mark.requires("nbdcopy")
def test_nbdcopy_fails_where_something_is_lost(
    exported: Rescue, children: Children, tmp_path: Path
) -> None:
    for volume in ("torn", "gone"):
        children.run("nbdcopy", exported.uri(volume), tmp_path / "copy", status=1)


@pytest.mark.requires("nbdsh")
def test_nbdsh_reads_around_the_damage(exported: Rescue, children: Children) -> None:
    block = exported.content["torn"][:BLOCK]
    script = f"""
    assert h.is_read_only()
    same(h.pread({BLOCK}, 0).hex(), {block.hex()!r})
    for offset in ({DAMAGED_BLOCK * BLOCK}, {LOST[0]}, {LOST[1] - BLOCK}):
        expect("EIO", h.pread, {BLOCK}, offset)
        h.pread({BLOCK}, offset - {BLOCK} if offset != {LOST[1] - BLOCK} else {LOST[1]})
    expect("EIO", h.pread, {BLOCK}, {LOST[0] + 10 * BLOCK})
    h.flush()
    """
    nbdsh(children, exported.uri("torn"), script)


@pytest.mark.requires("nbdsh")
def test_what_is_lost_is_data_and_no_hole(exported: Rescue, children: Children) -> None:
    script = f"""
    same(extents({300 * MIB}, 0), {{"base:allocation": [({300 * MIB}, 0)]}})
    """
    nbdsh(children, exported.uri("gone"), script, contexts=("base:allocation",))


@pytest.mark.requires("qemu-io")
def test_qemu_reads_and_may_not_write(exported: Rescue, children: Children) -> None:
    uri = exported.uri("whole")
    pattern = f"read -P {ord('l')} {LOST[0]} 100000"
    assert "verification failed" not in children.run(
        "qemu-io", "-r", "-f", "raw", "-c", pattern, uri
    )
    out = children.run("qemu-io", "-f", "raw", "-c", "write 0 4096", uri, status=1)
    assert "100%" not in out


def test_the_socket_is_for_its_owner_alone(exported: Rescue) -> None:
    assert stat.S_IMODE(exported.socket.stat().st_mode) & 0o077 == 0
