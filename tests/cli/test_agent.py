"""The agent's commands as far as they go without a device; what they do is in tests/agent."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from nbdstore.commands.agent import parse_mount
from tests.cli.conftest import CommandLine


def test_what_is_to_be_mounted_is_one_word() -> None:
    request = parse_mount(
        'volume=db,path=/srv/db,fs=xfs,size=10G,owner=1:2,mode=2770,ro,"options=noatime,nodev"'
    )
    assert (request.volume, request.path, request.filesystem) == ("db", "/srv/db", "xfs")
    assert (request.size, request.owner, request.mode) == (10 << 30, "1:2", "2770")
    assert (request.read_only, request.options) == (True, "noatime,nodev")
    assert parse_mount("volume=db,path=/srv,ro=false").read_only is False


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "'' is none of|lacks"),
        ("volume=db", "lacks volume= or path="),
        ("path=/srv", "lacks volume= or path="),
        ("volume=db,path=/srv,colour=red", "'colour' is none of"),
        ("volume=db,path=/srv,size=lots", "is not a size"),
    ],
)
def test_mount_words_that_make_no_sense(spec: str, words: str) -> None:
    with pytest.raises(click.UsageError, match=words):
        parse_mount(spec)


def test_without_an_agent_and_without_anything_attached(
    commands: CommandLine, tmp_path: Path
) -> None:
    places = ("--state", tmp_path / "state", "--socket", tmp_path / "none.sock")
    assert "nothing is attached" in commands.run("agent", "status", *places)
    assert commands.run("doctor", *places, status=1).startswith("server: the server does not")
    assert "not attached here" in commands.fail("detach", "db", *places)
    assert "no volume is mounted at /srv" in commands.fail("umount", "/srv", *places)
