"""What systemd passes and wants to hear, there or not, right or wrong."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from nbdstore import systemd
from nbdstore.errors import InvalidArgument


class TestNotify:
    @pytest.mark.parametrize("abstract", [False, True])
    def test_the_manager_hears(self, tmp_path: Path, abstract: bool) -> None:
        name = f"nbdstore-{os.getpid()}" if abstract else str(tmp_path / "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(("\0" if abstract else "") + name)
            systemd.notify({"NOTIFY_SOCKET": ("@" if abstract else "") + name}, "READY=1")
            assert manager.recv(100) == b"READY=1"

    @pytest.mark.parametrize(
        "environ",
        [
            {},
            {"NOTIFY_SOCKET": ""},
            {"NOTIFY_SOCKET": "/no/such/socket"},
            {"NOTIFY_SOCKET": "vsock:2:1"},
            {"NOTIFY_SOCKET": "/" + "x" * 200},
        ],
        ids=str,
    )
    def test_nobody_hears(self, environ: dict[str, str]) -> None:
        systemd.notify(environ, "READY=1")


class TestPassedSockets:
    def test_those_of_another_process_are_left_alone(self) -> None:
        assert systemd.passed_sockets({"LISTEN_FDS": "1", "LISTEN_PID": "1"}, 42) == []
        assert systemd.passed_sockets({}, 42) == []

    @pytest.mark.parametrize("count", ["", "x", "-1", "1.5"])
    def test_a_count_that_is_none(self, count: str) -> None:
        with pytest.raises(InvalidArgument, match="not a number of sockets"):
            systemd.passed_sockets({"LISTEN_FDS": count, "LISTEN_PID": "42"}, 42)

    def test_none(self) -> None:
        assert systemd.passed_sockets({"LISTEN_FDS": "0", "LISTEN_PID": "42"}, 42) == []


class TestAdopting:
    def test_a_listening_socket(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as original:
            passed = systemd.PassedSocket("nbd", systemd.adopt(os.dup(original.fileno()), "it"))
            with passed.socket:
                assert passed.listening
                assert not passed.socket.get_inheritable()

    def test_a_connection(self) -> None:
        for original in socket.socketpair():
            with systemd.adopt(original.detach(), "it") as sock:
                assert not systemd.PassedSocket("", sock).listening

    def test_what_is_no_socket(self, tmp_path: Path) -> None:
        with (
            (tmp_path / "file").open("wb") as file,
            pytest.raises(InvalidArgument, match="it is not a socket"),
        ):
            systemd.adopt(file.fileno(), "it")
        with pytest.raises(InvalidArgument, match="it is not a socket"):
            systemd.adopt(file_descriptor_that_is_closed(), "it")

    def test_a_datagram_socket_stays_the_caller_s(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as original:
            with pytest.raises(InvalidArgument, match="it is not a stream socket"):
                systemd.adopt(original.fileno(), "it")
            assert original.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)


def file_descriptor_that_is_closed() -> int:
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    return fd
