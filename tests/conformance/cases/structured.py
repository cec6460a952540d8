"""Reply chunks: what is the same for structured and extended replies.

Most of what must hold for them is checked by the session on every reply, in every case.
"""

from __future__ import annotations

from tests.conformance.case import MAY, MUST, SHOULD, case
from tests.conformance.outcome import Skip, require
from tests.conformance.server import Server
from tests.conformance.session import Session
from tests.conformance.wire import (
    DONE,
    ChunkType,
    Cmd,
    CmdFlag,
    Errno,
    Flag,
    Mode,
    Option,
    Rep,
)

DF_BYTES = 65536
"""READs up to this length must be possible with DF."""


def begin(server: Server, mode: Mode) -> Session:
    """Begin a session whose replies are chunks."""
    if mode is Mode.SIMPLE:
        raise Skip("simple replies have no chunks")
    return server.session(mode)


@case(
    "chunks-offered",
    MAY,
    "structured replies are offered",
    source='proto.md, "NBD_OPT_STRUCTURED_REPLY"',
)
def structured_replies(server: Server) -> None:
    server.need_mode(Mode.STRUCTURED)
    reply = server.connect().final(Option.STRUCTURED_REPLY)
    require(reply.kind == Rep.ACK, f"it is answered {reply.name}")


@case(
    "chunks-read",
    MUST,
    "READ is answered by chunks that cover every byte once, DONE on the last",
    source='proto.md, "Structured reply chunk message"',
    rules=(15, 18),
    each_mode=True,
)
def chunks_of_a_read(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    minimum = server.facts.minimum_block
    length = min(session.export.size, 1 << 20) // minimum * minimum
    for offset, n_bytes in ((0, length), (minimum, length - 2 * minimum)):
        reply = session.do(Cmd.READ, offset, n_bytes)
        require(not reply.error, f"READ of {n_bytes} is answered {reply.outcome}")
        require([c.flags & DONE for c in reply.chunks].count(DONE) == 1, "DONE is not once")


@case(
    "chunks-aligned",
    SHOULD,
    "chunks of an aligned READ begin and end at multiples of 512",
    source='proto.md, "NBD_CMD_READ"',
    rules=(18,),
    each_mode=True,
)
def aligned_chunks(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    reply = session.do(Cmd.READ, 0, min(session.export.size, 1 << 20) // 512 * 512)
    odd = [span for span in reply.covered if span[0] % 512 or span[1] % 512]
    require(not odd, f"the chunks {odd} are not")


@case(
    "chunks-error",
    MUST,
    "a READ that is refused is answered by an error chunk and no content",
    source='proto.md, "Structured reply chunk message"',
    rules=(15, 16, 17),
    each_mode=True,
)
def refused_reads(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    beyond = session.export.size // server.unit * server.unit
    for offset, flags in ((beyond, 0), (1 << 63, 0), (0, 1 << 15)):
        reply = session.do(Cmd.READ, offset, 4 * server.unit, flags=flags)
        if flags and not reply.error:
            continue  # flags-unknown is about that
        require(reply.error, f"READ at {offset} claims success")
        require(not reply.content_chunks, "the refusal has content")
    session.must_be_in_sync()


@case(
    "chunks-error-message",
    SHOULD,
    "errors come as error chunks with a message",
    source='proto.md, "Structured reply chunk message"',
    rules=(17,),
    each_mode=True,
)
def error_messages(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    beyond = session.export.size // server.unit * server.unit
    reply = session.do(Cmd.READ, beyond, server.unit)
    require(reply.message, "there is no message")


@case(
    "chunks-error-short",
    SHOULD,
    "error chunks have less than 1000 bytes",
    source="qemu, NBD_MAX_MALLOC_PAYLOAD: it leaves at longer ones",
    rules=(17,),
    each_mode=True,
)
def short_error_messages(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    session.do(Cmd.READ, 1 << 63, server.unit)
    reply = session.do(Cmd.READ, server.size // server.unit * server.unit, server.unit)
    require(all(chunk.length < 1000 for chunk in reply.chunks), f"{reply.chunks}")


@case(
    "chunks-df",
    MUST,
    "a READ of 64 KiB with DF is answered by one content chunk at most",
    source='proto.md, "NBD_CMD_FLAG_DF"',
    rules=(8, 18),
    each_mode=True,
)
def unfragmented_reads(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    if not session.export.flags & Flag.SEND_DF:
        raise Skip("SEND_DF is not offered")
    server.need_size(DF_BYTES)
    for offset in (0, server.size // DF_BYTES * DF_BYTES - DF_BYTES):
        reply = session.do(Cmd.READ, offset, DF_BYTES, flags=CmdFlag.DF)
        require(not reply.error, f"it is answered {reply.outcome}")
        kinds = [chunk.kind for chunk in reply.content_chunks]
        require(len(kinds) == 1, f"its content is in the chunks {kinds}")


@case(
    "chunks-df-long",
    MUST,
    "a longer READ with DF is answered by one content chunk, or EOVERFLOW and none",
    source='proto.md, "NBD_CMD_FLAG_DF"',
    rules=(18,),
    each_mode=True,
)
def long_unfragmented_reads(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    if not session.export.flags & Flag.SEND_DF:
        raise Skip("SEND_DF is not offered")
    length = min(server.size, server.facts.max_payload, 32 << 20) // server.unit * server.unit
    reply = session.do(Cmd.READ, 0, length, flags=CmdFlag.DF)
    if reply.error:
        require(reply.error == Errno.EOVERFLOW, f"it is answered {reply.outcome}")
        require(not reply.content_chunks, "EOVERFLOW comes with content")


@case(
    "chunks-payload-simple",
    MUST,
    "no reply of a simple session is a chunk",
    source='proto.md, "Simple reply message"',
    rules=(15,),
)
def no_chunks_unless_agreed(server: Server) -> None:
    session = server.session(Mode.SIMPLE)
    for command in (Cmd.READ, Cmd.CACHE, Cmd.BLOCK_STATUS, Cmd.FLUSH):
        length = 0 if command == Cmd.FLUSH else server.unit
        reply = session.do(command, 0, length)
        require(not reply.chunks, f"{command.name} is answered by {ChunkType.NONE.name} or such")
