"""Requests that every session knows, whatever its replies look like: READ, FLUSH, CACHE, DISC."""

from __future__ import annotations

from tests.conformance.case import MUST, SHOULD, case
from tests.conformance.outcome import Skip, require
from tests.conformance.server import Server
from tests.conformance.wire import MAX_PAYLOAD, Cmd, CmdFlag, Errno, Flag, Mode

EACH_COOKIE = (0, 1, (1 << 64) - 1, 1 << 63, 0x2560951325609513, 0x6744669867446698)


@case(
    "read",
    MUST,
    "READ of any range within the export is answered by so many bytes, the same every time",
    source='proto.md, "NBD_CMD_READ"',
    each_mode=True,
)
def reads(server: Server, mode: Mode) -> None:
    server.need_size(8192)
    session = server.session(mode)
    unit, size = server.unit, session.export.size
    last = size // unit * unit - unit
    whole = session.read(0, 8192 // unit * unit or unit)
    for offset, length in ((0, unit), (unit, unit), (0, len(whole)), (len(whole) - unit, unit)):
        if offset + length <= len(whole):
            require(
                session.read(offset, length) == whole[offset : offset + length],
                f"READ of {length} at {offset} differs from what another READ has told",
            )
    session.read(last, unit)


@case(
    "read-bytewise",
    MUST,
    "a request may arrive one byte at a time, and many in one packet",
    source="TCP is a stream",
    each_mode=True,
)
def bytewise_requests(server: Server, mode: Mode) -> None:
    server.need_size(4096)
    session = server.session(mode)
    cookie, request = session.build(Cmd.READ, 0, server.unit)
    session.connection.send_bytewise(request)
    first = session.reply(cookie).data
    built = [session.build(Cmd.READ, 0, server.unit) for _ in range(100)]
    session.connection.send(b"".join(request for _, request in built))
    for reply in session.replies([cookie for cookie, _ in built]):
        require(reply.data == first, "the same READ is answered differently")


@case(
    "cookie-opaque",
    MUST,
    "every cookie comes back as it was sent, magics included, and may be used again",
    source='proto.md, "Request message"',
    rules=(26,),
    each_mode=True,
)
def cookies_are_opaque(server: Server, mode: Mode) -> None:
    server.need_size(512)
    session = server.session(mode)
    for cookie in EACH_COOKIE * 2:
        reply = session.do(Cmd.READ, 0, server.unit, cookie=cookie)
        require(not reply.error, f"the cookie {cookie:#x} is answered {reply.outcome}")


@case(
    "read-empty",
    SHOULD,
    "requests of no bytes do not end the connection",
    source='proto.md, "NBD_CMD_READ" (unspecified); libnbd can send them',
    rules=(20,),
    each_mode=True,
)
def empty_requests(server: Server, mode: Mode) -> None:
    session = server.session(mode)
    session.do(Cmd.READ, 0, 0)
    session.do(Cmd.CACHE, 0, 0)
    session.do(Cmd.BLOCK_STATUS, 0, 0)
    session.must_be_in_sync()


@case(
    "read-too-long",
    SHOULD,
    "a READ above the maximum payload is answered, not dropped",
    source='proto.md, "Block size constraints"',
    rules=(20,),
    each_mode=True,
)
def too_long_reads(server: Server, mode: Mode) -> None:
    length = min(server.facts.max_payload, 64 << 20) + server.unit
    session = server.session(mode)
    session.do(Cmd.READ, 0, length)
    session.must_be_in_sync()


@case(
    "read-4g",
    SHOULD,
    "a READ of 4 GiB - 512 is refused, or served; others are served meanwhile",
    source='proto.md, "Block size constraints"',
    rules=(20,),
)
def enormous_read(server: Server) -> None:
    session = server.session()
    session.start(Cmd.READ, 0, 0xFFFFFE00)
    session.connection.take(4)
    server.must_serve_others()


@case(
    "read-across-end",
    MUST,
    "a READ that begins inside and ends outside fails as a whole, and the next one works",
    source='proto.md, "NBD_CMD_READ"',
    rules=(16,),
    each_mode=True,
)
def read_across_the_end(server: Server, mode: Mode) -> None:
    session = server.session(mode)
    size = session.export.size
    unit = server.unit
    start = max(0, size // unit - 1) * unit
    reply = session.do(Cmd.READ, start, 4 * unit)
    require(reply.error, "it claims success")
    require(reply.data is None, "it has data")
    session.must_be_in_sync()


@case(
    "read-unreadable",
    MUST,
    "a READ of what cannot be read fails, and the session goes on",
    source='proto.md, "NBD_CMD_READ" (needs --unreadable)',
    rules=(16, 17),
    each_mode=True,
)
def unreadable_range(server: Server, mode: Mode) -> None:
    if server.settings.unreadable is None:
        raise Skip("no --unreadable range was given")
    offset, length = server.settings.unreadable
    session = server.session(mode)
    for start, n_bytes in ((offset, length), (0, offset + length)):
        if n_bytes > server.facts.max_payload:
            continue
        reply = session.do(Cmd.READ, start, n_bytes)
        require(reply.error == Errno.EIO, f"READ of {n_bytes} is answered {reply.outcome}")
    session.must_be_in_sync()


@case(
    "command-unknown",
    SHOULD,
    "unknown commands are answered EINVAL",
    source='proto.md, "Error values"',
    rules=(28,),
    each_mode=True,
)
def unknown_commands(server: Server, mode: Mode) -> None:
    session = server.session(mode)
    for command in (Cmd.RESIZE, 9, 4711, 0xFFFF):
        reply = session.do(command, 0, 512)
        require(reply.error == Errno.EINVAL, f"command {command} is answered {reply.outcome}")


@case(
    "command-unknown-payload",
    MUST,
    "behind an unknown command nothing is consumed, whatever its length says",
    source='proto.md, "Request message"; go-nbd waits for a payload',
    rules=(28,),
    each_mode=True,
)
def unknown_commands_have_no_payload(server: Server, mode: Mode) -> None:
    session = server.session(mode)
    for length in (1, 28, 1 << 20, 0xFFFFFFFF):
        cookies = [session.start(4711, 0, length), session.start(Cmd.READ, 0, server.unit)]
        refused, read = session.replies(cookies)
        require(refused.error, f"an unknown command of {length} bytes claims success")
        require(not read.error, f"READ after it is answered {read.outcome}")


@case(
    "flags-unknown",
    SHOULD,
    "unknown flags, and flags of other commands, are answered EINVAL",
    source='proto.md, "Error values"',
    rules=(28,),
    each_mode=True,
)
def unknown_flags(server: Server, mode: Mode) -> None:
    session = server.session(mode)
    wrong = (1 << 6, 1 << 15, CmdFlag.NO_HOLE, CmdFlag.REQ_ONE, CmdFlag.FAST_ZERO)
    for flags in wrong:
        reply = session.do(Cmd.READ, 0, server.unit, flags=flags)
        require(reply.error == Errno.EINVAL, f"READ with {flags:#x} is answered {reply.outcome}")
    session.must_be_in_sync()


@case(
    "flags-df-unoffered",
    SHOULD,
    "DF is answered EINVAL where it is not offered",
    source='proto.md, "NBD_CMD_FLAG_DF"',
    rules=(8,),
)
def df_without_structured_replies(server: Server) -> None:
    reply = server.session().do(Cmd.READ, 0, server.unit, flags=CmdFlag.DF)
    require(reply.error == Errno.EINVAL, f"it is answered {reply.outcome}")


@case(
    "fua-read",
    MUST,
    "FUA is accepted on READ, FLUSH and CACHE once SEND_FUA is offered",
    source='proto.md, "NBD_CMD_FLAG_FUA"',
    rules=(23,),
    each_mode=True,
)
def fua_everywhere(server: Server, mode: Mode) -> None:
    server.need(Flag.SEND_FUA)
    session = server.session(mode)
    asked = [(Cmd.READ, server.unit, Flag.HAS_FLAGS), (Cmd.FLUSH, 0, Flag.SEND_FLUSH)]
    asked.append((Cmd.CACHE, server.unit, Flag.SEND_CACHE))
    for command, length, flag in asked:
        if server.has(flag):
            reply = session.do(command, 0, length, flags=CmdFlag.FUA)
            require(not reply.error, f"{command.name} is answered {reply.outcome}")


@case(
    "flush",
    MUST,
    "FLUSH works if SEND_FLUSH is offered",
    source='proto.md, "NBD_CMD_FLUSH"',
    rules=(22,),
    each_mode=True,
)
def flushing(server: Server, mode: Mode) -> None:
    server.need(Flag.SEND_FLUSH)
    session = server.session(mode)
    for reply in session.replies([session.start(Cmd.FLUSH) for _ in range(10)]):
        require(not reply.error, f"it is answered {reply.outcome}")


@case(
    "cache",
    MUST,
    "CACHE is answered, and nothing reads differently after it",
    source='proto.md, "NBD_CMD_CACHE"',
    rules=(27,),
    each_mode=True,
)
def caching(server: Server, mode: Mode) -> None:
    server.need_size(4096)
    session = server.session(mode)
    before = session.read(0, 4096)
    reply = session.do(Cmd.CACHE, 0, 4096)
    require(not reply.error or not server.has(Flag.SEND_CACHE), f"it is answered {reply.outcome}")
    require(session.read(0, 4096) == before, "the export reads differently")


@case(
    "cache-flags",
    SHOULD,
    "CACHE with an unknown flag is answered EINVAL",
    source='proto.md, "Error values"',
    rules=(27,),
    each_mode=True,
)
def cache_with_flags(server: Server, mode: Mode) -> None:
    session = server.session(mode)
    for flags in (CmdFlag.NO_HOLE, 1 << 15):
        reply = session.do(Cmd.CACHE, 0, server.unit, flags=flags)
        require(reply.error == Errno.EINVAL, f"it is answered {reply.outcome}")


@case(
    "cache-beyond-end",
    SHOULD,
    "CACHE beyond the end is answered by an error",
    source='proto.md, "NBD_CMD_CACHE"',
    rules=(27,),
)
def cache_beyond_the_end(server: Server) -> None:
    server.need(Flag.SEND_CACHE)
    session = server.session()
    reply = session.do(Cmd.CACHE, server.size // server.unit * server.unit, 2 * server.unit)
    require(reply.error, "it claims success")


@case(
    "disc",
    MUST,
    "DISC is not answered and ends the connection, after all replies in flight",
    source='proto.md, "NBD_CMD_DISC"',
    rules=(21,),
    each_mode=True,
)
def disconnecting(server: Server, mode: Mode) -> None:
    session = server.session(mode)
    length = min(server.size, 256 << 10) // server.unit * server.unit
    built = [session.build(Cmd.READ, 0, length) for _ in range(20)]
    _, disc = session.build(Cmd.DISC)
    session.connection.send(b"".join(request for _, request in built) + disc)
    session.replies([cookie for cookie, _ in built])
    session.connection.must_close("DISC")


@case(
    "disc-ignores-rest",
    SHOULD,
    "what follows DISC is ignored",
    source='proto.md, "NBD_CMD_DISC"',
    rules=(21,),
)
def disc_ignores_the_rest(server: Server) -> None:
    session = server.session()
    session.must_be_in_sync()
    _, disc = session.build(Cmd.DISC)
    _, read = session.build(Cmd.READ, 0, server.unit)
    session.connection.send(disc + read)
    session.connection.must_close("DISC with a READ behind it")


@case(
    "magic-unknown",
    MUST,
    "a request that does not begin like one ends the connection",
    source='proto.md, "Request message"',
    rules=(29,),
    each_mode=True,
)
def unknown_magic(server: Server, mode: Mode) -> None:
    for magic in (b"\0\0\0\0", b"\x12\x56\x09\x53", b"\x25\x60\x95\x14"):
        session = server.session(mode)
        session.connection.send(magic + bytes(60))
        session.connection.must_close(f"the magic {magic.hex()}", allow_data=True)
    server.must_serve_others()


@case(
    "magic-unknown-silent",
    SHOULD,
    "nothing is answered to it: what came is no request, and has no cookie",
    source='proto.md, "Request message"',
    rules=(29,),
    each_mode=True,
)
def unknown_magic_is_not_answered(server: Server, mode: Mode) -> None:
    session = server.session(mode)
    session.connection.send(bytes(64))
    answer = session.connection.must_close("an unknown magic", allow_data=True)
    require(not answer, f"{len(answer)} bytes come before the end")


@case(
    "read-to-the-end",
    MUST,
    "the whole of the export's last 32 MiB can be read, to its last byte",
    source='proto.md, "NBD_CMD_READ"',
    each_mode=True,
)
def reads_to_the_last_byte(server: Server, mode: Mode) -> None:
    session = server.session(mode)
    minimum = server.facts.minimum_block
    stop = session.export.size // minimum * minimum
    length = min(stop, MAX_PAYLOAD, server.facts.max_payload) // minimum * minimum
    data = session.read(stop - length, length)
    require(len(data) == length, "it is short")
