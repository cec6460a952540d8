"""The benchmarks that have commands of their own run, small; figures are not looked at.

`benchmarks.agent memory` is not here: it watches idle attachments for as long as it takes to tell
their cost, in an emulated machine.
"""

from __future__ import annotations

import sys

import pytest

from benchmarks.peers import ROOT
from tests.agent.served import Served
from tests.children import Children
from tests.clients.served_pool import ServedPool

HERE = {"PYTHONPATH": str(ROOT)}


def test_what_snapshots_cost_is_told_of_each_change(children: Children) -> None:
    pool = children.directory / "pool"
    said = children.run(
        *(sys.executable, "-m", "benchmarks.snapshots", "--mapped", "1", pool), env=HERE
    )
    assert said.startswith("1 GiB mapped in ")
    assert said.count(" s   longest slice ") == 10
    assert not pool.exists()


@pytest.mark.requires("root", "/dev/fuse", "/dev/loop-control", "nbdfuse", "fusermount3")
@pytest.mark.requires("losetup", "mkfs.ext4", "mount")
def test_what_an_attach_takes_is_told(children: Children) -> None:
    pool = ServedPool(children, children.directory)
    pool.create("--capacity", "2G")
    served = Served(pool, children.directory)
    said = children.run(
        *(sys.executable, "-m", "benchmarks.agent", "time"),
        env={
            **HERE,
            "NBDSTORE_SERVER": f"http://127.0.0.1:{served.control_port}",
            "NBDSTORE_TOKEN_FILE": str(served.token_file),
            "NBDSTORE_NBD": f"127.0.0.1:{pool.port}",
        },
    )
    assert "attach to mounted: median " in said
    pool.close()
