"""Queries for metadata contexts: wildcards in LIST only (proto.md, "Metadata querying")."""

import pytest

from nbdstore.protocol.agreement import MetaContext
from nbdstore.protocol.contexts import list_contexts, set_contexts

BASE, DEPTH = MetaContext.BASE_ALLOCATION, MetaContext.ALLOCATION_DEPTH


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ([], [BASE, DEPTH], []),
        (["base:"], [BASE], []),
        (["qemu:"], [DEPTH], []),
        (["qemu:", "base:"], [BASE, DEPTH], []),
        (["base:allocation"], [BASE], [BASE]),
        (["qemu:allocation-depth", "base:allocation"], [BASE, DEPTH], [BASE, DEPTH]),
        (["base:allocation", "base:allocation"], [BASE], [BASE]),
        (["base:nothing", "x-other:", "", "base", "allocation"], [], []),
        (["qemu:dirty-bitmap:"], [], []),
    ],
)
def test_queries(queries, listed, selected):
    assert list_contexts(queries) == listed
    assert list(set_contexts(queries)) == selected
