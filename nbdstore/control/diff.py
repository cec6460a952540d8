"""What has changed between two images, as lines of JSON: written by a server, read by its client.

Owns that format, since a list of a hundred million extents should be in nobody's memory: first
``{"size": n, "older_size": n}`` (of the newer image, and of the older one, null if there is none),
then a line for each extent, ``{"offset": n, "length": n}`` in bytes, ascending and not adjacent,
and at the end ``{"extents": n}``, how many those were; or, when it cannot go on, the problem.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Final

from nbdstore.control import problems
from nbdstore.control.contracts import ChangeLike
from nbdstore.control.stream import Buffer
from nbdstore.errors import ControlError, NbdstoreError

CONTENT_TYPE: Final = "application/x-ndjson"
_LINES_AT_ONCE: Final = 1000

Extent = tuple[int, int]
"""Offset and length, in bytes."""


@dataclasses.dataclass(frozen=True)
class Diff:
    """What has changed.

    size: bytes of the newer image. older_size: of the older one, None if there is none. extents:
    ascending, not adjacent, within `size`. What lies beyond `older_size` and is not told is zeros.
    """

    size: int
    older_size: int | None
    extents: Iterator[Extent]


async def merged(changes: AsyncIterator[ChangeLike]) -> AsyncIterator[Extent]:
    """Join adjacent changes, be they data or zeros."""
    start = stop = -1
    async for change in changes:
        if change.offset == stop:
            stop += change.length
            continue
        if stop > start:
            yield start, stop - start
        start, stop = change.offset, change.offset + change.length
    if stop > start:
        yield start, stop - start


async def lines(
    size: int, older_size: int | None, extents: AsyncIterator[Extent]
) -> AsyncIterator[bytes]:
    """Write a diff, many lines at once. A failure ends it as the problem, and is raised then."""
    yield _line({"size": size, "older_size": older_size})
    part: list[bytes] = []
    n_extents = 0
    try:
        async for offset, length in extents:
            part.append(_line({"offset": offset, "length": length}))
            n_extents += 1
            if len(part) == _LINES_AT_ONCE:
                yield b"".join(part)
                part = []
    except NbdstoreError as error:
        yield b"".join(part) + failed(error)
        raise
    yield b"".join(part) + _line({"extents": n_extents})


def failed(error: NbdstoreError) -> bytes:
    """Write the end of a diff that cannot go on."""
    return problems.dump(error) + b"\n"


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def read(chunks: Iterable[Buffer]) -> Diff:
    """Read a diff from chunks of any length; its extents are read as they are asked for.

    Raises, now or while the extents are read:
        ControlError: it is cut off, or nonsense.
        NbdstoreError: the server reported this failure.
    """
    values = _values(chunks)
    head = next(values)
    if not isinstance(head.get("size"), int):
        raise ControlError("the server sent no list of changes")
    return Diff(head["size"], head.get("older_size"), _extents(values))


def _extents(values: Iterator[dict[str, Any]]) -> Iterator[Extent]:
    n_extents = 0
    for value in values:
        if "offset" in value:
            n_extents += 1
            yield value["offset"], value["length"]
        elif value.get("extents") == n_extents:
            return
        else:
            raise problems.load(json.dumps(value).encode())


def _value(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        value = json.loads(line)
        if isinstance(value, dict):
            return value
    raise ControlError(f"the server sent {line[:80]!r} in a list of changes")


def _values(chunks: Iterable[Buffer]) -> Iterator[dict[str, Any]]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + bytes(chunk)).split(b"\n")
        for line in whole:
            yield _value(line)
    raise ControlError("the list of changes was cut off")
