"""What all commands share: which pool or server is meant, and the way to it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nbdstore.commands.output import note
from nbdstore.control import SOCKET_NAME
from nbdstore.errors import InvalidArgument, NbdstoreError, PoolLocked

if TYPE_CHECKING:
    from nbdstore.control.service import VolumeService

LOCK_PATIENCE_S = 5.0
"""Another command holds the pool for a moment only, and a server opens its control socket soon
after it locks the pool; whoever keeps the lock longer without answering is worth an error."""
RETRY_EVERY_S = 0.05


@dataclasses.dataclass(frozen=True)
class Session:
    """The global options, and the environment for those few who need it.

    pool: the pool's directory. server: a control URL, which wins over `pool`.
    """

    pool: Path
    server: str | None = None
    token_file: Path | None = None
    tls_ca: Path | None = None
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def control_url(self) -> str:
        """Where a server that holds the pool answers."""
        return f"unix:{self.pool / SOCKET_NAME}"

    @contextmanager
    def service(self, *, patient: bool = True) -> Iterator[VolumeService]:
        """Reach the pool, through the server that holds it or by opening it for the moment."""
        service = self._reach(LOCK_PATIENCE_S if patient else 0.0)
        try:
            yield service
        finally:
            service.close()

    def _reach(self, patience_s: float) -> VolumeService:
        # Imported late: it brings HTTP and TLS, which 'serve' and every --help do without.
        from nbdstore.control.client import ControlClient

        if self.server is not None:
            token = read_token(self.token_file) if self.token_file else None
            client = ControlClient(self.server, token=token, tls_ca=self.tls_ca)
            if token and not client.is_private:
                note(f"the token crosses the network in the clear: {self.server} is no https")
            return client
        deadline_s = time.monotonic() + patience_s
        client = ControlClient(self.control_url)
        while not client.reachable():
            try:
                return self._open()
            except PoolLocked as error:
                if time.monotonic() >= deadline_s:
                    raise PoolLocked(
                        f"{error} (nobody answers there: if a server is starting or stopping, "
                        "try again)"
                    ) from error
            time.sleep(RETRY_EVERY_S)
        return client

    def _open(self) -> VolumeService:
        # Imported late: the store brings numpy, which a command that talks to a server never needs.
        from nbdstore.commands.local import LocalService

        return LocalService(self.pool)

    def require_local(self, command: str) -> Path:
        """Return the pool's directory for a command that works on it alone, without a server."""
        if self.server is not None:
            raise InvalidArgument(
                f"'{command}' works on a pool of this machine: give --pool, not --server"
            )
        return self.pool


pass_session: Callable[[Callable[..., Any]], Callable[..., Any]] = click.pass_obj


def read_token(path: Path) -> str:
    """Read a bearer token: the file's only line.

    Raises:
        InvalidArgument: the file cannot be read, or holds no token.
    """
    try:
        lines = path.read_text(encoding="ascii").split()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not plain text"
        raise InvalidArgument(f"cannot read the token file '{path}': {reason}") from error
    if len(lines) != 1:
        raise InvalidArgument(f"the token file '{path}' must hold one line, the token, and no more")
    return lines[0]


def complete_volume(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Offer the names of the pool's volumes to the shell; nothing rather than an error."""
    return _complete(ctx, incomplete, lambda service: [info.name for info in service.volumes()])


def complete_snapshot(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Offer the names of the pool's snapshots, likewise."""
    return _complete(
        ctx, incomplete, lambda service: [info.snapshot for info in service.snapshots()]
    )


def complete_image(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Offer the names of both, likewise."""
    volumes = complete_volume(ctx, param, incomplete)
    return volumes + complete_snapshot(ctx, param, incomplete)


def _complete(
    ctx: click.Context, incomplete: str, names: Callable[[VolumeService], list[str]]
) -> list[str]:
    options = ctx.find_root().params
    session = Session(
        options.get("pool") or Path(),
        options.get("server"),
        options.get("token_file"),
        options.get("tls_ca"),
    )
    try:
        with session.service(patient=False) as service:
            return [name for name in names(service) if name.startswith(incomplete)]
    except (NbdstoreError, OSError):
        return []
