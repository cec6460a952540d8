"""``nbdstore snapshot``: what it shows."""

from __future__ import annotations

import os
from pathlib import Path

from tests.cli.conftest import CommandLine

MIB = 1 << 20


def test_a_list_tells_what_is_its_own_and_what_deleting_frees(
    either: CommandLine, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    for name, size in (("a", 2 * MIB), ("b", MIB)):
        image.write_bytes(os.urandom(size) + bytes(2 * MIB - size))
        either.run("import", image, "db", "--size", "8M", *(["--overwrite"] if name == "b" else []))
        either.run("snapshot", "create", f"db@{name}")
    header, first, second = either.run("snapshot", "list", "db").splitlines()
    assert header.split() == ["SNAPSHOT", "SIZE", "MAPPED", "OWN", "FREES", "CREATED", "CLONES"]
    assert first.split()[:9] == ["db@a", "8", "MiB", "2", "MiB", "2", "MiB", "2", "MiB"]
    assert second.split()[:9] == ["db@b", "8", "MiB", "1", "MiB", "1", "MiB", "0", "B"]
    either.run("volume", "delete", "db", "--snapshots", "--now")
    assert either.run("snapshot", "list") == "there are no snapshots\n"
