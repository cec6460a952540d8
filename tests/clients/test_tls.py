"""TLS with the clients that people use: who gets in, who does not, and that data comes through."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

from tests.children import Children, CommandError
from tests.clients.certificates import Authority
from tests.clients.images import SIZE, write_sparse_image
from tests.clients.served_pool import ServedPool

pytestmark = pytest.mark.requires("nbdinfo")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def other_authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "other-authority")


def start(pool: ServedPool, authority: Authority, mode: str, *, verify: bool = False) -> None:
    """Serve with TLS; with ``verify`` a client needs a certificate of the same authority."""
    server = authority.issue_server()
    options = ["--tls", mode, "--tls-cert", str(server.certificate), "--tls-key", str(server.key)]
    if verify:
        options += ["--tls-ca", str(authority.certificate), "--tls-verify-client"]
    pool.start(*options)


def tls_uri(pool: ServedPool, certificates: Path, export: str = "disk") -> str:
    return f"nbds://localhost:{pool.port}/{export}?tls-certificates={certificates}"


def test_a_client_that_trusts_the_authority_gets_in(
    pool: ServedPool, children: Children, authority: Authority
) -> None:
    start(pool, authority, "required")
    output = children.run("nbdinfo", tls_uri(pool, authority.trusting_client("anyone")))
    assert "with TLS" in output


def test_a_client_that_trusts_another_authority_refuses_the_server(
    pool: ServedPool, children: Children, authority: Authority, other_authority: Authority
) -> None:
    start(pool, authority, "required")
    with pytest.raises(CommandError, match="certificate"):
        children.run("nbdinfo", tls_uri(pool, other_authority.trusting_client("anyone")))


def test_a_client_without_tls_is_refused_when_tls_is_required(
    pool: ServedPool, children: Children, authority: Authority
) -> None:
    start(pool, authority, "required")
    with pytest.raises(CommandError, match=r"(?i)tls"):
        children.run("nbdinfo", pool.uri())


def test_both_kinds_of_clients_get_in_when_tls_is_optional(
    pool: ServedPool, children: Children, authority: Authority
) -> None:
    start(pool, authority, "optional")
    assert "without TLS" in children.run("nbdinfo", pool.uri())
    assert "with TLS" in children.run("nbdinfo", tls_uri(pool, authority.trusting_client("any")))


def test_a_client_certificate_lets_a_client_in(
    pool: ServedPool, children: Children, authority: Authority
) -> None:
    start(pool, authority, "required", verify=True)
    children.run("nbdinfo", tls_uri(pool, authority.issue_client("node-1")))


def test_a_client_without_certificate_is_refused_when_one_is_required(
    pool: ServedPool, children: Children, authority: Authority
) -> None:
    start(pool, authority, "required", verify=True)
    children.run("nbdinfo", tls_uri(pool, authority.trusting_client("node-1")), status=1)


def test_a_certificate_of_another_authority_is_refused(
    pool: ServedPool, children: Children, authority: Authority, other_authority: Authority
) -> None:
    start(pool, authority, "required", verify=True)
    client = other_authority.issue_client("node-1")
    (client / "ca-cert.pem").write_bytes(authority.certificate.read_bytes())
    children.run("nbdinfo", tls_uri(pool, client), status=1)


def test_an_export_is_there_only_for_the_certificates_it_allows(
    pool: ServedPool, children: Children, authority: Authority
) -> None:
    pool.nbdstore("volume", "allow", "disk", "node-1")
    start(pool, authority, "required", verify=True)
    children.run("nbdinfo", tls_uri(pool, authority.issue_client("node-1")))
    children.run("nbdinfo", tls_uri(pool, authority.issue_client("node-2")), status=1)


@pytest.mark.requires("nbdcopy")
def test_an_image_comes_back_through_nbdcopy(
    pool: ServedPool, children: Children, authority: Authority, tmp_path: Path
) -> None:
    image = write_sparse_image(tmp_path / "image")
    pool.create_volume("exact", str(SIZE))
    start(pool, authority, "required", verify=True)
    uri = tls_uri(pool, authority.issue_client("node-1"), "exact")
    children.run("nbdcopy", image, uri)
    children.run("nbdcopy", uri, tmp_path / "copy")
    assert filecmp.cmp(image, tmp_path / "copy", shallow=False)


@pytest.mark.requires("qemu-img")
def test_an_image_is_converted_by_qemu_img(
    pool: ServedPool, children: Children, authority: Authority, tmp_path: Path
) -> None:
    image = write_sparse_image(tmp_path / "image")
    pool.create_volume("exact", str(SIZE))
    start(pool, authority, "required", verify=True)
    client = authority.issue_client("node-1")
    credentials = ("--object", f"tls-creds-x509,id=tls,dir={client},endpoint=client")
    target = (
        f"driver=raw,file.driver=nbd,file.host=localhost,file.port={pool.port},"
        "file.export=exact,file.tls-creds=tls"
    )
    children.run(
        *("qemu-img", "convert", *credentials, "-n", "-f", "raw", "--target-image-opts"),
        *(image, target),
    )
    output = children.run(
        "qemu-img",
        "compare",
        *credentials,
        "--image-opts",
        f"driver=raw,file.filename={image}",
        target,
    )
    assert output == "Images are identical.\n"
