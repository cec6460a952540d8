"""Certificates for the tests: authorities, servers and clients, in libnbd's and QEMU's file names.

A client's directory holds ``ca-cert.pem``, ``client-cert.pem`` and ``client-key.pem``; without a
certificate of its own it holds only the first.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)
SIGNS_CERTIFICATES = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


@dataclass(frozen=True)
class Issued:
    """A certificate and its private key, as files."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority that issues into one directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.certificate = directory / "ca-cert.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = name("test authority")
        builder = self._builder(self._name, self._key)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        builder = builder.add_extension(SIGNS_CERTIFICATES, critical=True)
        self._write(builder, self.certificate)

    def issue_server(self) -> Issued:
        """Issue a certificate for localhost."""
        alternatives: list[x509.GeneralName] = [
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        ]
        return self._issue(
            self.directory / "server", "localhost", ExtendedKeyUsageOID.SERVER_AUTH, alternatives
        )

    def issue_client(self, common_name: str) -> Path:
        """Issue a client's certificate and return the directory that clients are given."""
        directory = self.trusting_client(common_name)
        self._issue(directory / "client", common_name, ExtendedKeyUsageOID.CLIENT_AUTH, [])
        return directory

    def trusting_client(self, name: str) -> Path:
        """Make the directory of a client that trusts this authority and has no certificate."""
        directory = self.directory / name
        directory.mkdir()
        (directory / "ca-cert.pem").write_bytes(self.certificate.read_bytes())
        return directory

    def _issue(
        self,
        prefix: Path,
        common_name: str,
        usage: x509.ObjectIdentifier,
        alternatives: list[x509.GeneralName],
    ) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(name(common_name), key).add_extension(
            x509.ExtendedKeyUsage([usage]), critical=False
        )
        if alternatives:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=False
            )
        issued = Issued(Path(f"{prefix}-cert.pem"), Path(f"{prefix}-key.pem"))
        self._write(builder, issued.certificate)
        issued.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return issued

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
            # Who checks strictly (Python 3.13 does) wants to know which keys these are.
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False
            )
        )

    def _write(self, builder: x509.CertificateBuilder, path: Path) -> None:
        certificate = builder.sign(self._key, hashes.SHA256())
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
