"""Single requests by qemu-io: patterns, zeroes and discards, with and without FUA."""

from __future__ import annotations

import pytest

from tests.children import Children
from tests.clients.served_pool import ServedPool

pytestmark = pytest.mark.requires("qemu-io")


def qemu_io(children: Children, uri: str, *commands: str) -> None:
    """Run commands of qemu-io, with discards passed on; a pattern that does not match fails."""
    __tracebackhide__ = True
    arguments = [word for command in commands for word in ("-c", command)]
    output = children.run("qemu-io", "-f", "raw", "-d", "unmap", *arguments, uri)
    assert "failed" not in output, output


CASES = {
    "a write is read back": ["write -P 0x11 0 64k", "read -P 0x11 0 64k"],
    "a write that is not aligned": [
        "write -P 0x22 511 5000",
        "read -P 0 0 511",
        "read -P 0x22 511 5000",
        "read -P 0 5511 4096",
    ],
    "a write with FUA": ["write -f -P 0x33 4k 4k", "read -P 0x33 4k 4k"],
    "the second write wins": ["write -P 1 0 1M", "write -P 2 0 1M", "read -P 2 0 1M"],
    "a flush": ["write -P 0x44 0 1M", "flush", "read -P 0x44 0 1M"],
    "a discard reads as zeroes": [
        "write -P 0x55 0 1M",
        "discard 64k 64k",
        "read -P 0x55 0 64k",
        "read -P 0 64k 64k",
        "read -P 0x55 128k 896k",
    ],
    "zeroes that keep their space": ["write -P 0x66 0 1M", "write -z 4k 8k", "read -P 0 4k 8k"],
    "zeroes that give their space back": [
        "write -P 0x77 0 1M",
        "write -zu 4k 512k",
        "read -P 0 4k 512k",
        "read -P 0x77 516k 508k",
    ],
    "zeroes that are not aligned": [
        "write -P 0x88 0 64k",
        "write -z 1000 30000",
        "read -P 0x88 0 1000",
        "read -P 0 1000 30000",
        "read -P 0x88 31000 30000",
    ],
    "many writes in flight": [
        *[f"aio_write -P {n + 1} {n * 64}k 64k" for n in range(64)],
        "aio_flush",
        *[f"read -P {n + 1} {n * 64}k 64k" for n in range(64)],
    ],
    "the last byte": ["write -P 0x99 1073741823 1", "read -P 0x99 1073741823 1"],
}


@pytest.mark.parametrize("commands", CASES.values(), ids=CASES.keys())
def test_qemu_io(served: ServedPool, children: Children, commands: list[str]) -> None:
    qemu_io(children, served.uri(), *commands)


def test_what_was_flushed_is_there_after_a_kill(served: ServedPool, children: Children) -> None:
    qemu_io(children, served.uri(), "write -P 0xaa 0 4M", "write -z 1M 1M", "flush")
    served.kill()
    served.restart()
    qemu_io(
        children,
        served.unix_uri(),
        *("read -P 0xaa 0 1M", "read -P 0 1M 1M", "read -P 0xaa 2M 2M"),
    )
