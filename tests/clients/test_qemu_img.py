"""Disk images through qemu-img, QEMU's own NBD client."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.children import Children
from tests.clients.images import DATA, SIZE, write_sparse_image
from tests.clients.served_pool import ServedPool

pytestmark = pytest.mark.requires("qemu-img")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_sparse_image(tmp_path / "image")


@pytest.fixture
def filled(served: ServedPool, children: Children, image: Path) -> ServedPool:
    """A server whose volume "exact" holds the image, converted into it over NBD."""
    served.create_volume("exact", str(SIZE))
    convert(children, image, served.uri("exact"), "-n", "-f", "raw", "-O", "raw")
    return served


def convert(children: Children, source: Path | str, target: Path | str, *options: str) -> None:
    children.run("qemu-img", "convert", *options, source, target)


def compare(children: Children, one: Path | str, other: Path | str) -> None:
    assert children.run("qemu-img", "compare", one, other) == "Images are identical.\n"


def blocks(ranges: Iterable[tuple[int, int]]) -> set[int]:
    """Return the blocks of 4 KiB that ranges of (offset, length) touch."""
    return {
        block
        for offset, length in ranges
        for block in range(offset // 4096, (offset + length - 1) // 4096 + 1)
    }


def test_a_converted_image_compares_equal(
    filled: ServedPool, children: Children, image: Path
) -> None:
    compare(children, image, filled.unix_uri("exact"))


def test_an_image_goes_through_qcow2_and_back(
    filled: ServedPool, children: Children, image: Path, tmp_path: Path
) -> None:
    convert(children, filled.uri("exact"), tmp_path / "copy.qcow2", "-O", "qcow2")
    filled.create_volume("back", str(SIZE))
    convert(children, tmp_path / "copy.qcow2", filled.uri("back"), "-n", "-O", "raw")
    compare(children, image, filled.uri("back"))


def test_parallel_unordered_copies(filled: ServedPool, children: Children, image: Path) -> None:
    filled.create_volume("copy", str(SIZE))
    convert(children, filled.uri("exact"), filled.uri("copy"), "-n", "-W", "-m", "16", "-O", "raw")
    compare(children, image, filled.uri("copy"))


def test_the_map_has_data_just_where_the_image_has(filled: ServedPool, children: Children) -> None:
    extents = json.loads(children.run("qemu-img", "map", "--output=json", filled.uri("exact")))
    assert sum(extent["length"] for extent in extents) == SIZE
    found = [(extent["start"], extent["length"]) for extent in extents if extent["data"]]
    assert blocks(found) == blocks(DATA)


def test_the_size_is_the_volumes(filled: ServedPool, children: Children) -> None:
    info = json.loads(children.run("qemu-img", "info", "--output=json", filled.uri("exact")))
    assert info["virtual-size"] == SIZE
