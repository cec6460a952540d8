"""Bearer tokens of the control API over TCP: who holds which, and what each is good for.

Owns the token file and its format: a line for each token, blank lines and lines that begin with
``#`` left out::

    admin TOKEN [NAME]      may call everything
    read  TOKEN [NAME]      may look: GET, which includes reading the content of volumes
    TOKEN                   a file of one word: an admin token

NAME is for the server's log. The file is read again when it has changed, so that a token can be
added or withdrawn while the server runs; SIGHUP is no signal for that, since it ends a server whose
terminal has gone. While the file is missing, or wrong, nobody is let in: a withdrawn token must not
come back because of a typing error. To change it without such a moment, write another file and
rename it.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdstore.control.routing import Access, Caller
from nbdstore.errors import InvalidArgument
from nbdstore.file_signature import signature
from nbdstore.sizes import exact_size

MAX_BYTES = 256 << 10
"""Of a token file: each call is compared with all of its tokens."""
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")
"""What an Authorization header can carry (RFC 6750, "b64token")."""
_ANONYMOUS = {Access.ADMIN: "an admin token", Access.READ: "a read token"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Token:
    """A secret, and whom it lets in."""

    secret: bytes
    caller: Caller


class Tokens:
    """A fixed set of tokens."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = tokens

    def find(self, secret: bytes) -> Caller | None:
        """Return whom a secret lets in; None if nobody."""
        found = None
        for token in self._tokens:
            # All are compared, each in the same time wherever the first difference is.
            if hmac.compare_digest(secret, token.secret):
                found = token.caller
        return found


class TokenFile(Tokens):
    """The tokens in a file, as it is now.

    Raises:
        InvalidArgument: the file cannot be read, is open to everybody, or makes no sense.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._signature = signature(path)
        super().__init__(read(path))

    def find(self, secret: bytes) -> Caller | None:
        """See Tokens; reads the file first if it has changed."""
        now = signature(self._path)
        if now != self._signature:
            self._signature = now
            try:
                self._tokens = read(self._path)
                log.info("read the token file %s again", self._path)
            except InvalidArgument as error:
                self._tokens = []
                log.error("%s; until then nobody is let in over TCP", error)
        return super().find(secret)


def read(path: Path) -> list[Token]:
    """Read a token file.

    Raises:
        InvalidArgument: as of TokenFile, naming file and line, and no secret.
    """
    try:
        with path.open(encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not plain text"
        raise InvalidArgument(f"cannot read the token file '{path}': {reason}") from error
    if mode & 0o006:
        raise InvalidArgument(
            f"the token file '{path}' is open to everybody on this machine (mode {mode & 0o777:o}):"
            f" close it with 'chmod 600 {path}', and make new tokens"
        )
    if len(text) > MAX_BYTES:
        raise InvalidArgument(f"the token file '{path}' is over {exact_size(MAX_BYTES)}")
    return _parsed(text, path)


def _parsed(text: str, path: Path) -> list[Token]:
    words = text.split()
    if len(words) == 1 and words[0] not in ("admin", "read"):
        return [_token(["admin", *words], f"'{path}'")]
    tokens: dict[bytes, Token] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        token = _token(line.split(), f"'{path}', line {number}")
        if token.secret in tokens:
            raise InvalidArgument(
                f"the token file '{path}', line {number}: the token is that of another line"
            )
        tokens[token.secret] = token
    if not tokens:
        raise InvalidArgument(f"the token file '{path}' holds no token: write 'admin TOKEN' in it")
    return list(tokens.values())


def _token(words: list[str], where: str) -> Token:
    role, secret, name = [*words, "", ""][:3]
    if len(words) > 3 or role not in ("admin", "read") or not _TOKEN.fullmatch(secret):
        raise InvalidArgument(
            f"the token file {where}: write 'admin TOKEN [NAME]' or 'read TOKEN [NAME]', the token "
            "of letters, digits and ._~+/=-"
        )
    access = Access(role)
    return Token(secret.encode(), Caller(access, name or _ANONYMOUS[access]))
