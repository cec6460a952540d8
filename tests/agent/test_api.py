"""The agent's socket: what callers get who ask well, badly, or not at all."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdstore import unix_socket
from nbdstore.agent.api import AgentClient, AgentServer
from nbdstore.agent.local import Setting, open_agent
from nbdstore.agent.requests import AttachRequest
from nbdstore.errors import ControlError, NotFound


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where an agent answers, whose server is away."""
    path = tmp_path / "run" / "agent.sock"
    setting = Setting(state=tmp_path / "state", control_url=f"unix:{tmp_path}/none", driver="fuse")
    with open_agent(setting) as agent:
        server = AgentServer(agent, path)
        server.start()
        yield path
        server.stop()
    assert not path.exists()


def ask(path: Path, line: bytes) -> dict[str, dict[str, str]]:
    with unix_socket.connect(path, 20.0) as sock:
        sock.sendall(line)
        sock.shutdown(socket.SHUT_WR)
        answer: dict[str, dict[str, str]] = json.loads(sock.makefile("rb").readline())
        return answer


def test_only_the_owner_may_ask(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b"", "invalid-argument", "one line of JSON"),
        (b"[1]\n", "invalid-argument", "one line of JSON"),
        (b"{\n", "invalid-argument", "one line of JSON"),
        (b'{"do": "dance"}\n', "invalid-argument", "not dance"),
        (b'{"do": "detach"}\n', "invalid-argument", "words it does not know"),
        (b'{"do": "status", "loud": true}\n', "invalid-argument", "words it does not know"),
        (b'{"do": "attach", "request": {"volume": 1}}\n', "invalid-argument", "must be str"),
        (b'{"do": "mount", "request": {"volume": "db"}}\n', "invalid-argument", "without path"),
        (b'{"do": "detach", "volume": "db"}\n', "not-found", "not attached here"),
    ],
)
def test_questions_that_make_no_sense(path: Path, line: bytes, code: str, words: str) -> None:
    problem = ask(path, line)["problem"]
    assert problem["code"] == code
    assert words in problem["detail"]


def test_errors_come_back_as_they_were_raised(path: Path) -> None:
    client = AgentClient(path)
    assert client.reachable()
    assert client.status() == []
    with pytest.raises(NotFound, match="not attached here"):
        client.detach("db")
    with pytest.raises(ControlError, match="no server answers"):
        client.attach(AttachRequest(volume="db"))
    assert [finding.kind for finding in client.examine()] == ["server"]


def test_callers_that_leave_do_no_harm(path: Path) -> None:
    for line in (b"", b'{"do"', b'{"do": "status"}\n'):
        with unix_socket.connect(path, 20.0) as sock:
            sock.sendall(line)
    assert AgentClient(path).status() == []


def test_no_agent(tmp_path: Path) -> None:
    client = AgentClient(tmp_path / "none.sock")
    assert not client.reachable()
    with pytest.raises(ControlError, match="went away"):
        client.status()
