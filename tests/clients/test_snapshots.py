"""Snapshots, clones, rollback and the trash, by command line and real clients, under load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.children import Children, CommandError
from tests.clients.libnbd import nbdsh
from tests.clients.served_pool import ServedPool

pytestmark = pytest.mark.requires("qemu-io", "qemu-img", "nbdinfo", "nbdcopy", "nbdsh", "fio")

MIB = 1 << 20


def write(children: Children, uri: str, *commands: str) -> None:
    options = [part for command in commands for part in ("-c", command)]
    children.run("qemu-io", "-f", "raw", *options, uri)


def verify(children: Children, uri: str, *commands: str) -> None:
    options = [part for command in commands for part in ("-c", command)]
    said = children.run("qemu-io", "-r", "-f", "raw", *options, uri)
    assert "verification failed" not in said


def snapshots(pool: ServedPool) -> dict[str, Any]:
    return {
        found["snapshot"]: found
        for found in json.loads(pool.nbdstore("snapshot", "list", "--json"))
    }


def test_a_snapshot_is_read_and_cloned_while_the_volume_goes_on(
    served: ServedPool, children: Children, tmp_path: Path
) -> None:
    write(children, served.uri(), "write -P 1 0 8M", "write -P 2 100M 1M")
    served.nbdstore("snapshot", "create", "disk@first")
    write(children, served.uri(), "write -P 3 4M 1M", "discard 100M 1M")
    verify(children, served.uri("disk@first"), "read -P 1 0 8M", "read -P 2 100M 1M")
    verify(children, served.uri(), "read -P 3 4M 1M", "read -P 0 100M 1M")
    with pytest.raises(CommandError):
        write(children, served.uri("disk@first"), "write -P 9 0 4k")
    served.nbdstore("clone", "disk@first", "copy")
    write(children, served.uri("copy"), "write -P 4 0 1M")
    verify(children, served.uri("copy"), "read -P 4 0 1M", "read -P 1 1M 7M")
    children.run("nbdcopy", served.uri("disk@first"), tmp_path / "first.raw")
    with (tmp_path / "first.raw").open("rb") as image:
        assert image.read(8 * MIB) == b"\1" * 8 * MIB
    served.stop()
    served.restart()
    verify(children, served.uri("copy"), "read -P 4 0 1M", "read -P 1 1M 7M")
    verify(children, served.uri("disk@first"), "read -P 1 0 8M")


def test_backup_tools_are_told_what_has_changed(
    served: ServedPool, children: Children, tmp_path: Path
) -> None:
    write(children, served.uri(), "write -P 1 0 8M")
    served.nbdstore("snapshot", "create", "disk@a")
    write(children, served.uri(), "write -P 2 1M 64k", "write -P 3 2M 4k", "discard 6M 1M")
    said = children.run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:a", served.uri(), status=0)
    dirty = [(e["offset"], e["length"]) for e in json.loads(said) if e["type"] == 1]
    assert dirty == [(MIB, 65536), (2 * MIB, 4096), (6 * MIB, MIB)]
    description = json.dumps(
        {
            "driver": "raw",
            "file": {
                "driver": "nbd",
                "server": {"type": "unix", "path": str(served.socket_path)},
                "export": "disk",
                "x-dirty-bitmap": "qemu:dirty-bitmap:a",
            },
        }
    )
    # qemu shows a dirty bitmap as if what is dirty held no data.
    said = children.run("qemu-img", "map", "--output=json", f"json:{description}")
    found = [(e["start"], e["length"]) for e in json.loads(said) if not e["data"]]
    assert found == dirty


def test_several_volumes_have_one_moment_while_they_are_written(
    served: ServedPool, children: Children
) -> None:
    """A writer puts the same number into one volume, then into the other, again and again."""
    served.create_volume("other", "1G")
    script = f"""
import nbd
one, other = nbd.NBD(), nbd.NBD()
one.connect_uri({served.unix_uri("disk")!r})
other.connect_uri({served.unix_uri("other")!r})
for number in range(1, 1 << 60):
    for disk in (one, other):
        disk.pwrite(number.to_bytes(8, "big"), 4096)
"""
    writer = children.start("nbdsh", "-c", script, log="writer.log", env={"PATH": "/usr/bin:/bin"})
    for number in range(5):
        served.nbdstore("snapshot", "create", f"disk@n{number}", f"other@n{number}")
    assert writer.poll() is None, "the writer ended early"
    writer.terminate()
    writer.wait(60)
    found = []
    for number in range(5):
        pair = []
        for volume in ("disk", "other"):
            uri = served.unix_uri(f"{volume}@n{number}")
            said = nbdsh(children, uri, 'print(int.from_bytes(h.pread(8, 4096), "big"))')
            pair.append(int(said))
        assert pair[0] - pair[1] in (0, 1)
        found.append(pair[0])
    assert found == sorted(found) and found[-1] > 0
    for number in (2, 0, 4, 1, 3):
        served.nbdstore("snapshot", "delete", f"disk@n{number}", f"other@n{number}")
    assert snapshots(served) == {}


@pytest.mark.parametrize("how", ["served", "not served"])
def test_rollback_brings_back_what_was(pool: ServedPool, children: Children, how: str) -> None:
    pool.start()
    write(children, pool.uri(), "write -P 1 0 1M")
    pool.nbdstore("snapshot", "create", "disk@a")
    write(children, pool.uri(), "write -P 2 0 1M")
    if how == "not served":
        pool.stop()
    assert "as it was at disk@a" in pool.nbdstore("snapshot", "rollback", "disk@a")
    if how == "not served":
        pool.restart()
    verify(children, pool.uri(), "read -P 1 0 1M")


def test_rollback_wants_the_volume_detached_or_fenced(
    served: ServedPool, children: Children
) -> None:
    served.nbdstore("snapshot", "create", "disk@a")
    client = children.start(
        *("fio", "--name=load", "--ioengine=nbd", f"--uri={served.unix_uri()}", "--rw=randwrite"),
        *("--bs=4k", "--iodepth=1", "--size=64M", "--time_based", "--runtime=300"),
        log="fio.log",
    )
    while "disk" not in served.nbdstore("ps"):
        assert client.poll() is None
    assert "is attached" in served.nbdstore("snapshot", "rollback", "disk@a", status=1)
    served.nbdstore("snapshot", "rollback", "disk@a", "--fence")
    assert client.wait(60) != 0
    verify(children, served.uri(), "read -P 0 0 64M")


def test_a_deleted_volume_comes_back_with_its_snapshots(
    served: ServedPool, children: Children
) -> None:
    write(children, served.uri(), "write -P 1 0 1M")
    served.nbdstore("snapshot", "create", "disk@a")
    assert "--snapshots" in served.nbdstore("volume", "delete", "disk", status=1)
    served.nbdstore("volume", "delete", "disk", "--snapshots")
    served.create_volume("disk", "1M")
    assert "exists" in served.nbdstore("trash", "restore", "disk", status=1)
    served.nbdstore("trash", "restore", "disk", "--as", "old")
    verify(children, served.uri("old@a"), "read -P 1 0 1M")
    served.nbdstore("volume", "delete", "old", "--snapshots")
    assert "old" in served.nbdstore("trash", "list")
    served.nbdstore("trash", "empty")
    assert served.nbdstore("trash", "list") == "the trash is empty\n"


def test_what_deleting_frees_is_told_before(served: ServedPool, children: Children) -> None:
    write(children, served.uri(), "write -P 1 0 16M")
    served.nbdstore("snapshot", "create", "disk@a")
    write(children, served.uri(), "write -P 2 0 10M")
    assert snapshots(served)["disk@a"]["unique"] == 10 * MIB
    before = served.show()["used"]
    served.nbdstore("snapshot", "delete", "disk@a")
    assert before - served.show()["used"] >= 10 * MIB


def test_errors_say_what_to_do(served: ServedPool) -> None:
    for arguments, said in (
        (("snapshot", "create", "disk"), "VOLUME@NAME"),
        (("snapshot", "create", "nothing@a"), "no volume 'nothing'"),
        (("snapshot", "delete", "disk@a"), "nbdstore snapshot list disk"),
        (("snapshot", "rollback", "disk@a"), "no snapshot 'disk@a'"),
        (("clone", "disk@a", "b"), "no snapshot 'disk@a'"),
        (("trash", "restore", "disk"), "nbdstore trash list"),
        (("flatten", "nothing"), "no volume 'nothing'"),
    ):
        status = 2 if "VOLUME@NAME" in said else 1
        assert said in served.nbdstore(*arguments, status=status)
