"""Metadata contexts: which of them a query means.

LIST and SET read the same queries differently (proto.md, "Metadata querying"): a namespace alone,
``base:``, is a wildcard in LIST and means nothing in SET. Unknown names are no error anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from nbdstore.protocol.agreement import DIRTY_BITMAP, MetaContext

WILDCARDS = ("base:", "qemu:", DIRTY_BITMAP)


def list_contexts(there: Sequence[MetaContext], queries: Sequence[str]) -> list[MetaContext]:
    """Find the contexts that LIST_META_CONTEXT answers; without a query, all that are there."""
    if not queries:
        return list(there)
    namespaces = tuple(query for query in queries if query in WILDCARDS)
    return [
        context
        for context in there
        if context.label in queries or (namespaces and context.label.startswith(namespaces))
    ]


def set_contexts(there: Sequence[MetaContext], queries: Sequence[str]) -> tuple[MetaContext, ...]:
    """Find the contexts that SET_META_CONTEXT selects; without a query, none."""
    return tuple(context for context in there if context.label in queries)
