"""``nbdstore volume``, with and without a server that holds the pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nbdstore.store import Pool
from tests.cli.conftest import CommandLine, HeldPool
from tests.control.memory_pool import MemoryConnection

Hold = Callable[[CommandLine], HeldPool]


def names(commands: CommandLine) -> list[str]:
    return [volume["name"] for volume in commands.json("volume", "list")]


class TestALife:
    def test_create(self, either: CommandLine) -> None:
        assert (
            either.run("volume", "create", "db", "--size", "10G") == "created volume db, 10 GiB\n"
        )
        volume = either.json("volume", "show", "db")
        assert (volume["size"], volume["mapped"], volume["allow"]) == (10 << 30, 0, [])

    def test_create_says_what_it_made(self, either: CommandLine) -> None:
        volume = either.json("volume", "create", "db", "--size", "1M", "--allow", "alice")
        shown = either.json("volume", "show", "db")
        assert shown == volume | {"attachments": []}
        assert volume["allow"] == ["alice"]

    def test_list(self, either: CommandLine) -> None:
        assert "no volumes yet: make one with" in either.run("volume", "list")
        either.run("volume", "create", "web", "--size", "1.5T")
        either.run("volume", "create", "db", "--size", "512M", "--allow", "alice")
        header, db, web = either.run("volume", "list").splitlines()
        assert header.split() == ["NAME", "SIZE", "MAPPED", "ATTACHED", "BY", "CREATED", "NOTES"]
        assert db.split()[:7] == ["db", "512", "MiB", "0", "B", "-", "-"]
        assert db.endswith("for alice")
        assert web.split()[:3] == ["web", "1.5", "TiB"]

    def test_resize(self, either: CommandLine) -> None:
        either.run("volume", "create", "db", "--size", "1G")
        assert "2 GiB now" in either.run("volume", "resize", "db", "2G")
        assert either.json("volume", "resize", "db", "512M", "--shrink")["size"] == 512 << 20

    def test_rename(self, either: CommandLine) -> None:
        either.run("volume", "create", "db", "--size", "1G")
        assert either.run("volume", "rename", "db", "web") == "volume db is called web now\n"
        assert names(either) == ["web"]

    def test_delete(self, either: CommandLine) -> None:
        either.run("volume", "create", "db", "--size", "1G")
        assert either.run("volume", "delete", "db") == "deleted volume db\n"
        assert "'nbdstore trash restore db' brings it back" in either.fail("volume", "show", "db")
        assert names(either) == []

    def test_allow(self, either: CommandLine) -> None:
        either.run("volume", "create", "db", "--size", "1G")
        assert "by: anyone" in either.run("volume", "allow", "db")
        assert "by: alice, bob" in either.run("volume", "allow", "db", "alice", "bob")
        assert either.json("volume", "allow", "db")["allow"] == ["alice", "bob"]
        assert either.json("volume", "allow", "db", "--anyone")["allow"] == []

    def test_limits(self, either: CommandLine) -> None:
        either.run("volume", "create", "db", "--size", "1G")
        assert "limits    none\n" in either.run("volume", "show", "db")
        said = either.run("volume", "set", "db", "--iops", "100", "--bandwidth", "1.5M")
        assert said == "limits of volume db: 100 requests/s, 1.5 MiB/s, bursts of 1 s\n"
        info = either.json("volume", "set", "db", "--iops", "none", "--burst", "0.5")
        assert (info["iops"], info["bandwidth"], info["burst_s"]) == (0, 3 << 19, 0.5)
        assert "limits    1.5 MiB/s, bursts of 0.5 s\n" in either.run("volume", "show", "db")
        assert "1.5 MiB/s, bursts" in either.run("volume", "list")
        assert "volume db: none" in either.run("volume", "set", "db", "--bandwidth", "0")


class TestRefusals:
    def test_a_name_that_is_taken(self, either: CommandLine) -> None:
        either.run("volume", "create", "db", "--size", "1G")
        either.run("volume", "create", "web", "--size", "1G")
        for words in (("create", "db", "--size", "1G"), ("rename", "web", "db")):
            assert "'db' exists already: choose another name" in either.fail("volume", *words)

    def test_a_size_that_makes_no_sense(self, either: CommandLine) -> None:
        message = either.fail("volume", "create", "db", "--size", "0", status=2)
        assert "volume size 0: must be above 0" in message

    def test_limits_that_make_no_sense(self, either: CommandLine) -> None:
        either.run("volume", "create", "db", "--size", "1G")
        for words, said in (
            ((), "say what to set"),
            (("--iops", "many"), "'many' is neither a whole number below 10^18 nor"),
            (("--iops", "-1"), "'-1' is neither"),
            (("--bandwidth", "1K"), "1 KiB per second: give at least 64 KiB"),
            (("--bandwidth", "x"), "x"),
            (("--burst", "-1"), "-1"),
            (("--burst", "4000"), "a burst of 4000 seconds"),
        ):
            assert said in either.fail("volume", "set", "db", *words, status=2)

    def test_shrinking_below_data(self, either: CommandLine) -> None:
        image = either.directory.with_name("image")
        image.write_bytes(bytes(1 << 20) + b"x" * 4096)
        either.run("import", image, "db")
        message = either.fail("volume", "resize", "db", "1M", status=2)
        assert "say so with --shrink" in message
        message = either.fail("volume", "resize", "db", "1M", "--force", status=2)
        assert "--force goes with --shrink" in message
        message = either.fail("volume", "resize", "db", "1M", "--shrink", status=2)
        assert "4 KiB of data, or space set aside, lie beyond the new size 1 MiB" in message
        either.run("volume", "resize", "db", "1M", "--shrink", "--force")


class TestAttached:
    def test_is_shown(self, commands: CommandLine, hold: Hold) -> None:
        hold(commands)
        commands.run("volume", "create", "db", "--size", "1G")
        commands.server.connections.append(MemoryConnection("db", tls_name="alice"))
        assert commands.json("volume", "list")[0]["attached"] == 1
        text = commands.run("volume", "show", "db")
        assert "attached  1 connection\n" in text
        assert "192.0.2.7:4711  20" in commands.run("volume", "list")
        assert "192.0.2.7:4711" in text
        assert "alice" in text

    def test_refuses_to_be_deleted(self, commands: CommandLine, hold: Hold) -> None:
        hold(commands)
        commands.run("volume", "create", "db", "--size", "1G")
        commands.server.connections.append(MemoryConnection("db"))
        message = commands.fail("volume", "delete", "db")
        assert "'db' is attached by 192.0.2.7:4711 (1 connection): detach it" in message
        assert commands.run("volume", "delete", "db", "--fence") == "deleted volume db\n"
        assert commands.server.fenced == [("192.0.2.7:4711", "the volume is deleted")]


def test_an_unfinished_import_is_shown(commands: CommandLine) -> None:
    async def leave_one() -> None:
        pool = await Pool.open(commands.directory)
        await pool.create_volume("db", 1 << 20, {"importing": True})
        await pool.close()

    asyncio.run(leave_one())
    assert "import not finished" in commands.run("volume", "list")
    assert "import again, or delete the volume" in commands.run("volume", "show", "db")
