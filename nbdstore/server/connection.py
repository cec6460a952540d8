"""One connection's life: handshake, perhaps TLS, a session, the end.

Owns the channel from the accept to the close. The handshake is a coroutine with a deadline; the
session works by callbacks and is waited for.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import ssl
import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from nbdstore.errors import ProtocolError
from nbdstore.protocol.agreement import Agreement, TlsMode
from nbdstore.protocol.constants import TransmissionFlag
from nbdstore.protocol.handshake import Handshake, HandshakeLimits, Phase
from nbdstore.server.budget import Budget
from nbdstore.server.channel import Channel
from nbdstore.server.counters import Counters
from nbdstore.server.exports import Exports, ExportsView, VolumeOffer
from nbdstore.server.gathering import Gatherings
from nbdstore.server.limiter import Limiters
from nbdstore.server.meter import Meter
from nbdstore.server.options import Limits
from nbdstore.server.session import Session
from nbdstore.server.tls import TlsFiles, identify
from nbdstore.server.tls_channel import start_tls
from nbdstore.server.wakefulness import Wakefulness
from nbdstore.store import Image

log = logging.getLogger(__name__)

_ids = itertools.count(1)

NO_COUNTS = (0, 0, 0)
"""See Session.counts; before there is one."""

UNIX_CREDENTIALS = struct.Struct("3i")
"""``struct ucred`` of unix(7): pid, uid, gid."""


@dataclass(frozen=True)
class ConnectionInfo:
    """A connection as the control API shows it.

    Arguments:
        id: counts connections since the start of the process.
        peer: ``ADDRESS:PORT``, or ``unix:pid=PID,uid=UID``.
        export: name of the volume; None before the end of the handshake, and after the session's.
        since: time of the accept, ISO 8601.
        tls_name: name in the client's certificate; None without.
        holder, lease_epoch: of the lease by which it attached; None without.
        age_s: since the accept.
        in_flight: requests that have come and are not answered yet.
        bytes_read, bytes_written: by the client, since it attached.
        requests_per_s, read_per_s, written_per_s: over the last seconds; the latter two in bytes.
    """

    id: int
    peer: str
    export: str | None
    since: str
    read_only: bool
    tls_name: str | None
    holder: str | None
    lease_epoch: int | None
    age_s: float
    in_flight: int
    bytes_read: int
    bytes_written: int
    requests_per_s: float
    read_per_s: float
    written_per_s: float


class Tell(Protocol):
    """Takes an event: its kind, the export, and what there is to know."""

    def __call__(self, kind: str, export: str, /, **facts: Any) -> None: ...


def _tell_nobody(_kind: str, _export: str, /, **_facts: Any) -> None:
    """Do nothing."""


@dataclass
class Observer:
    """Who is told of clients that attach and detach."""

    tell: Tell = _tell_nobody


@dataclass(frozen=True)
class Settings:
    """What all connections of a server share."""

    observer: Observer
    counters: Counters
    exports: Exports
    limits: Limits
    limiters: Limiters
    budget: Budget
    wakefulness: Wakefulness
    gatherings: Gatherings
    tls_mode: TlsMode
    tls_files: TlsFiles | None


class Connection:
    """One client.

    Arguments:
        sock: connected; owned from now on.
        settings: what all connections share.
    """

    def __init__(self, sock: socket.socket, settings: Settings) -> None:
        tune(sock)
        self.id = next(_ids)
        self.peer = name_peer(sock)
        self.session: Session | None = None
        self._since = datetime.now(UTC)
        self._loop = asyncio.get_running_loop()
        self._since_s = self._loop.time()
        self._meter = Meter(self._since_s, NO_COUNTS)
        self._settings = settings
        self._channel = Channel(sock)
        self._view = ExportsView(settings.exports)
        self._agreement: Agreement | None = None

    @property
    def volume(self) -> Image | None:
        """The volume, or snapshot, that this client has attached.

        From when that was agreed, before it is told so, until no request of it can be executed.
        """
        return self._offer.volume if self._offer else None

    @property
    def _offer(self) -> VolumeOffer | None:
        if self._agreement is None or (self.session is not None and self.session.has_ended):
            return None
        assert isinstance(self._agreement.offer, VolumeOffer)
        return self._agreement.offer

    @property
    def info(self) -> ConnectionInfo:
        agreement, session, offer = self._agreement, self.session, self._offer
        lease = offer.lease if offer else None
        now_s, counts = self._loop.time(), session.counts if session else NO_COUNTS
        requests_per_s, read_per_s, written_per_s = self._meter.rates(now_s, counts)
        return ConnectionInfo(
            id=self.id,
            peer=self.peer,
            export=offer.volume.name if offer and session else None,
            since=self._since.isoformat(timespec="seconds"),
            read_only=bool(agreement and agreement.flags & TransmissionFlag.READ_ONLY),
            tls_name=self._view.identity.name,
            holder=lease.holder if lease else None,
            lease_epoch=lease.epoch if lease else None,
            age_s=now_s - self._since_s,
            in_flight=session.n_pending if session else 0,
            bytes_read=counts[1],
            bytes_written=counts[2],
            requests_per_s=requests_per_s,
            read_per_s=read_per_s,
            written_per_s=written_per_s,
        )

    async def run(self) -> None:
        """Live to the end. Raises nothing but CancelledError: a client's faults are logged."""
        linger_s = 0.0
        try:
            async with asyncio.timeout(self._settings.limits.handshake_timeout_s):
                handshake = await self._shake_hands()
            if handshake.agreement is not None:
                await self._serve(handshake.agreement, handshake.unread())
            linger_s = self._settings.limits.linger_s
        except TimeoutError:
            log.info("%s: closed, since its handshake took too long", self.peer)
        except ProtocolError as fault:
            log.warning("%s: closed, since it broke the protocol: %s", self.peer, fault)
        except ssl.SSLError as fault:
            log.warning("%s: TLS failed: %s", self.peer, fault.reason or fault)
        except OSError as fault:
            log.debug("%s: gone in the handshake: %s", self.peer, fault)
        except Exception:
            log.exception("bug: the connection of %s broke", self.peer)
        finally:
            if linger_s:
                await self._channel.close(linger_s)
            self._channel.abort()

    def drain(self) -> bool:
        """Let the session end once it has answered; False if there is none yet."""
        if self.session is not None:
            self.session.drain()
        return self.session is not None

    def give_up(self, why: str) -> asyncio.Future[None] | None:
        """End the session at once; return what is done when no request can be executed any more.

        None if there is no session yet: then the task of `run` must be cancelled.
        """
        if self.session is None:
            return None
        self.session.lose(ConnectionAbortedError(why))
        return self.session.done

    def stall(self, now_s: float, timeout_s: float) -> str | None:
        """See Session.stall; before the session there is the handshake's timeout."""
        return self.session.stall(now_s, timeout_s) if self.session is not None else None

    def measure(self) -> None:
        """Take a sample for the recent rates; to be called about every second."""
        if self.session is not None:
            self._meter.sample(self._loop.time(), self.session.counts)

    def notice_hang_up(self) -> None:
        """See Session.notice_hang_up; in the handshake everything is read at once."""
        if self.session is not None:
            self.session.notice_hang_up()

    def cut_off(self, stall: str) -> None:
        """End the session of a client that does not get on."""
        assert self.session is not None
        log.warning("%s: cut off, since others wait for the memory it holds: %s", self.peer, stall)
        self.session.lose(TimeoutError(stall))

    # --- Handshake ---------------------------------------------------------------------------

    async def _shake_hands(self) -> Handshake:
        """Negotiate until the transmission phase, or until the client is done otherwise."""
        limits = self._settings.limits
        handshake = Handshake(
            self._view,
            tls=self._settings.tls_mode,
            limits=HandshakeLimits(
                max_options=limits.max_options + 4 * len(self._settings.exports)
            ),
        )
        while True:
            for reply in handshake.data_to_send():
                await self._channel.send_all(reply)
            if handshake.phase is Phase.STARTTLS:
                await self._start_tls()
                handshake.tls_established()
            if handshake.phase in (Phase.TRANSMISSION, Phase.CLOSED):
                log.debug("%s: %s", self.peer, handshake.reason or "handshake done")
                return handshake
            if handshake.advance():
                self._agreement = handshake.agreement
                # A client that floods with options must let others, and its deadline, come.
                await asyncio.sleep(0)
            else:
                data = await self._channel.receive()
                if not data:
                    raise ConnectionResetError("closed by the client")
                handshake.receive(data)

    async def _start_tls(self) -> None:
        files = self._settings.tls_files
        assert files is not None
        channel = await start_tls(self._channel, files.context())
        self._channel = channel
        self._view.identity = identify(channel.tls)

    # --- Session -----------------------------------------------------------------------------

    async def _serve(self, agreement: Agreement, first_bytes: bytes) -> None:
        settings = self._settings
        # Connections from one host, or from one process, are one client.
        client = self.peer if self.peer.startswith("unix:") else self.peer.rpartition(":")[0]
        assert isinstance(agreement.offer, VolumeOffer)
        session = Session(
            self._channel,
            agreement,
            settings.limits,
            settings.budget,
            settings.wakefulness,
            settings.gatherings.of(agreement.offer.volume),
            client,
            settings.counters.of(agreement.offer.volume),
        )
        self.session = session
        session.limit(settings.limiters.of(session.volume))
        name = session.volume.name
        log.info(
            "%s attached %s (%s%s)",
            self.peer,
            name,
            "read-only" if agreement.flags & TransmissionFlag.READ_ONLY else "read-write",
            f", TLS name {self._view.identity.name}" if self._view.identity.name else "",
        )
        tell, about = settings.observer.tell, {"connection": self.id, "peer": self.peer}
        tell("client.attached", name, read_only=self.info.read_only, **about)
        try:
            await session.serve(first_bytes)
        finally:
            _, n_read, n_written = session.counts
            tell("client.detached", name, bytes_read=n_read, bytes_written=n_written, **about)
            log.info(
                "%s detached %s: read %d bytes, wrote %d bytes%s",
                self.peer,
                name,
                session.bytes_read,
                session.bytes_written,
                f"; {session.fault}" if session.fault else "",
            )


# --- Sockets -------------------------------------------------------------------------------------

KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 60, 10, 6
"""A host that vanished is noticed after two minutes, and its volumes can be deleted."""

UNIX_SEND_BYTES = 1 << 20
"""The default of 208 KiB makes a reply of 1 MiB take five wake-ups. TCP tunes itself."""


def tune(sock: socket.socket) -> None:
    """Set what a connection's socket should have."""
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BYTES)
        return
    # proto.md, "TCP_NODELAY": both sides SHOULD set it.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def name_peer(sock: socket.socket) -> str:
    """Name the other end for logs; on a unix socket, the process that connected."""
    try:
        if sock.family == socket.AF_UNIX:
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UNIX_CREDENTIALS.size)
            pid, uid, _ = UNIX_CREDENTIALS.unpack(raw)
            return f"unix:pid={pid},uid={uid}"
        host, port = sock.getpeername()[:2]
    except OSError:
        return "a client that is gone"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
