"""Queries for metadata contexts: wildcards in LIST only (proto.md, "Metadata querying")."""

import pytest

from nbdstore.protocol.agreement import ALLOCATION_DEPTH as DEPTH
from nbdstore.protocol.agreement import BASE_ALLOCATION as BASE
from nbdstore.protocol.agreement import DIRTY_BITMAP, MetaContext
from nbdstore.protocol.contexts import list_contexts, set_contexts

DIRTY = MetaContext(3, f"{DIRTY_BITMAP}nightly")


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ([], [BASE, DEPTH, DIRTY], []),
        (["base:"], [BASE], []),
        (["qemu:"], [DEPTH, DIRTY], []),
        (["qemu:", "base:"], [BASE, DEPTH, DIRTY], []),
        (["base:allocation"], [BASE], [BASE]),
        (["qemu:allocation-depth", "base:allocation"], [BASE, DEPTH], [BASE, DEPTH]),
        (["base:allocation", "base:allocation"], [BASE], [BASE]),
        (["base:nothing", "x-other:", "", "base", "allocation"], [], []),
        (["qemu:dirty-bitmap:"], [DIRTY], []),
        (["qemu:dirty-bitmap:nightly"], [DIRTY], [DIRTY]),
        (["qemu:dirty-bitmap:other", "qemu:dirty-bitmap"], [], []),
    ],
)
def test_queries(queries, listed, selected):
    there = (BASE, DEPTH, DIRTY)
    assert list_contexts(there, queries) == listed
    assert list(set_contexts(there, queries)) == selected
