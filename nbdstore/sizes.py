"""Sizes as people write and read them: ``10G``, ``512M``, ``1.5T``, ``10 GiB``.

Owns both directions, and the rule that every unit is a power of 1024: a disk of "10G" that
were 7 % smaller for one reader than for another would be a lie to one of them, so the decimal
forms (``10GB``) are refused instead of guessed.
"""

from __future__ import annotations

import re
from fractions import Fraction

from nbdstore.errors import InvalidArgument

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_FACTORS = {unit[0]: 1024**power for power, unit in enumerate(UNITS)}
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,9})?)\s*(?:([KMGTPE])(?:iB)?|B)?", re.ASCII | re.IGNORECASE)
_DECIMAL = re.compile(r".*\d\s*[KMGTPE]B", re.ASCII | re.IGNORECASE)

MAX_SIZE = 2**63 - 1
"""Bytes: the largest size that NBD's and the kernel's signed 64-bit offsets can express."""


def parse_size(text: str) -> int:
    """Read a size such as ``10G``, ``1.5T``, ``4 KiB`` or ``65536`` into bytes.

    Raises:
        InvalidArgument: the text is no size, not a whole number of bytes, or beyond MAX_SIZE.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgument(f"'{text}' is not a size: {_advice(text)}")
    number, unit = match.groups()
    exact = Fraction(number) * _FACTORS[(unit or "B").upper()]
    if exact.denominator != 1:
        raise InvalidArgument(f"'{text}' is not a whole number of bytes")
    if exact > MAX_SIZE:
        raise InvalidArgument(f"'{text}' is too large: a size must be under 8 EiB")
    return int(exact)


def _advice(text: str) -> str:
    if _DECIMAL.fullmatch(text.strip()):
        return "units are powers of 1024 and have no B, such as 10G or 512M"
    return "write it as 10G, 512M, 1.5T, 4K or a number of bytes"


def exact_size(n_bytes: int) -> str:
    """Write bytes for a person who may have to give them back.

    The figure is exact, or the number stands behind it: ``4 MiB``, ``1 MiB (1049088 bytes)``.
    """
    if n_bytes > MAX_SIZE:
        return "more than 8 EiB"
    shown = format_size(n_bytes)
    number, unit = shown.split()
    is_exact = Fraction(number) * _FACTORS[unit[0]] == n_bytes
    return shown if is_exact else f"{shown} ({n_bytes} bytes)"


def format_size(n_bytes: float) -> str:
    """Write bytes for a person: ``10 GiB``, ``1.5 TiB``, ``512 B``; at most one decimal.

    The figure is rounded; whoever needs the exact number (JSON) takes the number itself.
    """
    value, power = float(n_bytes), 0
    while round(abs(value), 1) >= 1024 and power < len(UNITS) - 1:
        value /= 1024
        power += 1
    return f"{value:.1f}".removesuffix(".0") + " " + UNITS[power]
