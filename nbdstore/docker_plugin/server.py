"""Docker's volume plugin protocol over a unix socket.

HTTP POST of JSON, answers of JSON; an error is status 500, which is what Podman looks at, with the
member ``Err``, which is what Docker shows. Source: docs.docker.com, "Docker volume plugins" and
"Docker Plugin API".

====================================  ==========================  ============================
/Plugin.Activate                                                  Implements
/VolumeDriver.Create                  Name, Opts
/VolumeDriver.Remove                  Name
/VolumeDriver.Mount                   Name, ID                    Mountpoint
/VolumeDriver.Unmount                 Name, ID
/VolumeDriver.Path                    Name                        Mountpoint
/VolumeDriver.Get                     Name                        Volume
/VolumeDriver.List                                                Volumes
/VolumeDriver.Capabilities                                        Capabilities: Scope "global"
====================================  ==========================  ============================

The scope is global: a volume is made once and mounted on any machine, one at a time, which leases
see to.
"""

from __future__ import annotations

import http.server
import json
import logging
import re
import socket
import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from nbdstore import unix_socket
from nbdstore.docker_plugin.driver import VolumeDriver
from nbdstore.errors import ControlError, InvalidArgument, NbdstoreError

CONTENT_TYPE: Final = "application/vnd.docker.plugins.v1.1+json"
MAX_BODY: Final = 1 << 20
IDLE_TIMEOUT_S: Final = 300.0
NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,199}", re.ASCII)

Json = dict[str, Any]

log = logging.getLogger(__name__)


class Protocol:
    """Answers calls by their path."""

    def __init__(self, driver: VolumeDriver) -> None:
        self._driver = driver
        self._calls: dict[str, Callable[[Json], Json]] = {
            "/Plugin.Activate": lambda _: {"Implements": ["VolumeDriver"]},
            "/VolumeDriver.Capabilities": lambda _: {"Capabilities": {"Scope": "global"}},
            "/VolumeDriver.Create": self._create,
            "/VolumeDriver.Remove": self._remove,
            "/VolumeDriver.Mount": self._mount,
            "/VolumeDriver.Unmount": self._unmount,
            "/VolumeDriver.Path": lambda body: {"Mountpoint": driver.path(_name(body))},
            "/VolumeDriver.Get": lambda body: {"Volume": driver.describe(_name(body))},
            "/VolumeDriver.List": lambda _: {"Volumes": driver.list()},
        }

    def answer(self, path: str, content: bytes) -> Json:
        """Answer one call; never raises, as Docker shows ``Err`` to whoever has asked."""
        try:
            call = self._calls.get(path)
            if call is None:
                raise InvalidArgument(f"volume plugins have no call {path}")
            return {"Err": ""} | call(_body(content))
        except NbdstoreError as error:
            log.warning("%s: %s", path, error)
            return {"Err": f"nbdstore: {error}"}
        except Exception as error:
            log.exception("%s has a bug", path)
            return {"Err": f"nbdstore has a bug ({type(error).__name__}); its log says more"}

    def _create(self, body: Json) -> Json:
        given = body.get("Opts") or {}
        if not isinstance(given, dict):
            raise InvalidArgument(f"Opts are {given!r:.80}: 'key: value' pairs belong there")
        self._driver.create(_name(body), {str(key): str(value) for key, value in given.items()})
        return {}

    def _remove(self, body: Json) -> Json:
        self._driver.remove(_name(body))
        return {}

    def _mount(self, body: Json) -> Json:
        return {"Mountpoint": self._driver.mount(_name(body), str(body.get("ID", "")))}

    def _unmount(self, body: Json) -> Json:
        self._driver.unmount(_name(body), str(body.get("ID", "")))
        return {}


def _body(content: bytes) -> Json:
    try:
        body = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise InvalidArgument(f"a call's body is a JSON object, not {content[:80]!r}")
    return body


def _name(body: Json) -> str:
    name = body.get("Name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidArgument(
            f"'{name}' is no name for a volume: give letters, digits, '_', '.' and '-'"
        )
    return name


class PluginServer:
    """Answers on a unix socket, from `start` to `stop`; each caller has a thread.

    Raises:
        ControlError: the socket cannot be made.
    """

    def __init__(self, driver: VolumeDriver, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._listener = unix_socket.listen(path)
        except OSError as error:
            raise ControlError(f"the plugin cannot listen at {path}: {error.strerror}") from error
        self._server = _Server(self._listener, Protocol(driver))
        self._thread = threading.Thread(target=self._server.serve_forever, name="plugin")

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Take the socket away, so that Docker does not wait for nobody; calls under way end."""
        self._path.unlink(missing_ok=True)
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(socketserver.ThreadingMixIn, socketserver.BaseServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket, protocol: Protocol) -> None:
        super().__init__(listener.getsockname(), _Handler)
        self.protocol = protocol
        self._listener = listener

    def fileno(self) -> int:
        return self._listener.fileno()

    def get_request(self) -> tuple[socket.socket, str]:
        return self._listener.accept()[0], "docker"

    def handle_error(self, request: Any, address: Any) -> None:
        """Podman leaves without waiting for answers that it does not need."""
        log.debug("a caller left without its answer", exc_info=True)

    def shutdown_request(self, request: Any) -> None:
        request.close()

    def server_close(self) -> None:
        self._listener.close()
        super().server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_TIMEOUT_S

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            self.send_error(413)
            return
        content = self.rfile.read(int(length))
        assert isinstance(self.server, _Server)
        told = self.server.protocol.answer(self.path, content)
        answer = json.dumps(told).encode() + b"\n"
        self.send_response(500 if told["Err"] else 200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *words: Any) -> None:
        """Say nothing: what fails is logged where it is answered."""

    def address_string(self) -> str:
        return "docker"
