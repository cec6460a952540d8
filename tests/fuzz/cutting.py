"""Ways to cut a stream into pieces: a parser must not care which one it was."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from random import Random

WAYS = ("whole", "byte by byte", "at random")


def cut(stream: bytes, way: str) -> Iterator[bytes]:
    """Cut a stream one of the WAYS; "at random" depends on nothing but the stream."""
    if way == "whole":
        if stream:
            yield stream
        return
    chance = Random(zlib.crc32(stream))
    at = 0
    while at < len(stream):
        step = 1 if way == "byte by byte" else chance.choice((1, 3, 16, 27, 40, 300, 1000))
        yield stream[at : at + step]
        at += step
