"""What the server says of its exports, as libnbd's nbdinfo understands it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.children import Children, CommandError
from tests.clients.served_pool import ServedPool

pytestmark = pytest.mark.requires("nbdinfo")

HOLE = {"type": 3, "description": "hole,zero"}
DATA = {"type": 0, "description": "data"}
FEATURES = ("cache", "df", "fast-zero", "flush", "fua", "multi-conn", "trim", "write", "zero")


def nbdinfo(children: Children, *arguments: str) -> Any:
    # Without --no-content it runs file(1), if there is one.
    return json.loads(children.run("nbdinfo", "--json", "--no-content", *arguments))


def test_the_information_of_an_export(served: ServedPool, children: Children) -> None:
    info = nbdinfo(children, served.uri())
    assert info["protocol"] == "newstyle-fixed"
    assert info["structured"] is True
    (export,) = info["exports"]
    assert export["export-name"] == "disk"
    assert export["export-size"] == 1 << 30
    assert export["is_read_only"] is False
    assert export["is_rotational"] is False
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] == 4096
    assert export["block_size_maximum"] == 32 << 20


def test_every_context_is_listed(served: ServedPool, children: Children) -> None:
    (export,) = nbdinfo(children, served.uri())["exports"]
    assert set(export["contexts"]) >= {"base:allocation", "qemu:allocation-depth"}


def test_everything_is_offered(served: ServedPool, children: Children) -> None:
    for feature in FEATURES:
        children.run("nbdinfo", "--can", feature, served.uri())


def test_a_read_only_server_says_so(pool: ServedPool, children: Children) -> None:
    pool.start("--read-only")
    children.run("nbdinfo", "--is", "read-only", pool.uri())
    children.run("nbdinfo", "--can", "write", pool.uri(), status=2)


def test_the_list_has_every_volume(served: ServedPool, children: Children) -> None:
    served.create_volume("second", "5T")
    exports = nbdinfo(children, "--list", served.unix_uri(""))["exports"]
    sizes = {export["export-name"]: export["export-size"] for export in exports}
    assert sizes == {"disk": 1 << 30, "second": 5 << 40}


def test_the_map_of_a_new_volume_is_one_hole(served: ServedPool, children: Children) -> None:
    assert nbdinfo(children, "--map", served.uri()) == [{"offset": 0, "length": 1 << 30, **HOLE}]


@pytest.mark.requires("qemu-io")
def test_the_map_shows_what_was_written(served: ServedPool, children: Children) -> None:
    children.run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", served.uri())
    assert nbdinfo(children, "--map", served.unix_uri()) == [
        {"offset": 0, "length": 1 << 20, **HOLE},
        {"offset": 1 << 20, "length": 64 << 10, **DATA},
        {"offset": (1 << 20) + (64 << 10), "length": (1 << 30) - (1 << 20) - (64 << 10), **HOLE},
    ]


def test_a_name_that_is_no_export_is_refused_by_name(
    served: ServedPool, children: Children
) -> None:
    with pytest.raises(CommandError, match="no-such-disk"):
        children.run("nbdinfo", served.uri("no-such-disk"))


def test_the_only_volume_is_the_default_export(served: ServedPool, children: Children) -> None:
    assert children.run("nbdinfo", "--size", served.uri("")) == f"{1 << 30}\n"
