"""Certificates for the rows over TLS: one authority, one server, and a client that trusts it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def issue(directory: Path) -> None:
    """Make ``directory`` with ca-cert.pem, server-cert.pem and server-key.pem."""
    # Imported late: without the package only the rows over TLS cannot be measured.
    from tests.clients.certificates import Authority

    Authority(directory).issue_server()


def why_missing() -> str | None:
    """Say why no certificates can be made; None if they can."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        return "needs the Python package cryptography"
    return None


@contextlib.contextmanager
def pki_home(authority: Path) -> Iterator[Path]:
    """A home directory in which libnbd finds whom to trust.

    libnbd takes root's from /etc/pki alone, which is not ours to change: fio runs as nobody, so
    this directory is readable for all, and lies where all can reach it.
    """
    home = Path(tempfile.mkdtemp(prefix="nbdstore-bench-"))
    try:
        certificates = home / ".pki" / "libnbd"
        certificates.mkdir(parents=True)
        home.chmod(0o755)
        if authority.exists():
            shutil.copy(authority / "ca-cert.pem", certificates)
        yield home
    finally:
        shutil.rmtree(home)
