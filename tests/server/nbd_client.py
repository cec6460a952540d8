"""A client for tests: the strict protocol client on asyncio's streams, and raw bytes beside it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence

from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import (
    ClientHandshake,
    ClientTransmission,
    ExportSize,
    OptionAnswer,
    Reply,
    build_info,
    build_option,
    option_exchange,
    parse_info_export,
)
from nbdstore.protocol.constants import ClientFlag, Command, Option, OptionReply

DEADLINE_S = 20.0
"""No answer for this long is a failure; nothing waits for it to pass."""

DEFAULT_FLAGS = ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES


class NbdClient:
    """One connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.handshake = ClientHandshake()
        self.transmission = ClientTransmission(ReplyMode.SIMPLE)
        self.export: ExportSize | None = None
        self._replies: dict[int, Reply] = {}

    @classmethod
    async def connect(cls, address: str, flags: int | None = DEFAULT_FLAGS) -> NbdClient:
        """Connect to ``unix:PATH`` or ``HOST:PORT``; say hello unless ``flags`` is None."""
        if address.startswith("unix:"):
            streams = await asyncio.open_unix_connection(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            streams = await asyncio.open_connection(host, int(port))
        client = cls(*streams)
        try:
            if flags is not None:
                await client.say_hello(flags)
        except BaseException:
            client.writer.transport.abort()
            raise
        return client

    @classmethod
    async def over(cls, sock: socket.socket) -> NbdClient:
        """Speak over a connected socket."""
        sock.setblocking(False)
        client = cls(*await asyncio.open_connection(sock=sock))
        await client.say_hello(DEFAULT_FLAGS)
        return client

    async def say_hello(self, flags: int) -> None:
        self.handshake = ClientHandshake(flags)
        while (hello := self.handshake.hello()) is None:
            self.handshake.receive(await self.receive())
        self.send(hello)

    # --- Bytes -------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def receive(self) -> bytes:
        """Receive some bytes; the connection must not be at its end."""
        data = await self.receive_or_end()
        assert data, "the server closed the connection"
        return data

    async def receive_or_end(self) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.read(1 << 20)

    async def closed(self) -> bool:
        """Wait for the end of the connection; False if something else came."""
        try:
            return await self.receive_or_end() == b""
        except ConnectionError:
            return True

    async def until_closed(self) -> bytes:
        """Receive everything up to the end of the connection, proper or not."""
        received = b""
        try:
            while data := await self.receive_or_end():
                received += data
        except ConnectionError:
            pass
        return received

    def close(self) -> None:
        self.writer.close()

    async def start_tls(self, context: ssl.SSLContext, name: str = "localhost") -> None:
        """Do the client's side of STARTTLS after its ACK."""
        await self.writer.start_tls(context, server_hostname=name)

    # --- Options -----------------------------------------------------------------------------

    async def answer(self) -> OptionAnswer:
        """Receive one option reply."""
        while (answer := self.handshake.answer()) is None:
            self.handshake.receive(await self.receive())
        return answer

    async def ask(self, option: int, data: bytes = b"") -> list[OptionAnswer]:
        """Send one option and receive all replies to it."""
        self.send(build_option(option, data))
        answers = [await self.answer()]
        while not answers[-1].is_last:
            answers.append(await self.answer())
        assert {answer.option for answer in answers} == {option}
        return answers

    async def last(self, option: int, data: bytes = b"") -> int:
        """Send one option; return the type of its last reply."""
        return (await self.ask(option, data))[-1].reply

    async def go(
        self,
        name: str = "",
        mode: ReplyMode = ReplyMode.SIMPLE,
        queries: Sequence[str] = (),
    ) -> ExportSize:
        """Negotiate until the transmission phase."""
        for option in option_exchange(name, mode, queries):
            self.send(option)
            answer = await self.answer()
            while not answer.is_last:
                if answer.reply == OptionReply.INFO and answer.data[:2] == b"\0\0":
                    self.export = parse_info_export(answer.data)
                answer = await self.answer()
            assert answer.reply == OptionReply.ACK, answer
        self.begin(mode)
        assert self.export is not None
        return self.export

    async def try_go(self, name: str = "") -> OptionAnswer:
        """Send GO; return its last reply."""
        return (await self.ask(Option.GO, build_info(name)))[-1]

    def begin(self, mode: ReplyMode) -> None:
        """Go over to the transmission phase."""
        assert self.handshake.unread() == b""
        self.transmission = ClientTransmission(mode)

    # --- Requests ----------------------------------------------------------------------------

    def start(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: bytes | None = None,
    ) -> int:
        """Send a request; return its cookie."""
        cookie, data = self.transmission.request(command, offset, length, flags, payload)
        self.send(data)
        return cookie

    async def reply(self, cookie: int) -> Reply:
        """Receive until a request's reply is complete."""
        while cookie not in self._replies:
            for reply in self.transmission.receive(await self.receive()):
                self._replies[reply.cookie] = reply
        return self._replies.pop(cookie)

    async def do(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: bytes | None = None,
    ) -> Reply:
        """Send a request and receive its reply."""
        return await self.reply(self.start(command, offset, length, flags, payload))

    async def read(self, offset: int, length: int) -> bytes:
        reply = await self.do(Command.READ, offset, length)
        assert reply.error == 0 and reply.data is not None
        return reply.data

    async def write(self, offset: int, data: bytes) -> None:
        reply = await self.do(Command.WRITE, offset, payload=data)
        assert reply.error == 0


async def is_refused(address: str, export: str) -> bool:
    """Tell whether the server at `address` refuses to attach an export."""
    client = await NbdClient.connect(address)
    answer = await client.try_go(export)
    client.close()
    await client.writer.wait_closed()
    return answer.is_error
