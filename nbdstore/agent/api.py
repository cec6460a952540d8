"""The agent's socket: what can be asked of an agent from other processes.

One unix stream socket, for its owner only. A caller sends one line of JSON and gets one back::

    {"do": "attach", "request": AttachRequest}                  AttachmentStatus
    {"do": "detach", "volume": V, "force"?: bool}               null
    {"do": "mount", "request": MountRequest}                    AttachmentStatus
    {"do": "umount", "volume": V, "path"?: P, "force"?: bool}   null
    {"do": "find", "path": P}                                   the volume that is mounted there
    {"do": "status"}                                            [AttachmentStatus...]
    {"do": "doctor", "fix"?: bool}                              [Finding...]

The answer is ``{"ok": RESULT}`` or ``{"problem": ...}`` with an error as the control API has them,
so that a caller gets the exception that the agent raised. One question for each connection.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from nbdstore import unix_socket
from nbdstore.agent.agent import Agent
from nbdstore.agent.doctor import Doctor, Finding
from nbdstore.agent.requests import AttachmentStatus, AttachRequest, MountRequest, from_json
from nbdstore.control import problems
from nbdstore.errors import ControlError, InvalidArgument, NbdstoreError

MAX_LINE: Final = 1 << 20
CONNECT_TIMEOUT_S: Final = 10.0

log = logging.getLogger(__name__)


class Questions:
    """Answers what can be asked, by the word in "do"."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def answer(self, question: dict[str, Any]) -> Any:
        """Do what is asked; return plain JSON values.

        Raises:
            InvalidArgument: the question makes no sense.
        """
        handlers: dict[str, Callable[..., Any]] = {
            "attach": self._attach,
            "detach": self._detach,
            "mount": self._mount,
            "umount": self._umount,
            "find": self._agent.find_by_path,
            "status": self._status,
            "doctor": self._doctor,
        }
        arguments = dict(question)
        handler = handlers.get(arguments.pop("do", ""))
        if handler is None:
            raise InvalidArgument(f"the agent can {', '.join(handlers)}, not {question.get('do')}")
        try:
            inspect.signature(handler).bind(**arguments)
        except TypeError as error:
            raise InvalidArgument(
                f"the agent was asked in words it does not know: {error}"
            ) from None
        return handler(**arguments)

    def _attach(self, request: dict[str, Any]) -> Any:
        return self._agent.attach(from_json(AttachRequest, request)).to_json()

    def _detach(self, volume: str, force: bool = False) -> None:
        self._agent.detach(volume, force=force)

    def _mount(self, request: dict[str, Any]) -> Any:
        return self._agent.mount(from_json(MountRequest, request)).to_json()

    def _umount(self, volume: str, path: str = "", force: bool = False) -> None:
        self._agent.umount(volume, path, force=force)

    def _status(self) -> Any:
        return [status.to_json() for status in self._agent.status()]

    def _doctor(self, fix: bool = False) -> Any:
        return [finding.to_json() for finding in Doctor(self._agent).examine(fix=fix)]


class AgentServer:
    """Answers on a socket, from `start` to `stop`; each caller has a thread."""

    def __init__(self, agent: Agent, path: Path) -> None:
        self._questions = Questions(agent)
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._listener = unix_socket.listen(path)
        except OSError as error:
            raise ControlError(f"the agent cannot listen at {path}: {error.strerror}") from error
        self._callers: set[threading.Thread] = set()
        self._thread = threading.Thread(target=self._accept, name="api", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Take the socket away, and wait for the calls that are under way."""
        self._path.unlink(missing_ok=True)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for caller in list(self._callers):
            caller.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # EINVAL: it was shut down
                return
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._callers.add(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock, sock.makefile("rb") as lines:
                answer = answer_line(self._questions, lines.readline(MAX_LINE))
                sock.sendall(json.dumps(answer).encode() + b"\n")
        except OSError as error:
            log.debug("a caller left without its answer: %s", error)
        finally:
            self._callers.discard(threading.current_thread())


def answer_line(questions: Questions, line: bytes) -> dict[str, Any]:
    """Answer one question as it came."""
    try:
        question = json.loads(line)
        if not isinstance(question, dict):
            raise ValueError
    except ValueError:
        return {"problem": problems.to_json(InvalidArgument("a question is one line of JSON"))}
    try:
        return {"ok": questions.answer(question)}
    except NbdstoreError as error:
        return {"problem": problems.to_json(error)}
    except Exception as error:
        log.exception("answering %s has a bug", question.get("do"))
        return {"problem": problems.to_json(error)}


class AgentClient:
    """Asks the agent that answers at `path`; raises what the agent raises."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def reachable(self) -> bool:
        """Return whether an agent answers now.

        Raises:
            ControlError: nobody can tell, such as when the socket is another user's.
        """
        try:
            unix_socket.connect(self._path, CONNECT_TIMEOUT_S).close()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError as error:
            raise ControlError(
                f"you may not talk to the agent at {self._path} ({error.strerror}): do this as root"
            ) from error
        return True

    def attach(self, request: AttachRequest) -> AttachmentStatus:
        answer = self._ask({"do": "attach", "request": dataclasses.asdict(request)})
        return AttachmentStatus.from_json(answer)

    def detach(self, volume: str, *, force: bool = False) -> None:
        self._ask({"do": "detach", "volume": volume, "force": force})

    def mount(self, request: MountRequest) -> AttachmentStatus:
        answer = self._ask({"do": "mount", "request": dataclasses.asdict(request)})
        return AttachmentStatus.from_json(answer)

    def umount(self, volume: str, path: str = "", *, force: bool = False) -> None:
        self._ask({"do": "umount", "volume": volume, "path": path, "force": force})

    def find_by_path(self, path: str) -> str:
        """Return the volume that is mounted at a path."""
        return str(self._ask({"do": "find", "path": path}))

    def status(self) -> list[AttachmentStatus]:
        return [AttachmentStatus.from_json(item) for item in self._ask({"do": "status"})]

    def examine(self, *, fix: bool = False) -> list[Finding]:
        return [Finding.from_json(item) for item in self._ask({"do": "doctor", "fix": fix})]

    def _ask(self, question: dict[str, Any]) -> Any:
        try:
            with unix_socket.connect(self._path, CONNECT_TIMEOUT_S) as sock:
                sock.settimeout(None)
                sock.sendall(json.dumps(question).encode() + b"\n")
                with sock.makefile("rb") as lines:
                    line = lines.readline()
        except OSError as error:
            raise ControlError(
                f"the agent at {self._path} went away: {error.strerror or error}"
            ) from error
        try:
            answer = json.loads(line)
        except ValueError:
            raise ControlError(f"the agent at {self._path} ended before it answered") from None
        if "problem" in answer:
            raise problems.load(json.dumps(answer["problem"]).encode())
        return answer["ok"]
