"""The client of the control API's routes about backups: a `BackupService` that asks a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from nbdstore.control import backup_stream, diff
from nbdstore.control.receiving_model import ReceivedInfo, ReceivingInfo
from nbdstore.control.stream import Buffer

if TYPE_CHECKING:
    from nbdstore.control.client import ControlClient


class BackupClient:
    """Ask the server of `client`; see `BackupService`."""

    def __init__(self, client: ControlClient) -> None:
        self._client = client

    def diff(self, newer: str, older: str | None = None) -> diff.Diff:
        query = {"newer": newer} | ({} if older is None else {"older": older})
        return diff.read(self._client.download(f"/v1/diff?{urlencode(query)}"))

    def send(self, snapshot: str, since: str | None = None) -> Iterator[Buffer]:
        query = "" if since is None else f"?{urlencode({'since': since})}"
        path = f"/v1/snapshots/{quote(snapshot, safe='')}/stream{query}"
        return self._client.download(path)

    def resume(self, token: str) -> Iterator[Buffer]:
        return self._client.download(f"/v1/resumed-stream?{urlencode({'token': token})}")

    def receive(self, name: str, chunks: Iterable[Buffer]) -> ReceivedInfo:
        content_type = backup_stream.CONTENT_TYPE
        return ReceivedInfo.from_json(
            self._client.upload("POST", _receive_path(name), chunks, content_type)
        )

    def receiving(self, name: str) -> ReceivingInfo:
        return ReceivingInfo.from_json(self._client.call("GET", _receive_path(name)))

    def abort_receive(self, name: str) -> None:
        self._client.call("DELETE", _receive_path(name))


def _receive_path(name: str) -> str:
    return f"/v1/volumes/{quote(name, safe='')}/receive"
