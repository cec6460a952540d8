"""``nbdstore import`` and ``nbdstore export``, with and without a server that holds the pool."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdstore.store import Pool
from tests.cli.conftest import CommandLine, HeldPool
from tests.control.memory_pool import MemoryConnection

MIB = 1 << 20
BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A sparse image: data, a hole, zeros, data, and an end off the block boundary."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.write(os.urandom(3 * MIB + 512))
        file.seek(20 * MIB)
        file.write(bytes(MIB) + os.urandom(5 * BLOCK) + b"the end")
        file.truncate(30 * MIB + 512)
    return path


class TestThereAndBack:
    def test_a_sparse_image(self, either: CommandLine, image: Path, tmp_path: Path) -> None:
        text = either.run("import", image, "db")
        assert text == "imported volume db: 30 MiB, 3 MiB mapped\n"
        back = tmp_path / "back"
        either.run("export", "db", back)
        assert back.read_bytes() == image.read_bytes()
        assert back.stat().st_blocks <= image.stat().st_blocks

    def test_an_image_of_nothing(self, either: CommandLine, tmp_path: Path) -> None:
        image = tmp_path / "empty"
        image.touch()
        os.truncate(image, 100 * MIB)
        assert "100 MiB, 0 B mapped" in either.run("import", image, "db")
        either.run("export", "db", image)
        assert image.stat().st_size == 100 * MIB
        assert image.stat().st_blocks == 0

    def test_a_size_off_the_sector_is_rounded_up(self, either: CommandLine, tmp_path: Path) -> None:
        image = tmp_path / "odd"
        image.write_bytes(b"x" * 1000)
        either.run("import", image, "db")
        assert either.json("volume", "show", "db")["size"] == 1024
        either.run("export", "db", image)
        assert image.read_bytes() == b"x" * 1000 + bytes(24)

    def test_a_new_volume_may_be_larger(self, either: CommandLine, image: Path) -> None:
        either.run("import", image, "db", "--size", "1G")
        assert either.json("volume", "show", "db")["size"] == 1 << 30


class TestOverAVolume:
    @pytest.fixture
    def full(self, either: CommandLine, tmp_path: Path) -> CommandLine:
        """A volume db of 40 MiB, all of it written."""
        path = tmp_path / "full"
        path.write_bytes(b"old!" * (10 * MIB))
        either.run("import", path, "db")
        return either

    def test_with_data_wants_overwrite(self, full: CommandLine, image: Path) -> None:
        message = full.fail("import", image, "db")
        assert "volume 'db' holds 40 MiB of data" in message
        assert "--overwrite" in message

    def test_nothing_of_before_is_left(
        self, full: CommandLine, image: Path, tmp_path: Path
    ) -> None:
        full.run("import", image, "db", "--overwrite")
        back = tmp_path / "back"
        full.run("export", "db", back)
        assert back.read_bytes() == image.read_bytes() + bytes(10 * MIB - 512)

    def test_that_is_too_small(self, full: CommandLine, tmp_path: Path) -> None:
        path = tmp_path / "large"
        path.touch()
        os.truncate(path, 41 * MIB)
        message = full.fail("import", path, "db", "--overwrite", status=2)
        assert "41 MiB do not fit into volume 'db' of 40 MiB" in message

    def test_with_another_size_named(self, full: CommandLine, image: Path) -> None:
        message = full.fail("import", image, "db", "--size", "50M", "--overwrite", status=2)
        assert "volume 'db' is there with 40 MiB: leave --size away" in message


class TestFailures:
    def test_a_pool_too_small_leaves_no_volume(self, tmp_path: Path) -> None:
        pool = CommandLine(tmp_path / "small")
        pool.run("pool", "create", "--capacity", "16M", "--journal-size", "1M")
        path = tmp_path / "large"
        path.write_bytes(b"full" * (5 * MIB))
        assert "the pool is full" in pool.fail("import", path, "db")
        assert pool.json("volume", "list") == []
        pool.run("volume", "create", "db", "--size", "1G")

    def test_an_attached_volume_is_left_alone(
        self, commands: CommandLine, hold: Callable[[CommandLine], HeldPool], image: Path
    ) -> None:
        hold(commands)
        commands.run("volume", "create", "db", "--size", "1G")
        commands.server.connections.append(MemoryConnection("db"))
        assert "detach it before importing" in commands.fail("import", image, "db")

    def test_exporting_an_attached_volume_says_that_it_may_be_torn(
        self, commands: CommandLine, hold: Callable[[CommandLine], HeldPool], tmp_path: Path
    ) -> None:
        hold(commands)
        commands.run("volume", "create", "db", "--size", "1M")
        commands.server.connections.append(MemoryConnection("db"))
        result = commands._invoke(("export", "db", tmp_path / "image"), 0, None)
        assert "volume 'db' is attached" in result.stderr

    def test_a_volume_that_was_left_half_may_be_imported_again(
        self, commands: CommandLine, image: Path
    ) -> None:
        async def leave_half() -> None:
            pool = await Pool.open(commands.directory)
            volume = await pool.create_volume("db", 30 * MIB + 512, {"importing": True})
            await volume.write(10 * MIB, b"half" * BLOCK)
            await pool.close()

        asyncio.run(leave_half())
        commands.run("import", image, "db")
        back = image.with_name("back")
        commands.run("export", "db", back)
        assert back.read_bytes() == image.read_bytes()
