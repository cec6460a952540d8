"""Kinds of command line values that click does not know: sizes, durations and addresses.

Each is a function from the text to the value, given to click as ``type=``. And the options that
several commands have in common.
"""

from __future__ import annotations

import click

from nbdstore.errors import InvalidArgument
from nbdstore.sizes import parse_size

DURATIONS_S = {"s": 1, "m": 60, "h": 60 * 60, "d": 24 * 60 * 60}
MAX_AMOUNT = 1e6

uuid_option = click.option(
    "--uuid", metavar="UUID", help="Of your choice: the same command again makes nothing new."
)


def size(text: str) -> int:
    """Read ``10G``, ``512M``, ``1.5T``, ``4K`` or plain bytes."""
    try:
        return parse_size(text)
    except InvalidArgument as error:
        raise click.BadParameter(str(error)) from error


def limit(text: str) -> int:
    """Read a whole number, or ``none``, which is 0."""
    if text == "none":
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise click.BadParameter(f"'{text:.40}' is neither a whole number below 10^18 nor 'none'")
    return int(text)


def size_limit(text: str) -> int:
    """Read a size as `size` does, or ``none``, which is 0."""
    return 0 if text == "none" else size(text)


def duration_s(text: str) -> float:
    """Read ``7d``, ``12h``, ``30m`` or ``90s``, in seconds; more than nothing."""
    unit_s = DURATIONS_S.get(text[-1:].lower())
    try:
        amount = float(text[:-1]) if unit_s else 0.0
    except ValueError:
        amount = 0.0
    if unit_s is None or not 0 < amount < MAX_AMOUNT:
        raise click.BadParameter(f"'{text}' is no duration: write it as 7d, 12h, 30m or 90s")
    return amount * unit_s


def host_port(text: str) -> tuple[str, int]:
    """Read ``HOST:PORT``, with ``[...]`` around an IPv6 address."""
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
        raise click.BadParameter(
            f"'{text}' is not HOST:PORT, such as 127.0.0.1:10810 or [::1]:10810"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def listen_address(text: str) -> str:
    """Check ``HOST:PORT``, its short forms, or ``unix:PATH``; the server reads it itself."""
    # Imported late: only `serve` needs it, and it brings asyncio.
    from nbdstore.server.listener import parse_address

    try:
        if text == "unix:" or not text.startswith("unix:"):
            parse_address(text)
    except InvalidArgument as error:
        raise click.BadParameter(str(error)) from error
    return text
