"""The reference client, as far as it goes without a kernel driver; see test_linux_kernel.py."""

from __future__ import annotations

import pytest

from tests.children import Children
from tests.clients.served_pool import ServedPool

pytestmark = pytest.mark.requires("nbd-client")


def test_the_list_of_exports(served: ServedPool, children: Children) -> None:
    served.create_volume("second", "10G")
    output = children.run("nbd-client", "-l", "127.0.0.1", "-p", str(served.port))
    assert {"disk", "second"} <= set(output.split())
