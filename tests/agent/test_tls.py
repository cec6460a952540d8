"""TLS between the fuse driver's relay and a server that asks for it; never less than was asked."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdstore.agent import mounts, store_server
from nbdstore.agent.drivers import Drivers
from nbdstore.agent.tls import TlsAddress, parse_address
from nbdstore.errors import DeviceError, InvalidArgument, ProtocolError
from nbdstore.protocol.constants import (
    HELLO,
    INIT_PASSWD,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    Option,
    OptionReply,
)
from tests.agent.host import Host
from tests.children import Children
from tests.clients.certificates import Authority
from tests.clients.served_pool import ServedPool

SIZE = 128 << 20


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def secured(children: Children, tmp_path: Path, authority: Authority) -> Iterator[ServedPool]:
    """A pool with the volume "db", served with TLS to clients with certificates alone."""
    pool = ServedPool(children, tmp_path)
    pool.create("--capacity", "1G", "--journal-size", "8M")
    pool.create_volume("db", str(SIZE))
    server = authority.issue_server()
    pool.start(
        *("--tls", "required", "--tls-cert", str(server.certificate)),
        *("--tls-key", str(server.key), "--tls-ca", str(authority.certificate)),
        "--tls-verify-client",
    )
    yield pool
    pool.close()


def address(pool: ServedPool, certificates: Path) -> str:
    return f"nbds://localhost:{pool.port}?tls-certificates={certificates}"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("127.0.0.1:10809", None),
        ("unix:/run/nbd.sock", None),
        ("nbds://store", TlsAddress("store", 10809, None)),
        ("nbds://store:5/?tls-certificates=/etc/nbd", TlsAddress("store", 5, Path("/etc/nbd"))),
        ("nbds://[::1]:5", TlsAddress("::1", 5, None)),
    ],
)
def test_addresses(text: str, wanted: TlsAddress | None) -> None:
    assert parse_address(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "nbd://store:10809",
        "nbds://",
        "nbds://store:port",
        "nbds://store/db",
        "nbds://store?tls-certificates=relative",
        "nbds://store?tls-certificate=/etc/nbd",
        "nbds://store?tls-certificates",
    ],
)
def test_addresses_that_make_no_sense(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_address(text)


def test_both_sides_must_be_trusted(
    secured: ServedPool, authority: Authority, tmp_path: Path
) -> None:
    link = store_server.dial(address(secured, authority.issue_client("host")), "db")
    link.socket.close()
    assert link.size == SIZE
    other = Authority(tmp_path / "other").issue_client("host")
    with pytest.raises(DeviceError, match="is not trusted: "):
        store_server.dial(address(secured, other), "db")
    # It hangs up, and what we have sent by then may keep its reason from us.
    with pytest.raises(DeviceError, match=r"certificate required|went away in the handshake"):
        store_server.dial(address(secured, authority.trusting_client("nobody")), "db")
    with pytest.raises(InvalidArgument, match=r"files in .* cannot be used"):
        store_server.dial(address(secured, tmp_path / "nowhere"), "db")


def test_a_server_and_a_client_that_do_not_agree_about_tls(
    secured: ServedPool, authority: Authority
) -> None:
    with pytest.raises(DeviceError, match=r"asks for TLS: say so with --nbd nbds://.*the kernel"):
        store_server.dial(f"127.0.0.1:{secured.port}", "db")
    secured.stop()
    secured.start()
    with pytest.raises(DeviceError, match=r"speaks no TLS \(ERR_.*--tls"):
        store_server.dial(address(secured, authority.issue_client("host")), "db")


def reply(kind: int) -> bytes:
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, Option.STARTTLS, kind, 0)


@pytest.mark.parametrize(
    "said",
    [
        reply(OptionReply.ACK) + b"forged",
        reply(OptionReply.SERVER) + reply(OptionReply.ACK),
    ],
    ids=["behind the consent", "before the consent"],
)
def test_what_is_slipped_in_before_tls_is_refused(said: bytes) -> None:
    """An answer to GO that came without TLS would be taken for the server's."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            peer.sendall(HELLO.pack(INIT_PASSWD, OPTION_MAGIC, 3) + said)
            while peer.recv(4096):
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    with listener, pytest.raises(ProtocolError, match="sent more before TLS"):
        store_server.dial(f"nbds://127.0.0.1:{listener.getsockname()[1]}", "db")
    thread.join()


def test_the_kernel_driver_is_not_chosen_for_tls() -> None:
    with pytest.raises(DeviceError, match="the kernel driver speaks no TLS"):
        Drivers({}).choose("kernel", with_tls=True)


@pytest.mark.requires("root", "/dev/fuse", "/dev/loop-control", "nbdfuse", "fusermount3")
@pytest.mark.requires("losetup", "mount", "mkfs.ext4", "setsid")
@pytest.mark.timeout(180)
def test_a_volume_is_mounted_over_tls_through_a_restart_of_its_server(
    secured: ServedPool, authority: Authority, children: Children, tmp_path: Path
) -> None:
    certificates = tmp_path / "certificates"
    shutil.copytree(authority.issue_client("host"), certificates)
    content = os.urandom(3 << 20)
    with Host(children, secured, tmp_path / "host") as host:
        where = host.directory / "mnt"
        assert "asks for TLS" in host.nbdstore("mount", "db", where, "--driver", "fuse", status=1)
        host.env["NBDSTORE_NBD"] = address(secured, certificates)
        refused = host.nbdstore("attach", "db", "--driver", "kernel", status=1)
        assert "the kernel driver speaks no TLS" in refused
        host.nbdstore("mount", "db", where)
        shown = json.loads(secured.nbdstore("volume", "show", "db", "--json"))
        (connection,) = shown["attachments"]
        assert connection["tls_name"] == "host"
        (where / "file").write_bytes(content)
        secured.kill()
        secured.restart()
        host.nbdstore("umount", "db")
        host.nbdstore("mount", "db", where)
        assert mounts.mounted_at(str(where)) is not None
        assert (where / "file").read_bytes() == content
        host.nbdstore("umount", "db")
