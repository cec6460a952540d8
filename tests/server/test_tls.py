"""TLS: the modes of proto.md ("TLS versions" and what follows), and who may attach what."""

from __future__ import annotations

import errno
import logging
import ssl
from pathlib import Path

import pytest

from nbdstore.errors import InvalidArgument
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import build_info, build_meta_context, build_option
from nbdstore.protocol.constants import Command, Errno, Option, OptionReply
from nbdstore.server import Server, ServerOptions, TlsMode, TlsOptions
from nbdstore.server.exports import Identity
from tests.clients.certificates import Authority

REQUIRED, OPTIONAL = TlsMode.REQUIRED, TlsMode.OPTIONAL


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture(scope="module")
def server_files(authority):
    return authority.issue_server()


@pytest.fixture(scope="module")
def host1(authority):
    """The directory of a client whose certificate names it host1."""
    return authority.issue_client("host1")


@pytest.fixture
def tls_options(authority, server_files):
    def make(mode: TlsMode, verify_clients: bool = True) -> TlsOptions:
        ca = authority.certificate if verify_clients else None
        return TlsOptions(mode, server_files.certificate, server_files.key, ca)

    return make


@pytest.fixture
def client_context(authority, host1):
    def make(with_certificate: bool = True) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(authority.certificate))
        if with_certificate:
            context.load_cert_chain(host1 / "client-cert.pem", host1 / "client-key.pem")
        return context

    return make


async def begin_tls(client, context) -> None:
    assert await client.last(Option.STARTTLS) == OptionReply.ACK
    await client.start_tls(context)


# --- Rules: those that a client can see by itself are in tests/conformance/cases/tls.py -----------


@pytest.mark.parametrize(
    "early", [b"I", build_option(Option.GO, build_info("disk")), b"\x16\x03\x01\x00\x05hello"]
)
async def test_11_plaintext_behind_starttls_closes(serve, connect, tls_options, early):
    """Injected by somebody in the middle, it must not be taken for the client's under TLS."""
    await serve(tls=tls_options(REQUIRED))
    client = await connect()
    client.send(build_option(Option.STARTTLS) + early)
    assert await client.closed()


async def test_13_only_info_and_go_ask_for_tls(pool, serve, connect, tls_options):
    """proto.md, "SELECTIVETLS"."""
    pool.volumes["disk"].properties["allow"] = ["host1"]
    pool.create("open", 1 << 20)
    await serve(tls=tls_options(OPTIONAL))
    client = await connect()
    assert (await client.try_go("disk")).reply == OptionReply.ERR_TLS_REQD
    assert await client.last(Option.INFO, build_info("disk")) == OptionReply.ERR_TLS_REQD
    server, ack = await client.ask(Option.LIST)
    assert (server.data[4:], ack.reply) == (b"open", OptionReply.ACK)
    contexts = build_meta_context("disk", [])
    assert await client.last(Option.LIST_META_CONTEXT, contexts) == OptionReply.ERR_POLICY
    assert (await client.go("open")).size == 1 << 20


# --- Who may attach what -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allow", "reply"),
    [
        (["host1"], OptionReply.ACK),
        (["other", "host1"], OptionReply.ACK),
        ([], OptionReply.ACK),
        (["other"], OptionReply.ERR_POLICY),
        (["HOST1", "host", "*"], OptionReply.ERR_POLICY),
    ],
)
async def test_certificates_are_names(
    pool, serve, connect, tls_options, client_context, allow, reply
):
    pool.volumes["disk"].properties["allow"] = allow
    server = await serve(tls=tls_options(REQUIRED))
    client = await connect()
    await begin_tls(client, client_context())
    listed = await client.ask(Option.LIST)
    assert len(listed) == (2 if reply == OptionReply.ACK else 1)
    answer = await client.try_go("disk")
    assert answer.reply == reply
    if reply != OptionReply.ACK:
        assert b"host1" in answer.data
        assert answer.data.endswith(b".")
    (info,) = server.connections
    assert info.tls_name == "host1"


async def test_clients_without_a_certificate_get_nowhere(
    serve, connect, tls_options, client_context
):
    await serve(tls=tls_options(REQUIRED))
    client = await connect()
    with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
        # Under TLS 1.3 the client learns of it with its first read.
        await begin_tls(client, client_context(with_certificate=False))
        await client.try_go()


async def test_clients_need_no_certificate_without_a_ca(
    pool, serve, connect, tls_options, client_context
):
    pool.create("guarded", 1 << 20).properties["allow"] = ["host1"]
    await serve(tls=tls_options(REQUIRED, verify_clients=False))
    client = await connect()
    await begin_tls(client, client_context())
    assert (await client.try_go("guarded")).reply == OptionReply.ERR_POLICY
    assert (await client.try_go("disk")).reply == OptionReply.ACK


def test_identities_have_names():
    assert Identity(names=("a", "b")).name == "a"
    assert Identity().name is None


# --- Data under TLS ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ReplyMode)
async def test_large_and_many_requests(serve, connect, tls_options, client_context, mode):
    """More than a record, more than a socket's buffer, and more than one at a time."""
    await serve(tls=tls_options(REQUIRED))
    client = await connect()
    await begin_tls(client, client_context())
    await client.go("disk", mode)
    data = bytes(range(256)) * (3 << 12)
    await client.write(1, data)
    assert await client.read(1, len(data)) == data
    cookies = [client.start(Command.READ, i * 4096, 4096) for i in range(500)]
    replies = [await client.reply(cookie) for cookie in cookies]
    assert b"".join(reply.data for reply in replies) == b"\0" + data[: 500 * 4096 - 1]
    assert (await client.do(Command.READ, 1 << 40, 1)).error == Errno.EINVAL


# --- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["open", "stat"])
def test_files_that_may_not_be_read(pool, server_files, monkeypatch, method):
    """The test may run as root, who may read everything."""

    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, method, denied)
    options = ServerOptions(tls=TlsOptions(REQUIRED, server_files.certificate, server_files.key))
    with pytest.raises(InvalidArgument, match=r"cannot read the TLS file .*: Permission denied"):
        Server(pool, options)


def test_files_that_make_no_sense(pool, server_files, authority, tmp_path):
    junk = tmp_path / "junk.pem"
    junk.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    good = server_files.certificate, server_files.key
    cases = [
        (tmp_path / "missing.pem", good[1], None, "missing.pem does not exist"),
        (tmp_path, good[1], None, "not a file"),
        (good[1], good[0], None, "cannot use the TLS certificate"),
        (junk, good[1], None, "cannot use the TLS certificate"),
        (authority.certificate, good[1], None, "key values mismatch"),
        (*good, junk, "as the CA of clients"),
    ]
    for certificate, key, ca, message in cases:
        options = ServerOptions(tls=TlsOptions(REQUIRED, certificate, key, ca))
        with pytest.raises(InvalidArgument, match=message):
            Server(pool, options)


async def test_one_line_tells_of_a_failed_handshake(serve, connect, tls_options, caplog):
    caplog.set_level(logging.INFO)
    server = await serve(tls=tls_options(REQUIRED))
    client = await connect()
    assert await client.last(Option.STARTTLS) == OptionReply.ACK
    client.send(b"junk" * 10)
    await client.until_closed()
    await server.drain(5)
    assert [r.message for r in caplog.records if "TLS failed" in r.message]


async def test_a_certificate_that_was_renewed_counts_for_the_next_client(serve, connect, tmp_path):
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    files = old.issue_server()
    await serve(tls=TlsOptions(REQUIRED, files.certificate, files.key))
    trusting = {
        authority: ssl.create_default_context(cafile=str(authority.certificate))
        for authority in (old, new)
    }
    there = await connect()
    await begin_tls(there, trusting[old])
    renewed = new.issue_server()
    renewed.key.replace(files.key)
    renewed.certificate.replace(files.certificate)
    client = await connect()
    await begin_tls(client, trusting[new])
    for one in (there, client):
        assert await one.last(Option.GO, build_info("disk")) == OptionReply.ACK
    late = await connect()
    with pytest.raises(ssl.SSLCertVerificationError):
        await begin_tls(late, trusting[old])
