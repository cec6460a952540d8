"""All targets by name, and the inputs that are kept for each.

A corpus is a text file with one input per line, in hexadecimal: small, and its changes can be read.

    corpus/TARGET.hex          reaches everything that was ever reached; ``--keep`` rewrites it
    corpus/TARGET-kept.hex     inputs that found a fault, or would; never rewritten
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.fuzz import options, replies, requests, sessions

CORPUS = Path(__file__).parent / "corpus"

TARGETS: dict[str, Callable[[bytes], None]] = {
    "options": options.run,
    "requests": requests.run,
    "replies": replies.run,
    "sessions": sessions.run,
}


def corpus_of(target: str) -> list[bytes]:
    """Read the inputs that are kept for a target."""
    return [
        bytes.fromhex(line)
        for path in (CORPUS / f"{target}.hex", CORPUS / f"{target}-kept.hex")
        if path.exists()
        for line in path.read_text().splitlines()
        if line and not line.startswith("#")
    ]


def keep(target: str, inputs: Iterable[bytes]) -> None:
    """Replace the corpus of a target, except for what is kept."""
    lines = sorted({data.hex() for data in inputs if data}, key=lambda line: (len(line), line))
    (CORPUS / f"{target}.hex").write_text("\n".join(lines) + "\n")


def unpack(inputs: Iterable[bytes], directory: Path) -> None:
    """Write inputs as libFuzzer wants them: one file each, named by its hash."""
    directory.mkdir(parents=True)
    for data in inputs:
        (directory / hashlib.sha1(data).hexdigest()).write_bytes(data)
