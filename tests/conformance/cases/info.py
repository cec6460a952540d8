"""INFO and GO, and what they tell of an export."""

from __future__ import annotations

from tests.conformance.case import MUST, SHOULD, case
from tests.conformance.cases.handshake import NO_SUCH_EXPORT
from tests.conformance.handshake import check_string, infos_of, parse_export
from tests.conformance.outcome import Skip, require
from tests.conformance.server import Server
from tests.conformance.session import Session
from tests.conformance.wire import (
    INFO_BLOCK_SIZE,
    MAX_PAYLOAD,
    Cmd,
    Errno,
    Flag,
    Info,
    Mode,
    Option,
    Rep,
    info_data,
)

ALL_INFOS = (Info.EXPORT, Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)


@case(
    "info-export",
    MUST,
    "INFO and GO tell INFO_EXPORT although it was not asked for",
    source='proto.md, "NBD_INFO_EXPORT"; qemu never asks for it',
    rules=(3,),
)
def export_unasked(server: Server) -> None:
    server.need_info()
    client = server.connect()
    for number in (Option.INFO, Option.GO):
        replies = client.ask(number, info_data(server.name))
        require(replies[-1].kind == Rep.ACK, f"{number.name} is answered {replies[-1].name}")
        parse_export(replies)


@case(
    "go-unpadded",
    MUST,
    "nothing follows GO's ACK, whatever the client said of zeroes",
    source='proto.md, "NBD_OPT_GO"',
    rules=(3,),
)
def go_is_never_padded(server: Server) -> None:
    server.need_info()
    for flags in (1, 3):
        client = server.connect(flags)
        session = Session(client.connection, Mode.SIMPLE, client.go(server.name), {})
        session.must_be_in_sync()


@case(
    "info-go-same",
    MUST,
    "INFO, and GO right after it, tell the same",
    source='proto.md, "NBD_OPT_GO"; nbd-server told INFO a size of 0',
    rules=(4,),
)
def info_and_go_agree(server: Server) -> None:
    server.need_info()
    for mode in server.facts.modes:
        client = server.connect()
        client.negotiate(mode)
        data = info_data(server.name, ALL_INFOS)
        info = infos_of(client.ask(Option.INFO, data))
        go = infos_of(client.ask(Option.GO, data))
        for kind in sorted(info.keys() | go.keys()):
            require(
                info.get(kind) == go.get(kind),
                f"{mode.value}: information {kind} is {info.get(kind)!r}, then {go.get(kind)!r}",
            )


@case(
    "info-unknown-type",
    MUST,
    "information that nobody knows is left out, without an error",
    source='proto.md, "NBD_OPT_INFO"',
)
def unknown_information(server: Server) -> None:
    server.need_info()
    client = server.connect()
    replies = client.ask(Option.INFO, info_data(server.name, [0x7FFF, Info.NAME, 0xFFFF]))
    require(replies[-1].kind == Rep.ACK, f"it is answered {replies[-1].name}")
    require(not infos_of(replies).keys() & {0x7FFF, 0xFFFF}, "it is made up")


@case(
    "info-strings",
    MUST,
    "names and descriptions are strings",
    source='proto.md, "NBD_INFO_NAME", "NBD_INFO_DESCRIPTION"',
)
def information_strings(server: Server) -> None:
    server.need_info()
    told = infos_of(server.connect().ask(Option.INFO, info_data(server.name, ALL_INFOS)))
    for kind in (Info.NAME, Info.DESCRIPTION):
        if kind in told:
            check_string(told[kind][2:], kind.name)


@case(
    "info-unknown-export",
    MUST,
    "an export that does not exist is refused with ERR_UNKNOWN, and the next GO works",
    source='proto.md, "NBD_REP_ERR_UNKNOWN"',
    rules=(1,),
)
def unknown_export(server: Server) -> None:
    server.need_info()
    client = server.connect()
    for number in (Option.INFO, Option.GO):
        reply = client.final(number, info_data(NO_SUCH_EXPORT))
        if reply.kind == Rep.ACK:
            raise Skip("any name is an export")
        require(reply.kind == Rep.ERR_UNKNOWN, f"{number.name} is answered {reply.name}")
    client.go(server.name)


@case(
    "block-sizes",
    MUST,
    "block sizes are powers of two in order, the maximum a multiple of the minimum",
    source='proto.md, "Block size constraints"',
    rules=(6,),
)
def block_sizes(server: Server) -> None:
    sizes = server.facts.block_sizes
    if sizes is None:
        raise Skip("block sizes are not told")
    for what, value in (("minimum", sizes.minimum), ("preferred", sizes.preferred)):
        require(value and not value & (value - 1), f"the {what} {value} is no power of two")
    require(sizes.minimum <= 65536, f"the minimum is {sizes.minimum}, more than 65536")
    least = max(512, sizes.minimum)
    require(sizes.preferred >= least, f"the preferred size is {sizes.preferred}, below {least}")
    require(sizes.maximum >= sizes.preferred, f"the maximum {sizes.maximum} is below it")
    require(
        sizes.maximum == 0xFFFFFFFF or sizes.maximum % sizes.minimum == 0,
        f"the maximum {sizes.maximum} is no multiple of {sizes.minimum}",
    )


@case(
    "block-sizes-usable",
    SHOULD,
    "block sizes are told, at least 1 MiB may be sent, and the size is a multiple of the minimum",
    source='proto.md, "Block size constraints"',
    rules=(6,),
)
def usable_block_sizes(server: Server) -> None:
    sizes = server.facts.block_sizes
    require(sizes, f"INFO_BLOCK_SIZE ({INFO_BLOCK_SIZE.size} bytes) is not sent")
    assert sizes
    require(sizes.maximum >= 1 << 20, f"the maximum is {sizes.maximum}")
    require(server.size % sizes.minimum == 0, f"the export has {server.size} bytes")


@case(
    "block-sizes-unasked",
    SHOULD,
    "a client that did not ask for block sizes may read single bytes, or GO tells it",
    source='proto.md, "Block size constraints"; nbd-client never asks',
    rules=(6,),
    each_mode=True,
)
def block_sizes_unasked(server: Server, mode: Mode) -> None:
    server.need_size(1024)
    client = server.connect()
    client.negotiate(mode)
    if server.facts.has_info:
        replies = client.ask(Option.GO, info_data(server.name))
        if replies[-1].kind == Rep.ERR_BLOCK_SIZE_REQD:
            require(Info.BLOCK_SIZE in infos_of(replies), "refused without telling the sizes")
            return
        export = parse_export(replies)
    else:
        export = client.export_name(server.name)
    session = Session(client.connection, mode, export, {})
    reply = session.do(Cmd.READ, 511, 2)
    require(not reply.error, f"READ of 2 bytes at 511 is answered {reply.outcome}")


@case(
    "flags-valid",
    MUST,
    "HAS_FLAGS is set, and flags that need others come with them",
    source='proto.md, "Transmission flags"; libnbd refuses flags of 0',
    rules=(8,),
    each_mode=True,
)
def valid_flags(server: Server, mode: Mode) -> None:
    flags = server.session(mode).export.flags
    require(flags & Flag.HAS_FLAGS, f"the flags are {flags:#x}, without HAS_FLAGS")
    structured = mode is not Mode.SIMPLE
    require(structured or not flags & Flag.SEND_DF, "SEND_DF without structured replies")
    require(
        flags & Flag.SEND_WRITE_ZEROES or not flags & Flag.SEND_FAST_ZERO,
        "SEND_FAST_ZERO without SEND_WRITE_ZEROES",
    )
    require(
        mode is Mode.EXTENDED or not flags & Flag.BLOCK_STATUS_PAYLOAD,
        "BLOCK_STATUS_PAYLOAD without extended headers",
    )
    require(not flags >> 13, f"the flags are {flags:#x}, with unknown ones")


@case(
    "flags-same",
    SHOULD,
    "every connection is told the same size and flags",
    source='proto.md, "NBD_FLAG_CAN_MULTI_CONN"; Linux cannot change them on reconnection',
    rules=(8,),
)
def flags_stay_the_same(server: Server) -> None:
    exports = {server.session().export for _ in range(3)}
    require(len(exports) == 1, f"different answers: {exports}")


@case(
    "size-usable",
    SHOULD,
    "the export is smaller than 2^63 bytes",
    source="CVE-2023-5215 (libnbd); loff_t of Linux",
    rules=(9,),
)
def usable_size(server: Server) -> None:
    require(server.size < 1 << 63, f"the size is {server.size}")


@case(
    "payload-default",
    SHOULD,
    "32 MiB can be read at once, or a lower maximum is told",
    source='proto.md, "Block size constraints"',
    rules=(6, 20),
    each_mode=True,
)
def default_payload(server: Server, mode: Mode) -> None:
    server.need_size(MAX_PAYLOAD)
    length = min(MAX_PAYLOAD, server.facts.max_payload)
    reply = server.session(mode).do(Cmd.READ, 0, length)
    require(not reply.error, f"READ of {length} bytes is answered {reply.outcome}")
    require(len(reply.data or b"") == length, "it is short")


@case(
    "reads-beyond-size",
    SHOULD,
    "READ beyond the end is answered EINVAL, up to 2^64 - 1",
    source='proto.md, "NBD_CMD_READ", "Error values"',
    rules=(9,),
    each_mode=True,
)
def reads_beyond_the_end(server: Server, mode: Mode) -> None:
    session = server.session(mode)
    unit = server.unit
    top = (1 << 64) - unit
    for offset in (session.export.size // unit * unit, 1 << 62, 1 << 63, top):
        if offset + unit <= session.export.size:
            continue
        reply = session.do(Cmd.READ, offset, unit)
        require(reply.error == Errno.EINVAL, f"READ at {offset} is answered {reply.outcome}")
    session.must_be_in_sync()
