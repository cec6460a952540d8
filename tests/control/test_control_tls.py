"""The control API over TLS: whom the client trusts, and what the server makes of others."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdstore.control import endpoint
from nbdstore.control.client import ControlClient
from nbdstore.control.endpoint import MAX_CONNECTIONS, Endpoint
from nbdstore.control.listeners import Listeners
from nbdstore.errors import ControlError, InvalidArgument, Unauthorized
from nbdstore.protocol.agreement import TlsMode
from nbdstore.server import TlsOptions
from nbdstore.server.tls import TlsFiles
from tests.clients.certificates import Authority
from tests.control.conftest import READ_TOKEN, TOKEN, TOKENS, Answering


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def url(answering: Answering, authority: Authority, tmp_path: Path) -> Iterator[str]:
    """A second endpoint on the pool of `answering`, over TLS."""
    issued = authority.issue_server()
    tls = TlsFiles(TlsOptions(TlsMode.REQUIRED, issued.certificate, issued.key)).context
    directory = tmp_path / "second"
    directory.mkdir()
    listeners = Listeners(directory, tcp=("127.0.0.1", 0), tokens=TOKENS, tls=tls)
    second = Endpoint(answering.bench.operations, listeners)
    answering.run(second.start)
    yield second.addresses[1]
    answering.run(second.stop)


def address_of(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("https://").rpartition(":")
    return host, int(port)


def test_a_client_that_trusts_the_authority(url: str, authority: Authority) -> None:
    assert url.startswith("https://127.0.0.1:")
    client = ControlClient(url, token=TOKEN, tls_ca=authority.certificate)
    assert client.create_volume("db", 1 << 20) == client.volume("db")
    with pytest.raises(Unauthorized):
        ControlClient(url, tls_ca=authority.certificate).pool()


@pytest.mark.requires("curl")
def test_curl(url: str, authority: Authority) -> None:
    done = subprocess.run(
        [
            *("curl", "--silent", "--fail", "--cacert", str(authority.certificate)),
            *("--header", f"Authorization: Bearer {READ_TOKEN}", f"{url}/v1/pool"),
        ],
        check=True,
        stdout=subprocess.PIPE,
    )
    assert b'"directory": "/memory"' in done.stdout


def test_a_client_that_does_not(url: str, tmp_path: Path) -> None:
    with pytest.raises(ControlError, match=r"not who it should be.*--tls-ca"):
        ControlClient(url, token=TOKEN).pool()
    other = Authority(tmp_path / "other").certificate
    with pytest.raises(ControlError, match="not who it should be"):
        ControlClient(url, token=TOKEN, tls_ca=other).pool()


def test_the_name_counts(url: str, authority: Authority) -> None:
    elsewhere = url.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(ControlError):
        ControlClient(elsewhere, token=TOKEN, tls_ca=authority.certificate).pool()


def test_plain_and_secure_do_not_mix(url: str, answering: Answering, authority: Authority) -> None:
    with pytest.raises(ControlError, match=r"went away.*or write https:"):
        ControlClient(url.replace("https", "http"), token=TOKEN).pool()
    secure = answering.http_url.replace("http", "https")
    with pytest.raises(ControlError, match="does it speak TLS there"):
        ControlClient(secure, token=TOKEN, tls_ca=authority.certificate).pool()


def test_authorities_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="No such file"):
        ControlClient("https://h", tls_ca=tmp_path / "none")
    (tmp_path / "text").write_text("text")
    with pytest.raises(InvalidArgument, match="no PEM file"):
        ControlClient("https://h", tls_ca=tmp_path / "text")


def test_a_crowd_that_never_shakes_hands_is_bounded(url: str, authority: Authority) -> None:
    crowd = [socket.create_connection(address_of(url)) for _ in range(MAX_CONNECTIONS)]
    with socket.create_connection(address_of(url)) as refused:
        refused.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            assert refused.recv(1) == b""
    for sock in crowd:
        sock.close()
    client = ControlClient(url, token=TOKEN, tls_ca=authority.certificate)
    while True:  # until their ends were seen
        with contextlib.suppress(ControlError):
            client.pool()
            break


@pytest.mark.parametrize("shakes_hands", [False, True])
def test_who_says_nothing_does_not_stay(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, shakes_hands: bool
) -> None:
    monkeypatch.setattr(endpoint, "HEAD_TIMEOUT_S", 0.5)
    silent: socket.socket = socket.create_connection(address_of(request.getfixturevalue("url")))
    silent.settimeout(30)
    if shakes_hands:
        context = ssl.create_default_context(
            cafile=request.getfixturevalue("authority").certificate
        )
        silent = context.wrap_socket(silent, server_hostname="localhost")
    with silent, contextlib.suppress(ConnectionResetError):
        assert silent.recv(1) == b""


def test_tokens_in_the_clear_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for host, expected in (("127.0.0.1", 0), ("0.0.0.0", 1)):
        caplog.clear()
        Listeners(tmp_path, tcp=(host, 0), tokens=TOKENS).close()
        warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert ["in the clear" in r.getMessage() for r in warnings] == [True] * expected


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("unix:/x", True),
        ("https://192.0.2.1:1", True),
        ("http://127.0.0.1:1", True),
        ("http://[::1]:1", True),
        ("http://localhost:1", True),
        ("http://192.0.2.1:1", False),
        ("http://blocks.example.org", False),
    ],
)
def test_what_is_private(address: str, private: bool) -> None:
    assert ControlClient(address).is_private is private


def test_a_certificate_that_was_renewed_counts_for_the_next_caller(
    url: str, authority: Authority, tmp_path: Path
) -> None:
    """The endpoint runs on; who trusts only the new authority is served once it has signed."""
    successor = Authority(tmp_path / "successor")
    client = ControlClient(url, token=TOKEN, tls_ca=successor.certificate)
    with pytest.raises(ControlError, match="not who it should be"):
        client.pool()
    renewed = successor.issue_server()
    for new, old in (
        (renewed.certificate, authority.directory / "server-cert.pem"),
        (renewed.key, authority.directory / "server-key.pem"),
    ):
        new.replace(old)
    assert client.pool().directory == "/memory"
    with pytest.raises(ControlError, match="not who it should be"):
        ControlClient(url, token=TOKEN, tls_ca=authority.certificate).pool()


@pytest.mark.parametrize("part", ["server-cert.pem", "server-key.pem"])
@pytest.mark.parametrize("content", ["damaged", "of another pair", "missing"])
def test_files_that_cannot_be_used_change_nothing(
    url: str,
    authority: Authority,
    tmp_path: Path,
    part: str,
    content: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = ControlClient(url, token=TOKEN, tls_ca=authority.certificate)
    file = authority.directory / part
    before = file.read_bytes()
    if content == "damaged":
        file.write_text("-----BEGIN nothing")
    elif content == "missing":
        file.unlink()
    else:
        other = Authority(tmp_path / "other").issue_server()
        (other.certificate if "cert" in part else other.key).replace(file)
    with caplog.at_level(logging.ERROR, "nbdstore.server.tls"):
        assert client.pool() == client.pool()
    assert len(caplog.messages) == 1, "it is said once"
    assert "what was read before is used until they change again" in caplog.text
    caplog.clear()
    file.write_bytes(before)
    with caplog.at_level(logging.INFO, "nbdstore.server.tls"):
        assert client.pool()
    assert "again" in caplog.text
