"""Backups of what real clients write, between real servers: compared, killed, damaged, gone on."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.children import Children, CommandError
from tests.clients.images import write_sparse_image
from tests.clients.served_pool import NBDSTORE, ServedPool

pytestmark = pytest.mark.requires("qemu-img", "qemu-io", "nbdcopy", "nbdinfo")

MIB = 1 << 20


@pytest.fixture
def backup(children: Children, tmp_path: Path) -> Iterator[ServedPool]:
    """Another pool, empty and not served yet."""
    directory = tmp_path / "backup"
    directory.mkdir()
    pool = ServedPool(children, directory)
    pool.create("--capacity", "8G", "--journal-size", "16M")
    yield pool
    pool.close()


def write(pool: ServedPool, *commands: str) -> None:
    options = [part for command in commands for part in ("-c", command)]
    pool.children.run("qemu-io", "-f", "raw", *options, pool.uri())


def send(pool: ServedPool, *arguments: str, to: Path) -> Path:
    """Send to a file."""
    words = [str(NBDSTORE), "--pool", str(pool.directory), "send", *arguments]
    pool.children.run("bash", "-c", f"{shlex.join(words)} > {shlex.quote(str(to))}")
    return to


def receive(pool: ServedPool, name: str, stream: Path, *, status: int = 0) -> str:
    """Receive from a file."""
    words = [str(NBDSTORE), "--pool", str(pool.directory), "receive", name]
    return pool.children.run(
        "bash", "-c", f"{shlex.join(words)} < {shlex.quote(str(stream))}", status=status
    )


def pipe(source: ServedPool, target: ServedPool, name: str, *arguments: str) -> str:
    """Send from one pool into another."""
    sender = [str(NBDSTORE), "--pool", str(source.directory), "send", *arguments]
    receiver = [str(NBDSTORE), "--pool", str(target.directory), "receive", name]
    script = f"set -o pipefail; {shlex.join(sender)} | {shlex.join(receiver)}"
    return source.children.run("bash", "-c", script, timeout_s=300)


def same(pool: ServedPool, backup: ServedPool, *names: tuple[str, str]) -> None:
    """Compare exports, content and size, by QEMU's means."""
    for ours, theirs in names:
        uris = [pool.uri(ours), backup.uri(theirs)]
        # Not in strict mode (-s), which wants the same of zeros that have space set aside.
        compared = ["qemu-img", "compare", "-f", "raw", "-F", "raw", *uris]
        pool.children.run(*compared, timeout_s=300)
        sizes = {pool.children.run("nbdinfo", "--size", uri) for uri in uris}
        assert len(sizes) == 1


def test_three_increments_between_two_servers(
    served: ServedPool, backup: ServedPool, children: Children, tmp_path: Path
) -> None:
    backup.start()
    image = write_sparse_image(tmp_path / "image")
    children.run("nbdcopy", image, served.uri())
    served.nbdstore("snapshot", "create", "disk@0")
    pipe(served, backup, "disk", "disk@0")
    changes = [
        ("write -P 1 0 3M", "discard 5M 1M", "write -z 9M 1M"),
        ("write -P 2 500M 64k", "write -P 3 1023M 1M"),
        ("write -P 4 777k 1k", "discard 0 64M", "write -P 5 1M 4k"),
    ]
    for n, commands in enumerate(changes, 1):
        write(served, *commands)
        served.nbdstore("snapshot", "create", f"disk@{n}")
        write(served, "write -P 99 300M 1M")  # which is in the next one
        pipe(served, backup, "disk", f"disk@{n}", "--since", f"disk@{n - 1}")
    names = [f"disk@{n}" for n in range(4)]
    same(served, backup, *((name, name) for name in names), ("disk@3", "disk"))
    ours, theirs = (
        json.loads(pool.nbdstore("snapshot", "list", "--json")) for pool in (served, backup)
    )
    assert [info["uuid"] for info in ours] == [info["uuid"] for info in theirs]
    assert [info["mapped"] for info in ours] == [info["mapped"] for info in theirs]
    copied = tmp_path / "copied"
    children.run("nbdcopy", backup.uri("disk@0"), copied)
    with image.open("rb") as original, copied.open("rb") as copy:
        assert copy.read(image.stat().st_size) == original.read()


def test_into_files_and_back_without_any_server(
    pool: ServedPool, backup: ServedPool, tmp_path: Path
) -> None:
    pool.start()
    write(pool, "write -P 1 0 3M", "write -P 2 900M 1M")
    pool.nbdstore("snapshot", "create", "disk@a")
    write(pool, "write -P 3 1M 1M", "discard 900M 512k")
    pool.nbdstore("volume", "resize", "disk", "2G")
    write(pool, "write -P 4 1500M 1M")
    pool.nbdstore("snapshot", "create", "disk@b")
    pool.stop()
    full = send(pool, "disk@a", to=tmp_path / "full")
    changes = send(pool, "disk@b", "--since", "disk@a", to=tmp_path / "changes")
    assert full.stat().st_size < 5 * MIB
    assert changes.stat().st_size < 3 * MIB
    for stream in (full, changes):
        backup.nbdstore("stream", "show", str(stream))
        receive(backup, "copy", stream)
    pool.restart()
    backup.start()
    same(pool, backup, ("disk@a", "copy@a"), ("disk@b", "copy@b"), ("disk@b", "copy"))


def test_what_changed_is_what_the_dirty_bitmap_says(served: ServedPool, children: Children) -> None:
    write(served, "write -P 1 0 4M", "write -P 1 100M 1M")
    served.nbdstore("snapshot", "create", "disk@a")
    write(served, "write -P 2 1M 64k", "discard 100M 4k", "write -P 3 1000M 12k")
    found = json.loads(served.nbdstore("diff", "disk@a", "disk", "--json"))
    context = "qemu:dirty-bitmap:a"
    listed = children.run("nbdinfo", "--json", f"--map={context}", served.uri())
    dirty = [
        {"offset": extent["offset"], "length": extent["length"]}
        for extent in json.loads(listed)
        if extent["type"]
    ]
    assert found == dirty
    assert [extent["offset"] for extent in found] == [MIB, 100 * MIB, 1000 * MIB]


def test_a_client_that_is_attached_keeps_a_receiver_out(
    served: ServedPool, backup: ServedPool, children: Children, tmp_path: Path
) -> None:
    write(served, "write -P 1 0 3M")
    served.nbdstore("snapshot", "create", "disk@a")
    pipe(served, backup, "disk", "disk@a")
    write(served, "write -P 2 0 1M")
    served.nbdstore("snapshot", "create", "disk@b")
    changes = send(served, "disk@b", "--since", "disk@a", to=tmp_path / "changes")
    backup.start()
    client = subprocess.Popen(
        ["qemu-io", "-f", "raw", backup.uri()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        wait_for(lambda: json.loads(backup.nbdstore("ps", "--json")) != [])
        assert "is attached by" in receive(backup, "disk", changes, status=1)
    finally:
        client.communicate(b"quit\n", timeout=60)
    wait_for(lambda: json.loads(backup.nbdstore("ps", "--json")) == [])
    receive(backup, "disk", changes)
    same(served, backup, ("disk@b", "disk"))


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Ask again and again, each time by a command, which takes a moment."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline


@pytest.mark.parametrize("victim", ["receiver", "sender"])
def test_a_server_killed_on_the_way_and_the_transfer_goes_on(
    served: ServedPool, backup: ServedPool, children: Children, victim: str
) -> None:
    write(served, *(f"write -P {n + 1} {n * 40}M 20M" for n in range(10)))
    served.nbdstore("snapshot", "create", "disk@a")
    backup.start()
    # Slowed down in the middle, so that the kill finds it half-way.
    sender = shlex.join([str(NBDSTORE), "--pool", str(served.directory), "send", "disk@a"])
    receiver = shlex.join([str(NBDSTORE), "--pool", str(backup.directory), "receive", "disk"])
    gate = backup.directory.parent / "gate"
    os.mkfifo(gate)
    half = f"{{ head -c 150000000; read < {shlex.quote(str(gate))}; cat; }}"
    script = f"set -o pipefail; {sender} | {half} | {receiver}"
    transfer = children.start("bash", "-c", script, log="transfer.log")
    wait_for(lambda: position(backup) >= 64 * MIB)
    with pytest.raises(CommandError):  # nobody may have it now
        children.run("nbdinfo", backup.uri("disk"))
    (backup if victim == "receiver" else served).kill()
    gate.write_text("go on\n")
    assert transfer.wait(60) != 0
    (backup if victim == "receiver" else served).restart()
    kept = position(backup)
    assert 64 * MIB <= kept < 380 * MIB
    assert "half received, with disk@a" in backup.nbdstore("volume", "list")
    token = backup.nbdstore("receive", "--resume-token", "disk").strip()
    said = pipe(served, backup, "disk", "--resume", token)
    assert "received disk@a: " in said
    same(served, backup, ("disk@a", "disk@a"), ("disk@a", "disk"))


def position(pool: ServedPool) -> int:
    """How far a volume has been received, durably; -1 if it is not being received."""
    try:
        said = pool.nbdstore("receive", "--resume-token", "disk", "--json")
    except CommandError:
        return -1
    return int(json.loads(said)["position"])


def test_a_wrong_byte_is_found_and_nothing_of_it_is_seen(
    served: ServedPool, backup: ServedPool, children: Children, tmp_path: Path
) -> None:
    write(served, "write -P 1 0 3M", "write -P 2 900M 1M")
    served.nbdstore("snapshot", "create", "disk@a")
    stream = send(served, "disk@a", to=tmp_path / "stream")
    backup.start()
    size = stream.stat().st_size
    for at in (20, 500, MIB + 3, size - 1):
        damaged = bytearray(stream.read_bytes())
        damaged[at] ^= 0x40
        wrong = tmp_path / "wrong"
        wrong.write_bytes(damaged)
        assert backup.nbdstore("stream", "show", str(wrong), status=1)
        receive(backup, "disk", wrong, status=1)
        assert json.loads(backup.nbdstore("snapshot", "list", "--json")) == []
        assert "disk" not in children.run("nbdinfo", "--list", backup.uri(""), status=None)
    receive(backup, "disk", stream)
    same(served, backup, ("disk@a", "disk@a"))
