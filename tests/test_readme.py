"""The README is true: its commands run, and print what it says; its table names the protocol.

A `console` block has commands for this machine (``$ ``) and for root on a machine whose kernel has
nbd (``# ``), which is the guest. What a block shows after a command must be what it prints, with
``...`` for anything within a line, or any lines; where it shows nothing, nothing is compared.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdstore.protocol.agreement import CONTEXTS, DIRTY_BITMAP
from nbdstore.protocol.constants import Command, CommandFlag, Info, Option
from tests.children import Children
from tests.clients.served_pool import free_port
from tests.guest.guest import HOST, Guest
from tests.readiness import ReadinessSocket

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
README_PORT = "10809"


@dataclass
class Step:
    """A command of the README, and what it prints according to it."""

    prompt: str
    command: str
    output: str = ""


def steps(text: str) -> Iterator[Step]:
    """Yield the commands of all console blocks, in order."""
    for block in re.findall(r"^```console\n(.*?)^```", text, re.M | re.S):
        found: list[Step] = []
        for line in block.splitlines():
            if line.startswith(("$ ", "# ")):
                found.append(Step(line[0], line[2:]))
            else:
                found[-1].output += line + "\n"
        yield from found


def fits(expected: str, found: str) -> bool:
    """Compare output with the README's, in which ``...`` stands for anything."""
    lines = []
    for line in expected.splitlines():
        words = re.escape(re.sub(r"\s+", " ", line)).replace(r"\ \.\.\.\ ", r"\ (?:.*\ )?")
        pattern = words.replace(r"\.\.\.", ".*").replace(r"\ ", " +") + " *\n"
        lines.append("(?:.*\n)*" if line == "..." else pattern)
    return re.fullmatch("".join(lines), found) is not None


class Reader:
    """Somebody who types what the README says."""

    def __init__(self, children: Children, guest: Guest) -> None:
        self.children = children
        self.guest = guest
        self.port = str(free_port())
        scripts = sysconfig.get_path("scripts")
        self.env = {"HOME": str(children.directory), "PATH": f"{scripts}:{os.environ['PATH']}"}
        self.background: subprocess.Popen[bytes] | None = None

    def type(self, step: Step) -> str:
        """Do what a step says and return what it prints."""
        command = step.command.replace(README_PORT, self.port)
        if step.prompt == "#":
            return self.guest.run(command.replace("127.0.0.1", HOST))
        if command.startswith("export "):
            name, _, value = command.removeprefix("export ").partition("=")
            self.env[name] = value.replace("$HOME", self.env["HOME"])
            return ""
        if command.endswith("&"):
            return self.start(command.removesuffix("&"))
        if command == "kill %1":
            return self.stop()
        command = f"cd {shlex.quote(self.env['HOME'])} && {command}"
        return self.children.run("bash", "-c", command, env=self.env)

    def start(self, command: str) -> str:
        """Start the server; a person sees when it is ready, this reader is told."""
        with ReadinessSocket(self.children.directory / "notify.sock") as readiness:
            self.background = self.children.start(
                *("bash", "-c", f"exec {command}"),
                log="server.log",
                env={**self.env, **readiness.env},
            )
            readiness.wait(self.background)
        return ""

    def stop(self) -> str:
        assert self.background
        self.background.send_signal(signal.SIGTERM)
        assert self.background.wait(60) == 0
        return ""


@pytest.mark.requires("qemu-system-x86_64", "busybox", "modprobe", "depmod", "nbd-client")
@pytest.mark.requires("mkfs.ext4", "nbdinfo", "nbdcopy", "qemu-img")
def test_the_commands_print_what_the_readme_says(children: Children, guest: Guest) -> None:
    reader = Reader(children, guest)
    for step in steps(README):
        found = reader.type(step)
        assert not step.output or fits(step.output, found), (
            f"{step.command}\nprints:\n{found}\nThe README says:\n{step.output}"
        )


@pytest.mark.requires("make", "nbdinfo")
def test_make_serve_serves_a_volume_that_it_made(children: Children) -> None:
    pool = children.directory / "pool"
    port = free_port()
    with ReadinessSocket(children.directory / "notify.sock") as readiness:
        make = children.start(
            *("make", "-C", str(ROOT), "serve", f"LISTEN=127.0.0.1:{port}"),
            log="make.log",
            env={"NBDSTORE_POOL": str(pool), **readiness.env},
        )
        readiness.wait(make)
    uri = f"nbd://127.0.0.1:{port}/demo"
    children.run("nbdinfo", uri)
    make.send_signal(signal.SIGTERM)
    make.wait(60)
    said = (children.directory / "make.log").read_text()
    for line in (uri, f"nbd-client 127.0.0.1 {port} -N demo /dev/nbd0", f"nbdinfo {uri}"):
        assert line in said


@pytest.mark.parametrize(
    "name",
    [
        # PEEK_EXPORT was withdrawn, and a client cannot meet it.
        *(option.name for option in Option if option.name != "PEEK_EXPORT"),
        *(info.name for info in Info),
        *(command.name for command in Command if command.name != "RESIZE"),
        *(flag.name for flag in CommandFlag),
        *(context.label for context in CONTEXTS),
        f"{DIRTY_BITMAP}NAME",
    ],
)
def test_the_matrix_names_all_of_the_protocol(name: str) -> None:
    assert f"`{name}`" in README


def test_output_is_compared() -> None:
    assert fits("size ... 10\n", "size    10 \n")
    assert fits("size ... 10\n", "size  of it 10 \n")
    assert fits("a\n...\nz\n", "a\nb\nc\nz\n")
    assert fits("pool ...: ok\n", "pool /tmp/x: ok\n")
    assert not fits("size ... 10\n", "size    11\n")
    assert not fits("a\n...\nz\n", "a\nb\n")
