"""The server as a whole: exports, connections, ways to listen, the way down."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import struct

import pytest

from nbdstore import unix_socket
from nbdstore.errors import (
    Corruption,
    InvalidArgument,
    NoSpace,
    NotFound,
    PoolFailed,
    ReadFailed,
    WriteFailed,
)
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import build_info
from nbdstore.protocol.constants import U16, Command, Errno, Info, Option, OptionReply
from nbdstore.server import Limits, Server, ServerOptions
from nbdstore.server import server as server_module
from nbdstore.server.channel import Channel
from nbdstore.server.listener import parse_address
from tests.server.conftest import SIZE
from tests.server.loop import until
from tests.server.nbd_client import NbdClient

# --- Exports -------------------------------------------------------------------------------------


async def test_a_single_volume_is_the_default(client):
    assert (await client.go("")).size == SIZE


async def test_several_volumes_have_no_default(pool, client):
    pool.create("other", 1 << 20)
    answer = await client.try_go("")
    assert answer.reply == OptionReply.ERR_UNKNOWN
    assert answer.data == b"There is no default export here: name the one you want."


async def test_a_default_can_be_chosen(pool, serve, connect):
    pool.create("other", 1 << 20)
    await serve(default_export="other")
    assert (await (await connect()).go("")).size == 1 << 20


async def test_a_chosen_default_that_is_missing(serve, connect):
    await serve(default_export="gone")
    answer = await (await connect()).try_go("")
    assert (answer.reply, answer.data) == (
        OptionReply.ERR_UNKNOWN,
        b"The default export 'gone' does not exist.",
    )


async def test_new_sizes_are_for_new_connections(pool, serve, connect):
    await serve()
    old = await connect()
    await old.go()
    pool.volumes["disk"].size = 2 * SIZE
    new = await connect()
    assert (await new.go()).size == 2 * SIZE
    assert (await old.do(Command.READ, SIZE, 1)).error == Errno.EINVAL
    assert (await new.do(Command.READ, SIZE, 1)).error == 0


async def test_a_client_can_use_what_its_volume_has_grown_by(pool, serve, connect):
    pool.create("other", SIZE)
    server = await serve()
    client, other = await connect(), await connect()
    await client.go("disk")
    await other.go("other")
    pool.volumes["disk"].size = 2 * SIZE
    server.grown(pool.volumes["disk"])
    await client.write(2 * SIZE - 1, b"x")
    assert (await client.do(Command.READ, 2 * SIZE, 1)).error == Errno.EINVAL
    assert (await other.do(Command.READ, SIZE, 1)).error == Errno.EINVAL


async def test_infos_tell_name_and_description(pool, client):
    pool.volumes["disk"].properties["description"] = "of the web shop"
    infos = await client.ask(Option.INFO, build_info("", [Info.NAME, Info.DESCRIPTION]))
    assert [info.data for info in infos[1:3]] == [
        U16.pack(Info.NAME) + b"disk",
        U16.pack(Info.DESCRIPTION) + b"of the web shop",
    ]
    (server, _) = await client.ask(Option.LIST)
    assert server.data.endswith(b"diskof the web shop")


@pytest.mark.parametrize("name", ["disk", ""])
async def test_a_half_import_is_not_served(pool, client, name):
    properties = pool.volumes["disk"].properties
    properties["importing"] = True
    answer = await client.try_go(name)
    assert answer.reply == OptionReply.ERR_POLICY
    assert answer.data == (
        b"The import into the export 'disk' is not finished: wait for it, or import again."
    )
    assert [reply.reply for reply in await client.ask(Option.LIST)] == [OptionReply.ACK]
    assert (await client.ask(Option.INFO, build_info("disk")))[-1].reply == OptionReply.ERR_POLICY
    properties["importing"] = False
    await client.go("disk")


# --- Errors of the store -------------------------------------------------------------------------


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, Command.FLUSH])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (NoSpace("full"), Errno.ENOSPC),
        (NotFound("deleted"), Errno.ESHUTDOWN),
        (Corruption("/secret/path", "a", "b"), Errno.EIO),
        (ReadFailed("/secret/path"), Errno.EIO),
        (WriteFailed("/secret/path"), Errno.EIO),
        (PoolFailed("/secret/path"), Errno.EIO),
    ],
)
async def test_errors_of_the_store(pool, client, caplog, command, error, expected):
    await client.go("disk", ReplyMode.STRUCTURED)
    pool.volumes["disk"].error = error
    payload = b"x" if command == Command.WRITE else None
    length = 1 if command == Command.READ else 0
    for _ in range(3):
        reply = await client.do(command, 0, length, 0, payload)
        assert reply.error == expected
        assert "/secret" not in reply.message
        assert reply.message.endswith(".")
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1, "one line, however often"
    assert str(error) in warnings[0].message


# --- Who is connected ----------------------------------------------------------------------------


async def test_connections_are_told(pool, serve, connect, caplog):
    caplog.set_level(logging.INFO)
    server = await serve(read_only=True)
    idle, client = await connect(), await connect()
    await client.go()
    await client.read(0, 5000)
    first, second = server.connections
    assert (first.export, first.bytes_read) == (None, 0)
    assert (second.export, second.bytes_read, second.read_only) == ("disk", 5000, True)
    assert second.id == first.id + 1
    assert second.peer == f"unix:pid={os.getpid()},uid={os.getuid()}"
    assert server.attached(pool.volumes["disk"]) == 1
    client.start(Command.DISC)
    assert await client.closed()
    await until(lambda: not server.attached(pool.volumes["disk"]))
    idle.close()
    lines = [r.message for r in caplog.records if "tached" in r.message]
    assert lines == [
        f"{second.peer} attached disk (read-only)",
        f"{second.peer} detached disk: read 5000 bytes, wrote 0 bytes",
    ]


async def test_who_was_promised_a_volume_is_attached(pool, serve, connect, monkeypatch):
    """Else it could be deleted, or imported into, before the client has read the answer to GO."""
    server, found = await serve(), []
    send_all = Channel.send_all

    async def look_and_send(channel, data):
        found.append(server.attached(pool.volumes["disk"]))
        await send_all(channel, data)

    client = await connect()
    await client.try_go("nope")
    assert server.attached(pool.volumes["disk"]) == 0
    monkeypatch.setattr(Channel, "send_all", look_and_send)
    await client.go("disk")
    assert found == [1, 1], "one export info, one ACK"


async def test_bytes_are_counted_on_all_paths(pool, serve, connect):
    server = await serve()
    client = await connect()
    await client.go()
    await client.write(0, b"x" * 100)
    pool.volumes["disk"].cold = True
    await client.read(0, 30)
    pool.volumes["disk"].space.clear()
    held = client.start(Command.WRITE, 0, payload=b"y" * 11)
    await until(lambda: server.connections[0].in_flight)
    pool.volumes["disk"].space.set()
    await client.reply(held)
    (info,) = server.connections
    assert (info.bytes_read, info.bytes_written, info.in_flight) == (30, 111, 0)


# --- Listening -----------------------------------------------------------------------------------


async def test_tcp_and_unix_together(serve, connect, tmp_path):
    server = await serve(listen=["127.0.0.1:0", f"unix:{tmp_path / 'a.sock'}"])
    for address in server.addresses:
        await (await connect(address)).go()


async def test_ipv6(serve, connect):
    if not socket.has_ipv6:
        pytest.skip("needs IPv6")
    server = await serve(listen=["[::1]:0"])
    (address,) = server.addresses
    assert address.startswith("[::1]:")
    port = address.rpartition(":")[2]
    await (await connect(f"::1:{port}")).go()
    assert server.connections[0].peer.startswith("[::1]:")


async def test_sockets_that_listen_already(serve, connect):
    with socket.create_server(("127.0.0.1", 0)) as passed:
        server = await serve(listen=[], sockets=[passed])
        await (await connect(server.addresses[0])).go()


async def test_a_connected_socket(pool):
    """As inetd passes it, or --stdin."""
    ours, theirs = socket.socketpair()
    server = Server(pool, ServerOptions(limits=Limits(linger_s=0.1)))
    serving = asyncio.ensure_future(server.serve_socket(theirs))
    client = await NbdClient.over(ours)
    await client.go()
    await client.write(0, b"hello")
    client.start(Command.DISC)
    await serving
    client.close()


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("127.0.0.1:10809", ("127.0.0.1", 10809)),
        ("localhost", ("localhost", 10809)),
        (":1234", (None, 1234)),
        ("[::1]:5", ("::1", 5)),
        ("[::1]", ("::1", 10809)),
    ],
)
def test_addresses(address, parsed):
    assert parse_address(address) == parsed


@pytest.mark.parametrize(
    "address",
    ["host:", "host:http", "host:70000", "::1:80", "h:-1", "h:0x1", "h:" + "9" * 5000],
)
def test_addresses_that_make_no_sense(address):
    with pytest.raises(InvalidArgument, match=r"use|write"):
        parse_address(address)


async def test_a_port_in_use(pool):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = Server(pool, ServerOptions(listen=[f"127.0.0.1:{port}"]))
        with pytest.raises(InvalidArgument, match=f"port {port} on 127.0.0.1 is in use"):
            await server.start()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("192.0.2.1:80", "not an address of this machine"),
        ("no-such-host.invalid:80", "is not known"),
        ("unix:/nonexistent/nbd.sock", "cannot listen on the unix socket"),
        ("unix:/tmp", "is no socket"),
        ("unix:/tmp/" + "x" * 200, r"the socket's name is \d+ bytes too long"),
        ("127.0.0..1:80", "neither a host name nor an IP address"),
        ("x" * 70 + ":80", "neither a host name nor an IP address"),
    ],
)
async def test_addresses_that_cannot_be_had(pool, address, message):
    with pytest.raises(InvalidArgument, match=message):
        await Server(pool, ServerOptions(listen=[address])).start()


async def test_nothing_stays_bound_when_one_address_fails(pool, tmp_path):
    path = tmp_path / "nbd.sock"
    with pytest.raises(InvalidArgument):
        await Server(pool, ServerOptions(listen=[f"unix:{path}", "h:x"])).start()
    assert not path.exists()


async def test_a_stale_socket_is_replaced(serve, connect, tmp_path):
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    server = await serve()
    await (await connect()).go()
    await server.drain(5)
    assert not path.exists()


async def test_a_socket_in_use_is_not(serve, pool, tmp_path):
    await serve()
    path = tmp_path / "nbd.sock"
    with pytest.raises(InvalidArgument, match="another server listens"):
        await Server(pool, ServerOptions(listen=[f"unix:{path}"])).start()
    assert stat.S_ISSOCK(path.stat().st_mode)


async def test_a_socket_in_use_by_somebody_busy_is_not(pool, tmp_path):
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))  # fills the queue: another connect would wait for ever
        with pytest.raises(InvalidArgument, match="another server listens"):
            await Server(pool, ServerOptions(listen=[f"unix:{path}"])).start()


async def test_paths_that_do_not_fit_in_an_address(serve, tmp_path):
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.mkdir(parents=True)
    path = directory / "nbd.sock"
    for _ in range(2):
        with unix_socket.listen(path):
            pass  # what a server leaves behind that is killed
        server = await serve(listen=[f"unix:{path}"])
        assert server.addresses == [f"unix:{path}"]
        client = await NbdClient.over(unix_socket.connect(path))
        assert (await client.go()).size == SIZE
        client.close()
        await server.drain(5)
        assert list(directory.iterdir()) == []


async def test_abstract_sockets_have_a_name(serve):
    with socket.socket(socket.AF_UNIX) as passed:
        passed.bind(f"\0nbdstore-test-{os.getpid()}")
        passed.listen()
        server = await serve(listen=[], sockets=[passed])
        assert server.addresses == [f"unix:@nbdstore-test-{os.getpid()}"]


async def test_a_socket_that_was_replaced_is_left_alone(serve, tmp_path):
    server = await serve()
    path = tmp_path / "nbd.sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        await server.drain(5)
        assert path.exists()


# --- The way down --------------------------------------------------------------------------------


async def test_drain_lets_requests_in_flight_finish(pool, serve, connect):
    volume = pool.volumes["disk"]
    server = await serve()
    client, idle, early = await connect(), await connect(), await connect()
    await client.go()
    await idle.go()
    volume.space.clear()
    cookie = client.start(Command.WRITE, 0, payload=b"held")
    await until(lambda: "write" in volume.calls)
    draining = asyncio.ensure_future(server.drain(timeout_s=10))
    assert await idle.closed()
    assert await early.closed()
    volume.space.set()
    assert (await client.reply(cookie)).error == 0
    assert await client.closed()
    await draining
    assert server.connections == []
    with pytest.raises(OSError):
        await connect()


async def test_drain_leaves_new_requests_unanswered(pool, serve, connect):
    """Linux repeats them on its next connection; an error it would pass to the filesystem."""
    volume = pool.volumes["disk"]
    server = await serve()
    client = await connect()
    await client.go()
    volume.space.clear()
    held = client.start(Command.WRITE, 0, payload=b"held")
    await until(lambda: "write" in volume.calls)
    draining = asyncio.ensure_future(server.drain(timeout_s=10))
    await asyncio.sleep(0)
    late = client.start(Command.READ, 0, 1)
    volume.space.set()
    await client.reply(held)
    with pytest.raises((AssertionError, ConnectionError)):
        await client.reply(late)
    await draining


async def test_drain_cuts_off_what_does_not_end(pool, serve, connect, caplog):
    volume = pool.volumes["disk"]
    server = await serve()
    client = await connect()
    await client.go()
    volume.space.clear()
    client.start(Command.WRITE, 0, payload=b"held")
    await until(lambda: "write" in volume.calls)
    await server.drain(timeout_s=0.05)
    assert await client.until_closed() == b""
    assert server.connections == []
    assert "cutting off 1 connections" in caplog.text
    assert bytes(volume.blocks.get(0, b"")[:4]) != b"held"


@pytest.mark.parametrize("leave", ["closed", "reset"])
async def test_a_client_that_is_gone_writes_no_more(pool, serve, connect, leave):
    """It has come again and written newer data: nothing must return from the past."""
    volume = pool.volumes["disk"]
    server = await serve()
    gone, again = await connect(), await connect()
    await gone.go()
    await again.go()
    volume.space.clear()
    gone.start(Command.WRITE, 0, payload=b"old")
    await until(lambda: "write" in volume.calls)
    if leave == "reset":
        sock = gone.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.writer.transport.abort()
    else:
        gone.close()
    await until(lambda: len(server.connections) == 1)
    volume.space.set()
    await again.write(0, b"new")
    assert await again.read(0, 3) == b"new"
    assert volume.calls.count("write") == 1


@pytest.mark.parametrize("stall_timeout_s", [0.1, 0])
async def test_a_client_that_is_gone_is_noticed_though_nothing_is_read(
    pool, serve, connect, monkeypatch, stall_timeout_s
):
    """It has more in flight than there is room for, so its end is left unread, too."""
    monkeypatch.setattr(server_module, "LOOK_EVERY_S", 0.02)
    volume = pool.volumes["disk"]
    limits = Limits(max_in_flight=2, stall_timeout_s=stall_timeout_s, linger_s=0.1)
    server = await serve(limits=limits)
    gone = await connect()
    await gone.go()
    volume.space.clear()
    for _ in range(5):
        gone.start(Command.WRITE, 0, payload=b"old")
    session = next(iter(server._connections)).session
    await until(lambda: session.in_flight and not session._reading)
    gone.close()
    await until(lambda: not server.connections)
    volume.space.set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not volume.blocks


async def test_a_client_that_is_gone_before_its_task_has_begun(serve, connect, monkeypatch):
    """A task that is given up in the round that made it accounts for its end, too."""

    def fail(outbox):
        raise BrokenPipeError("the client has gone")

    server = await serve()
    client = await connect()
    await client.go()
    session = next(iter(server._connections)).session
    monkeypatch.setattr(session._channel, "flush", fail)
    requests = [client.transmission.request(c, 0, n) for c, n in ((Command.FLUSH, 0), (0, 1))]
    client.send(b"".join(data for _, data in requests))
    await until(lambda: not server.connections)
    assert session.in_flight == 0


async def test_replies_survive_unread_requests(serve, connect):
    """Closing with unread bytes would reset the connection, and take the replies with it."""
    server = await serve(listen=["127.0.0.1:0"])
    client = await connect(server.addresses[0])
    await client.go()
    cookie = client.start(Command.READ, 0, 4 << 20)
    client.start(Command.DISC)
    client.send(b"more, which nobody reads" * 10000)
    assert (await client.reply(cookie)).error == 0
