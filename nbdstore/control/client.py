"""The client of the control API: a `VolumeService` that asks a server over HTTP.

Owns the URLs (``unix:PATH``, ``http://HOST:PORT``, ``https://HOST:PORT``), the requests, and the
way back from problems to exceptions. Needs nothing but the standard library and xxhash, and starts
fast: agents on other hosts and every short command use it.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import socket
import ssl
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Unpack
from urllib.parse import quote, unquote, urlencode, urlsplit
from uuid import uuid4

from nbdstore import unix_socket
from nbdstore.control import problems, stream
from nbdstore.control.backup_client import BackupClient
from nbdstore.control.capacity import CapacityReport
from nbdstore.control.changes import Deletion, VolumeChanges
from nbdstore.control.model import (
    AttachmentInfo,
    LeaseInfo,
    OperationInfo,
    PoolInfo,
    SnapshotInfo,
    TrashInfo,
    VolumeInfo,
)
from nbdstore.control.service import Content
from nbdstore.control.space import SpaceReport
from nbdstore.control.stream import Buffer, Piece, StreamReader, StreamWriter
from nbdstore.errors import ControlError, InvalidArgument

TIMEOUT_S = 120.0
"""Seconds without a byte from the server after which a call is given up."""
CONNECT_TIMEOUT_S = 10.0
MAX_PATH = 7 << 10
"""Bytes of a path with its query; a server reads little more (aiohttp, max_line_size)."""


class ControlClient:
    """Ask the server at `url`; one connection per call, so a client outlives server restarts.

    Arguments:
        url: ``unix:PATH``, ``http://HOST:PORT`` or ``https://HOST:PORT``.
        token: the bearer token, for TCP.
        tls_ca: PEM file of the authority that a server at ``https://`` must be certified by; None =
            those that this machine trusts.

    Raises:
        InvalidArgument: `url` is none of these forms, or `tls_ca` cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        tls_ca: Path | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.url = url
        self._timeout_s = timeout_s
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._path, self._host, self._port, tls = _split(url)
        self._tls = _tls_context(tls_ca) if tls else None

    @property
    def is_private(self) -> bool:
        """Whether nobody between can read what is said: TLS, a unix socket, or this machine."""
        if self._path is not None or self._tls is not None or self._host == "localhost":
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self._host).is_loopback
        return False

    # VolumeService; see there

    def pool(self) -> PoolInfo:
        return PoolInfo.from_json(self._call("GET", "/v1/pool"))

    def grow_pool(self, capacity: int) -> PoolInfo:
        return PoolInfo.from_json(self._call("POST", "/v1/pool/grow", {"capacity": capacity}))

    def checkpoint(self) -> PoolInfo:
        return PoolInfo.from_json(self._call("POST", "/v1/pool/checkpoint", {}))

    def capacity(self) -> CapacityReport:
        return CapacityReport.from_json(self._call("GET", "/v1/capacity"))

    def space(self) -> SpaceReport:
        return SpaceReport.from_json(self._call("GET", "/v1/space"))

    @property
    def backups(self) -> BackupClient:
        return BackupClient(self)

    def attachments(self) -> list[AttachmentInfo]:
        listing = self._list("/v1/connections", "connections")
        return [AttachmentInfo.from_json(item) for item in listing]

    def disconnect(self, connection_id: int) -> None:
        self._call("DELETE", f"/v1/connections/{connection_id}")

    def leases(self) -> list[LeaseInfo]:
        return [LeaseInfo.from_json(item) for item in self._list("/v1/leases", "leases")]

    def acquire_lease(self, name: str, holder: str, *, force: bool = False) -> LeaseInfo:
        body = {"holder": holder, "force": force}
        return LeaseInfo.from_json(self._call("PUT", _volume_path(name) + "/lease", body))

    def release_lease(self, name: str, holder: str, epoch: int | None = None) -> None:
        query = {"holder": holder} | ({} if epoch is None else {"epoch": str(epoch)})
        self._call("DELETE", f"{_volume_path(name)}/lease?{urlencode(query)}")

    def break_lease(self, name: str) -> None:
        self._call("POST", _volume_path(name) + "/lease/break", {})

    def volumes(self) -> list[VolumeInfo]:
        return [VolumeInfo.from_json(item) for item in self._list("/v1/volumes", "volumes")]

    def volume(self, name: str) -> VolumeInfo:
        return VolumeInfo.from_json(self._call("GET", _volume_path(name)))

    def create_volume(
        self, name: str, size: int, allow: Sequence[str] = (), *, uuid: str | None = None
    ) -> VolumeInfo:
        body = {"name": name, "size": size, "allow": list(allow), "uuid": _chosen(uuid)}
        return VolumeInfo.from_json(self._call_twice("POST", "/v1/volumes", body))

    def update_volume(self, name: str, **changes: Unpack[VolumeChanges]) -> VolumeInfo:
        renamed = {"name" if key == "new_name" else key: value for key, value in changes.items()}
        body = {k: v for k, v in renamed.items() if v is not None and v is not False}  # 0 is told
        return VolumeInfo.from_json(self._call("PATCH", _volume_path(name), body))

    def delete_volume(self, name: str, **how: Unpack[Deletion]) -> None:
        uuid = how.pop("uuid", None)
        query = {flag: "1" for flag, wanted in how.items() if wanted}
        self._delete(_volume_path(name), query, uuid)

    # Snapshots, clones, the trash

    def snapshots(self, volume: str | None = None, *, unique: bool = False) -> list[SnapshotInfo]:
        wanted = {"volume": volume, "unique": "1" if unique else None}
        query = urlencode({key: value for key, value in wanted.items() if value is not None})
        listing = self._list("/v1/snapshots" + (f"?{query}" if query else ""), "snapshots")
        return [SnapshotInfo.from_json(item) for item in listing]

    def create_snapshots(
        self, names: Sequence[str], *, uuids: Sequence[str] | None = None
    ) -> list[SnapshotInfo]:
        chosen = [str(uuid4()) for _ in names] if uuids is None else list(uuids)
        body = {"snapshots": list(names), "uuids": chosen}
        made = self._call_twice("POST", "/v1/snapshots", body)
        return [SnapshotInfo.from_json(item) for item in made["snapshots"]]

    def delete_snapshot(self, name: str, *, uuid: str | None = None) -> None:
        self._delete(_snapshot_path(name), {}, uuid)

    def rollback(self, name: str, *, fence: bool = False) -> VolumeInfo:
        body = {"fence": fence}
        return VolumeInfo.from_json(self._call("POST", _snapshot_path(name) + "/rollback", body))

    def clone(
        self, name: str, new_name: str, allow: Sequence[str] = (), *, uuid: str | None = None
    ) -> VolumeInfo:
        body = {"name": new_name, "allow": list(allow), "uuid": _chosen(uuid)}
        return VolumeInfo.from_json(self._call_twice("POST", _snapshot_path(name) + "/clone", body))

    def start_flatten(self, name: str, *, operation_id: str | None = None) -> OperationInfo:
        body = {"id": operation_id or uuid4().hex}
        return OperationInfo.from_json(self._call("POST", _volume_path(name) + "/flatten", body))

    def trash(self) -> list[TrashInfo]:
        return [TrashInfo.from_json(item) for item in self._list("/v1/trash", "trash")]

    def restore(self, which: str, name: str | None = None) -> VolumeInfo:
        body = {} if name is None else {"name": name}
        return VolumeInfo.from_json(self._call("POST", _trash_path(which) + "/restore", body))

    def purge(self, which: str) -> None:
        self._call("DELETE", _trash_path(which))

    def read_content(self, name: str) -> Content:
        connection = self._connect()
        try:
            response = self._send(connection, "GET", _volume_path(name) + "/data")
            reader = StreamReader()
            pieces = self._received(connection, response, reader)
            first = next(pieces, None)
        except BaseException:
            connection.close()
            raise
        if reader.size is None:
            raise ControlError(f"{self.url} sent no data stream")
        return Content(reader.size, _resumed(first, pieces))

    def write_content(
        self, name: str, size: int, pieces: Iterable[Piece], *, overwrite: bool = False
    ) -> VolumeInfo:
        path = _volume_path(name) + "/data" + ("?overwrite=1" if overwrite else "")
        with contextlib.closing(self._connect()) as connection:
            response = self._send(connection, "PUT", path, _frames(size, pieces))
            return VolumeInfo.from_json(_decode(self._read(response)))

    def start_scrub(
        self,
        volume: str | None = None,
        *,
        rate: int | None = None,
        restart: bool = False,
        operation_id: str | None = None,
    ) -> OperationInfo:
        asked = {
            "volume": volume,
            "rate": rate,
            "restart": restart or None,
            # An answer that is lost must not leave the caller without the operation.
            "id": operation_id or uuid4().hex,
        }
        body = {key: value for key, value in asked.items() if value is not None}
        return OperationInfo.from_json(self._call("POST", "/v1/scrub", body))

    def operations(self) -> list[OperationInfo]:
        listing = self._list("/v1/operations", "operations")
        return [OperationInfo.from_json(item) for item in listing]

    def operation(self, operation_id: str, *, wait_s: int = 0) -> OperationInfo:
        path = _operation_path(operation_id) + f"?wait={wait_s}"
        return OperationInfo.from_json(self._call("GET", path))

    def cancel_operation(self, operation_id: str) -> OperationInfo:
        return OperationInfo.from_json(self._call("DELETE", _operation_path(operation_id)))

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what happens from now on, until the server stops; see `control/events.py`.

        Raises:
            ControlError: the server went away, or has dropped this listener, which was too slow.
        """
        with contextlib.closing(self._connect()) as connection:
            response = self._send(connection, "GET", "/v1/events")
            while line := self._read_line(response):
                if line.strip():
                    yield _decode(line)

    def close(self) -> None:
        """Nothing is kept open between calls."""

    # HTTP

    def reachable(self) -> bool:
        """Return whether somebody accepts connections at the address now.

        A socket that a killed server left behind refuses connections, as one that is gone does.

        Raises:
            ControlError: nobody can tell, such as when the socket is another user's.
        """
        try:
            self._connect().close()
        except ControlError as error:
            if isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
                return False
            raise
        return True

    def download(self, path: str) -> Iterator[bytes]:
        """Get a body bit by bit; that the call itself succeeded is known on return."""
        connection = self._connect()
        try:
            response = self._send(connection, "GET", path)
        except BaseException:
            connection.close()
            raise
        return self._chunks(connection, response)

    def _chunks(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> Iterator[bytes]:
        with contextlib.closing(connection):
            while chunk := self._read(response, stream.PIECE_BYTES):
                yield chunk

    def upload(self, method: str, path: str, chunks: Iterable[Buffer], content_type: str) -> Any:
        """Send a body bit by bit, and return the JSON of the answer."""
        with contextlib.closing(self._connect()) as connection:
            response = self._send(connection, method, path, chunks, content_type)
            return _decode(self._read(response))

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Call with a JSON body, or none, and return the JSON of the answer, or None."""
        return self._call(method, path, body)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        payload = None if body is None else json.dumps(body).encode()
        with contextlib.closing(self._connect()) as connection:
            response = self._send(connection, method, path, payload)
            content = self._read(response)
        return _decode(content) if content else None

    def _call_twice(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Call, and once more if the answer got lost: for what does nothing when it was done.

        A caller that waited in vain for an answer is not made to wait again.
        """
        try:
            return self._call(method, path, body)
        except ControlError as error:
            if not isinstance(error.__cause__, ConnectionError | http.client.HTTPException):
                raise
        return self._call(method, path, body)

    def _delete(self, path: str, query: dict[str, str], uuid: str | None) -> None:
        """Delete what is at `path`; what has no uuid may be another thing the second time."""
        query |= {} if uuid is None else {"uuid": uuid}
        call = self._call if uuid is None else self._call_twice
        call("DELETE", path + (f"?{urlencode(query)}" if query else ""))

    def _list(self, path: str, member: str) -> list[Any]:
        answer = self._call("GET", path)
        if not isinstance(answer, dict) or not isinstance(answer.get(member), list):
            raise ControlError(f"{self.url} sent no list of {member}")
        return list(answer[member])

    def _connect(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection
        try:
            if self._path is not None:
                connection = http.client.HTTPConnection("localhost")
                connection.sock = unix_socket.connect(self._path, CONNECT_TIMEOUT_S)
            else:
                connection = self._tcp_connection()
                connection.connect()
        except UnicodeError:  # of the encoding of host names, IDNA
            raise InvalidArgument(
                f"{self._host!r} in {self.url} is neither a host name nor an IP address"
            ) from None
        except OSError as error:
            self._unreachable(error)
        assert isinstance(connection.sock, socket.socket)
        connection.sock.settimeout(self._timeout_s)
        return connection

    def _tcp_connection(self) -> http.client.HTTPConnection:
        host, port = self._host, self._port
        if self._tls is None:
            return http.client.HTTPConnection(host, port, timeout=CONNECT_TIMEOUT_S)
        return http.client.HTTPSConnection(host, port, timeout=CONNECT_TIMEOUT_S, context=self._tls)

    def _unreachable(self, error: OSError) -> NoReturn:
        if isinstance(error, ssl.SSLCertVerificationError):
            raise ControlError(
                f"the server at {self.url} is not who it should be: {error.verify_message}: give "
                "the authority that has signed its certificate with --tls-ca"
            ) from error
        if isinstance(error, ssl.SSLError):
            reason = (error.reason or str(error)).replace("_", " ").lower()
            raise ControlError(
                f"TLS with {self.url} failed ({reason}): does it speak TLS there?"
            ) from error
        if isinstance(error, PermissionError):
            raise ControlError(
                f"you may not talk to the server at {self.url}: do this as the pool's owner"
            ) from error
        raise ControlError(
            f"no server answers at {self.url} ({error.strerror or error}): "
            "is it running, and is the address right?"
        ) from error

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | Iterable[Buffer] | None = None,
        content_type: str = stream.CONTENT_TYPE,
    ) -> http.client.HTTPResponse:
        """Send a request and return the response if it is a success, else raise its problem."""
        if len(path) > MAX_PATH:
            raise InvalidArgument(
                f"'{unquote(path):.60}...' is too long to be asked for: a name has at "
                "most 255 characters"
            )
        headers = dict(self._headers)
        if body is not None:
            headers["Content-Type"] = (
                "application/json" if isinstance(body, bytes) else content_type
            )
        try:
            # A server that refuses an import answers before it has read all of it.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self._broken(error)
        if response.status >= 300:
            raise problems.load(self._read(response), response.status)
        return response

    def _read(self, response: http.client.HTTPResponse, n_bytes: int | None = None) -> bytes:
        try:
            return response.read() if n_bytes is None else response.read1(n_bytes)
        except (OSError, http.client.HTTPException) as error:
            self._broken(error)

    def _read_line(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.readline()
        except (OSError, http.client.HTTPException) as error:
            self._broken(error)

    def _broken(self, error: Exception) -> NoReturn:
        if isinstance(error, TimeoutError):
            raise ControlError(
                f"{self.url} gave no answer within {self._timeout_s:g} s: see the server's log"
            ) from error
        tls = "" if self._path or self._tls else " (or write https://, if it speaks TLS there)"
        raise ControlError(
            f"{self.url} went away before it answered ({str(error) or type(error).__name__}): "
            f"see whether the change was made, and try again{tls}"
        ) from error

    def _received(
        self,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        reader: StreamReader,
    ) -> Iterator[Piece]:
        for chunk in self._chunks(connection, response):
            yield from reader.feed(chunk)
        reader.end()


def _tls_context(ca: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror if isinstance(error, FileNotFoundError) else "it is no PEM file"
        raise InvalidArgument(f"cannot use '{ca}' as the authority of servers: {reason}") from None


def _split(url: str) -> tuple[Path | None, str, int, bool]:
    """Return (socket path or None, host, port, TLS)."""
    if url.startswith("unix:"):
        path = url.removeprefix("unix:").removeprefix("//")
        if path:
            return Path(path), "", 0, False
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/"):
            tls = parts.scheme == "https"
            return None, parts.hostname, parts.port or (443 if tls else 80), tls
    raise InvalidArgument(
        f"'{url}' is not a server's address: write it as unix:PATH, http://HOST:PORT or https://HOST:PORT"
    )


def _volume_path(name: str) -> str:
    return "/v1/volumes/" + quote(name, safe="")


def _operation_path(operation_id: str) -> str:
    return "/v1/operations/" + quote(operation_id, safe="")


def _snapshot_path(name: str) -> str:
    return "/v1/snapshots/" + quote(name, safe="")


def _trash_path(which: str) -> str:
    return "/v1/trash/" + quote(which, safe="")


def _chosen(uuid: str | None) -> str:
    """The uuid of what is to be made, by which it is known again if the answer gets lost."""
    return str(uuid4()) if uuid is None else uuid


def _decode(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        raise ControlError(f"the server answered {content[:80]!r} where JSON belongs") from None


def _frames(size: int, pieces: Iterable[Piece]) -> Iterator[Buffer]:
    writer = StreamWriter()
    yield from writer.header(size)
    for piece in pieces:
        yield from writer.data(piece)
    yield from writer.end()


def _resumed(first: Piece | None, rest: Iterator[Piece]) -> Iterator[Piece]:
    if first is not None:
        yield first
    yield from rest
