"""The cases, by phase. Importing this package fills the table.

handshake    hello, client flags, EXPORT_NAME
options      options in general: staying in sync, limits
info         INFO and GO, and what they tell
contexts     metadata contexts
tls          STARTTLS, and what needs it
simple       requests that every session knows
structured   reply chunks
status       BLOCK_STATUS
writing      WRITE, TRIM, WRITE_ZEROES, FUA, and refusals of them
extended     extended headers
hostile      clients that mean no good
concurrency  many requests, several connections
"""

from tests.conformance.case import TABLE, Case
from tests.conformance.cases import (
    concurrency,
    contexts,
    extended,
    handshake,
    hostile,
    info,
    options,
    simple,
    status,
    structured,
    tls,
    writing,
)

_PHASES = (
    handshake,
    options,
    info,
    contexts,
    tls,
    simple,
    structured,
    status,
    writing,
    extended,
    hostile,
    concurrency,
)
PHASES = tuple(module.__name__.rpartition(".")[2] for module in _PHASES)


def all_cases() -> list[Case]:
    """The whole table, phase by phase."""
    return sorted(TABLE.values(), key=lambda case: PHASES.index(case.phase))
