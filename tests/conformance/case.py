"""What a case is, and the table of all of them.

A case is a function with a decorator that says what the function asks of a server, how strongly,
who says so, and which of the rules in RULES it covers. Adding the function to one of the modules
in cases/ adds it to the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

RULES: dict[int, str] = {
    1: "data of refused options is consumed",
    2: "lengths that lie and strings that are none are refused",
    3: "GO and INFO tell INFO_EXPORT unasked, and GO is never padded",
    4: "INFO and GO tell the same",
    5: "EXPORT_NAME is padded unless the client refused it",
    6: "block sizes make sense, and who did not ask for them is served or told",
    7: "metadata contexts of another export are void",
    8: "transmission flags fit what was negotiated",
    9: "sizes and offsets near 2^63 and 2^64 do no harm",
    10: "the option phase is bounded, in any order of options",
    11: "STARTTLS wipes what was before, plaintext sent ahead included",
    12: "with TLS required, nothing else works before it, and nothing asks for it after",
    13: "with TLS optional, only INFO and GO ask for it",
    14: "TLS 1.2 is spoken, nothing older, and it ends properly",
    15: "with structured replies READ is answered by chunks, even if refused",
    16: "a READ that fails never passes for one that succeeds",
    17: "error chunks have an error, and a message that fits",
    18: "chunks cover every byte of a READ exactly once",
    19: "payloads of refused WRITEs are consumed",
    20: "requests that are too long or empty do not end the connection",
    21: "DISC is not answered, and ends the connection after what is in flight",
    22: "what a reply or a flush has covered is seen on all connections",
    23: "FUA works on TRIM and WRITE_ZEROES too",
    24: "WRITE_ZEROES zeroes exactly, TRIM touches nothing outside of its range",
    25: "extents cover the request in order, per context, and tell no lies",
    26: "cookies are opaque, and replies may overtake each other",
    27: "CACHE may come unadvertised, and changes nothing",
    28: "an unknown command is refused, and nothing is consumed behind it",
    29: "an unknown magic ends the connection",
}
"""What implementers get wrong: each rule is covered by at least one case."""


class Level(Enum):
    """How strongly a case asks (RFC 2119)."""

    MUST = "MUST"
    SHOULD = "SHOULD"
    MAY = "MAY"


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Arguments:
        id: short, unique, stable.
        phase: the module it lives in.
        asks: what a server ought to do, as a clause.
        level: how strongly.
        source: who says so.
        rules: numbers of RULES.
        writes: whether it sends a command that may change the export.
        slow: whether it waits for the server's own deadlines.
        each_mode: whether it runs once for every family of replies that the server has.
        run: the function; takes the server, and the mode if `each_mode`; raises what outcome tells.
    """

    id: str
    phase: str
    asks: str
    level: Level
    source: str
    rules: tuple[int, ...]
    writes: bool
    slow: bool
    each_mode: bool
    run: Callable[..., None]


TABLE: dict[str, Case] = {}


def case(
    case_id: str,
    level: Level,
    asks: str,
    *,
    source: str,
    rules: tuple[int, ...] = (),
    writes: bool = False,
    slow: bool = False,
    each_mode: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to the table; see Case."""

    def add(run: Callable[..., None]) -> Callable[..., None]:
        assert case_id not in TABLE, f"two cases are called {case_id}"
        assert set(rules) <= set(RULES)
        phase = run.__module__.rpartition(".")[2]
        TABLE[case_id] = Case(
            case_id, phase, asks, level, source, rules, writes, slow, each_mode, run
        )
        return run

    return add


MUST, SHOULD, MAY = Level
