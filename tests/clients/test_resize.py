"""Sizes that change while real clients are attached."""

from __future__ import annotations

import pytest

from tests.children import Children
from tests.clients.libnbd import nbdsh
from tests.clients.served_pool import NBDSTORE, ServedPool

pytestmark = pytest.mark.requires("nbdsh")


def test_growing_is_at_once_and_shrinking_waits(served: ServedPool, children: Children) -> None:
    """An attached client keeps the size it was told and goes on; a new one is told the new size."""
    command = [str(NBDSTORE), "--pool", str(served.directory), "volume", "resize", "disk"]
    nbdsh(
        children,
        served.uri(),
        f"""
        import subprocess

        def resize(*words):
            done = subprocess.run([*{command!r}, *words], capture_output=True, text=True)
            return done.returncode, done.stderr

        h.pwrite(b"x" * 4096, (1 << 30) - 4096)
        same(resize("2G"), (0, ""))
        new = nbd.NBD()
        new.connect_uri({served.uri()!r})
        same((h.get_size(), new.get_size()), (1 << 30, 2 << 30))
        new.pwrite(b"y" * 4096, (2 << 30) - 4096)
        h.flush()
        h.set_strict_mode(STRICT_NOTHING)  # what it does not know of
        same(h.pread(4096, (2 << 30) - 4096), b"y" * 4096)
        expect("EINVAL", h.pread, 4096, 2 << 30)

        status, said = resize("1G")
        assert status == 2 and "say so with --shrink" in said, said
        status, said = resize("1G", "--shrink", "--force")
        assert status == 1 and "is attached by" in said and "(2 connections)" in said, said
        same(new.pread(4096, (2 << 30) - 4096), b"y" * 4096)
        """,
    )
    message = served.nbdstore(*command[3:], "1G", "--shrink", status=2)
    assert "4 KiB of data, or space set aside, lie beyond the new size 1 GiB" in message
    served.nbdstore(*command[3:], "1G", "--shrink", "--force")
    nbdsh(
        children,
        served.uri(),
        "same((h.get_size(), h.pread(1, (1 << 30) - 4096)), (1 << 30, b'x'))",
    )
