"""Where NBD is, and shaking hands with a server, real or hostile."""

from __future__ import annotations

import dataclasses
import socket
import threading

import pytest

from nbdstore.agent import store_server
from nbdstore.agent.store_server import ServerAway, StoreServer, choose_address, dial
from nbdstore.control.client import ControlClient
from nbdstore.control.model import PoolInfo, ServerInfo
from nbdstore.errors import DeviceError, InvalidArgument, NbdstoreError
from tests.clients.served_pool import ServedPool, free_port


@pytest.fixture
def server(pool: ServedPool) -> StoreServer:
    return StoreServer(ControlClient(f"unix:{pool.directory}/control.sock"))


@pytest.mark.parametrize(
    ("control", "addresses", "expected"),
    [
        ("unix:/p/control.sock", ["unix:/n.sock", "127.0.0.1:1"], "127.0.0.1:1"),
        ("unix:/p/control.sock", ["unix:/n.sock"], "unix:/n.sock"),
        ("unix:/p/control.sock", ["0.0.0.0:1"], "127.0.0.1:1"),
        ("http://store:9", ["0.0.0.0:1"], "store:1"),
        ("http://[fd00::1]:9", ["[::]:1"], "[fd00::1]:1"),
        ("http://store:9", ["127.0.0.1:1", "192.0.2.1:2"], "192.0.2.1:2"),
        ("http://127.0.0.1:9", ["127.0.0.1:1"], "127.0.0.1:1"),
        ("http://store:9", ["127.0.0.1:1", "unix:/n.sock"], None),
        ("unix:/p/control.sock", [], None),
    ],
)
def test_the_address_that_can_be_reached_is_chosen(
    control: str, addresses: list[str], expected: str | None
) -> None:
    info = ServerInfo(version="1", pid=1, since="now", addresses=addresses)
    values = dict.fromkeys((field.name for field in dataclasses.fields(PoolInfo)), 0)
    pool = PoolInfo(**{**values, "server": info})  # type: ignore[arg-type]
    if expected is None:
        with pytest.raises(InvalidArgument, match="say with --nbd"):
            choose_address(control, pool)
    else:
        assert choose_address(control, pool) == expected


@pytest.mark.parametrize(
    "text",
    ["store", "store:", "store:nbd", "store:65536", ":10809", "nbds:/store", "nbd://store:1"],
)
def test_an_address_that_makes_no_sense_is_refused_at_once(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"is no address: .*nbds://HOST:PORT"):
        StoreServer(ControlClient("unix:/nowhere"), text)


@pytest.mark.parametrize("text", ["store:1", "[::1]:65535", "unix:nbd.sock", "nbds://store"])
def test_addresses_that_make_sense(text: str) -> None:
    assert StoreServer(ControlClient("unix:/nowhere"), text).address() == text


def test_shaking_hands(server: StoreServer, pool: ServedPool) -> None:
    for address in (server.address(), f"unix:{pool.socket_path}"):
        link = dial(address, "db")
        assert link.size == 128 << 20
        assert link.socket.gettimeout() is None
        link.socket.close()
    with pytest.raises(DeviceError, match="There is no export 'nix'"):
        dial(server.address(), "nix")


def test_a_leased_volume_is_had_by_its_lease_until_that_ends(server: StoreServer) -> None:
    lease = server.lease("db", "here")
    assert lease.export
    with pytest.raises(DeviceError, match="leased to 'here'"):
        dial(server.address(), "db")
    with dial(server.address(), lease.export).socket as sock:
        server.end_connections("db", lease.epoch + 1)
        (connection,) = server.control.attachments()
        server.end_connections("db", lease.epoch)
        assert server.control.attachments() == []
        assert sock.recv(1) == b""
    assert connection.lease_epoch == lease.epoch
    with dial(server.address(), lease.export).socket:
        server.release("db", "here", lease.epoch)
    with pytest.raises(DeviceError, match="has ended"):
        dial(server.address(), lease.export)
    server.release("db", "here", lease.epoch)
    server.release("nix", "here", 1)


@pytest.mark.parametrize(
    ("before", "now", "fits"),
    [
        (0b0101, 0b0101, True),
        (0b0101, 0b1101, True),
        (0b1101, 0b0101, False),
        (0b0111, 0b0111, True),
        (0b0111, 0b0101, False),
        (0b0101, 0b0111, False),
    ],
)
def test_a_server_after_an_upgrade_may_offer_more_but_not_less(
    before: int, now: int, fits: bool
) -> None:
    assert store_server.still_fits(before, now) is fits


def test_nobody_there() -> None:
    with pytest.raises(ServerAway, match="no NBD server answers"):
        dial(f"127.0.0.1:{free_port()}", "db")
    with pytest.raises(ServerAway, match="no NBD server answers"):
        dial("unix:/nowhere", "db")
    with pytest.raises(ServerAway, match="no NBD server answers"):
        dial("host..name:1", "db")


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"NBDMAGIC", b"NBDMAGICIHAVEOPT\0\3"]
)
def test_servers_that_speak_something_else_or_leave(said: bytes) -> None:
    def talk() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1024):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=talk)
        thread.start()
        with pytest.raises(NbdstoreError):
            dial(f"127.0.0.1:{listener.getsockname()[1]}", "db")
        thread.join()


def test_a_server_that_is_silent_is_given_up() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(ServerAway, match="went away in the handshake"),
    ):
        store_server.dial(f"127.0.0.1:{listener.getsockname()[1]}", "db", timeout_s=0.05)
