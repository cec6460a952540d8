"""Records of TLS 1.2 that no library sends: greetings in the middle of a connection.

Owns the client's side of one cipher suite, as far as it takes to encrypt.
"""

from __future__ import annotations

import hmac
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CIPHER: Final = "ECDHE-ECDSA-AES128-GCM-SHA256"
ALERT: Final = 21  # the types of records, RFC 5246, "Record Layer"
HANDSHAKE: Final = 22
DATA: Final = 23
GREETING: Final = b"\x01\x00\x00\x00"  # a ClientHello that says nothing


class Records:
    """What the client sends after its Finished.

    Arguments:
        key_log: the line that its library wrote for this connection (SSLKEYLOGFILE).
        server_hello: the first bytes that the server sent.
    """

    def __init__(self, key_log: str, server_hello: bytes) -> None:
        _, client_random, master_secret = key_log.split()
        seed = b"key expansion" + server_hello[11:43] + bytes.fromhex(client_random)
        keys = expand(bytes.fromhex(master_secret), seed, 40)
        self._cipher, self._salt = AESGCM(keys[:16]), keys[32:36]
        self._n_sent = 1  # the Finished

    def next(self, kind: int, content: bytes) -> bytes:
        """The next record (RFC 5246, "AEAD Ciphers"; RFC 5288)."""
        number = self._n_sent.to_bytes(8)
        self._n_sent += 1
        head = bytes([kind, 3, 3])
        about = number + head + len(content).to_bytes(2)
        sealed = number + self._cipher.encrypt(self._salt + number, content, about)
        return head + len(sealed).to_bytes(2) + sealed


def expand(secret: bytes, seed: bytes, n_bytes: int) -> bytes:
    """The pseudorandom function of RFC 5246, with SHA-256."""
    found, at = b"", seed
    while len(found) < n_bytes:
        at = hmac.digest(secret, at, "sha256")
        found += hmac.digest(secret, at + seed, "sha256")
    return found[:n_bytes]
