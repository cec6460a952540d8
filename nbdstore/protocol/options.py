"""The data inside options: parsing what a client sends, building what a server replies.

Pure functions. A length that lies, or a string that is none, is the option's fault, not the
stream's: OptionRefused with ERR_INVALID, since the option's data was consumed as a whole before
(rule: stay in sync).
"""

from __future__ import annotations

from collections.abc import Sequence

from nbdstore.protocol.agreement import MetaContext, Offer, OptionRefused
from nbdstore.protocol.constants import (
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    MAX_STRING,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    U16,
    U32,
    Info,
    OptionReply,
    TransmissionFlag,
)

MAX_MESSAGE = 900
"""Bytes of an error message. qemu closes a connection on chunks above 1000 bytes, and nbd-client
leaves option replies of 4096 and more unread."""


def invalid(message: str) -> OptionRefused:
    return OptionRefused(OptionReply.ERR_INVALID, message)


# --- Parsing -------------------------------------------------------------------------------------


def parse_string(data: bytes, what: str) -> str:
    """Decode a string of the protocol: UTF-8, without NUL, of at most 4096 bytes."""
    if len(data) > MAX_STRING:
        raise invalid(f"The {what} has {len(data)} bytes, and at most {MAX_STRING} are allowed.")
    if 0 in data:
        raise invalid(f"The {what} contains a NUL byte.")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise invalid(f"The {what} is not UTF-8.") from None


def parse_info(data: bytes) -> tuple[str, list[int]]:
    """Parse the data of INFO and GO: the export's name and the infos asked for.

    The lengths must add up exactly (proto.md, "NBD_OPT_INFO"): 4 + name + 2 + 2 x infos.
    """
    if len(data) < 6:
        raise invalid(f"The option needs at least 6 bytes of data, and has {len(data)}.")
    (name_length,) = U32.unpack_from(data)
    if name_length > len(data) - 6:
        raise invalid(f"A name of {name_length} bytes does not fit in {len(data)} bytes of data.")
    (n_infos,) = U16.unpack_from(data, 4 + name_length)
    start = 6 + name_length
    if len(data) != start + 2 * n_infos:
        raise invalid(f"{n_infos} infos do not fill the {len(data) - start} bytes left for them.")
    infos = [info for (info,) in U16.iter_unpack(data[start:])]
    return parse_string(data[4 : 4 + name_length], "export name"), infos


def parse_meta_context(data: bytes) -> tuple[str, list[str]]:
    """Parse the data of LIST_META_CONTEXT and SET_META_CONTEXT: export name and queries."""
    raw_name, position = _counted_string(data, 0)
    if position + 4 > len(data):
        raise invalid("The number of queries is missing.")
    (n_queries,) = U32.unpack_from(data, position)
    position += 4
    if n_queries * 4 > len(data) - position:
        raise invalid(f"{n_queries} queries do not fit in {len(data) - position} bytes.")
    queries = []
    for _ in range(n_queries):
        raw_query, position = _counted_string(data, position)
        queries.append(parse_string(raw_query, "query"))
    if position != len(data):
        raise invalid(f"{len(data) - position} bytes follow the last query.")
    return parse_string(raw_name, "export name"), queries


def _counted_string(data: bytes, position: int) -> tuple[bytes, int]:
    """Cut out a string behind its 32-bit length; also return where it ends."""
    start = position + 4
    if start > len(data):
        raise invalid("The length of a string is missing.")
    (length,) = U32.unpack_from(data, position)
    if length > len(data) - start:
        raise invalid(f"A string of {length} bytes does not fit in {len(data) - start} bytes.")
    return data[start : start + length], start + length


# --- Building ------------------------------------------------------------------------------------


def build_reply(option: int, reply: OptionReply, data: bytes = b"") -> bytes:
    """Build one option reply."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def build_error(option: int, reply: OptionReply, message: str) -> bytes:
    """Build an error reply with its reason for a person.

    Every message ends in a full stop: nbd-client overwrites the last byte with NUL.
    """
    return build_reply(option, reply, clip_message(message))


def clip_message(message: str) -> bytes:
    """Encode a message in at most MAX_MESSAGE bytes, without cutting a character in two."""
    encoded = message.encode(errors="replace")
    if len(encoded) <= MAX_MESSAGE:
        return encoded
    kept = encoded[: MAX_MESSAGE - 4].decode(errors="ignore")
    return f"{kept}...".encode()


def build_server(offer: Offer) -> bytes:
    """Build the data of REP_SERVER, the answer to LIST."""
    name = offer.name.encode()
    return U32.pack(len(name)) + name + offer.description.encode()


def build_context(context_id: int, context: MetaContext) -> bytes:
    """Build the data of REP_META_CONTEXT."""
    return U32.pack(context_id) + context.label.encode()


def build_infos(offer: Offer, flags: TransmissionFlag, asked: Sequence[int]) -> list[bytes]:
    """Build the data of all REP_INFO for an export.

    EXPORT comes always and first, also when it was not asked for (qemu never asks); infos that
    are not known here are left out, as proto.md demands.
    """
    infos = {
        Info.EXPORT: INFO_EXPORT.pack(Info.EXPORT, offer.size, flags),
        Info.NAME: U16.pack(Info.NAME) + offer.name.encode(),
        Info.BLOCK_SIZE: INFO_BLOCK_SIZE.pack(
            Info.BLOCK_SIZE, offer.minimum_block, offer.preferred_block, offer.maximum_payload
        ),
    }
    if offer.description:
        infos[Info.DESCRIPTION] = U16.pack(Info.DESCRIPTION) + offer.description.encode()
    return [data for info, data in infos.items() if info is Info.EXPORT or info in asked]
