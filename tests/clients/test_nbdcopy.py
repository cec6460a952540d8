"""Whole images in and out, by libnbd's nbdcopy over four connections."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

from tests.children import Children
from tests.clients.images import SIZE, write_sparse_image
from tests.clients.served_pool import ServedPool

pytestmark = pytest.mark.requires("nbdcopy")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_sparse_image(tmp_path / "image")


@pytest.fixture
def exact(served: ServedPool) -> ServedPool:
    """A server with volumes of exactly the image's size."""
    served.create_volume("exact", str(SIZE))
    served.create_volume("other", str(SIZE))
    return served


def test_an_image_comes_back_as_it_was(
    exact: ServedPool, children: Children, image: Path, tmp_path: Path
) -> None:
    children.run("nbdcopy", image, exact.uri("exact"))
    children.run("nbdcopy", exact.unix_uri("exact"), tmp_path / "copy")
    assert filecmp.cmp(image, tmp_path / "copy", shallow=False)


def test_an_image_comes_back_after_a_restart(
    exact: ServedPool, children: Children, image: Path, tmp_path: Path
) -> None:
    children.run("nbdcopy", "--flush", image, exact.unix_uri("exact"))
    exact.stop()
    exact.restart()
    children.run("nbdcopy", exact.uri("exact"), tmp_path / "copy")
    assert filecmp.cmp(image, tmp_path / "copy", shallow=False)


def test_a_volume_is_copied_to_another(
    exact: ServedPool, children: Children, image: Path, tmp_path: Path
) -> None:
    children.run("nbdcopy", image, exact.uri("exact"))
    children.run("nbdcopy", exact.uri("exact"), exact.unix_uri("other"))
    children.run("nbdcopy", exact.uri("other"), tmp_path / "copy")
    assert filecmp.cmp(image, tmp_path / "copy", shallow=False)


def test_holes_stay_holes(exact: ServedPool, children: Children, image: Path) -> None:
    children.run("nbdcopy", image, exact.uri("exact"))
    assert exact.show()["used"] < 8 << 20


def test_synchronous_requests_over_one_connection(
    exact: ServedPool, children: Children, image: Path, tmp_path: Path
) -> None:
    children.run("nbdcopy", "--synchronous", "--connections=1", image, exact.uri("exact"))
    children.run("nbdcopy", "--connections=1", exact.uri("exact"), tmp_path / "copy")
    assert filecmp.cmp(image, tmp_path / "copy", shallow=False)
