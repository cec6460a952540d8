"""Other servers under the conformance client: what they do differently is known exactly."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.children import Children
from tests.conformance.cases import all_cases
from tests.conformance.expected import read_expected
from tests.peers.readme import KNOWN
from tests.peers.running import explain, outcomes
from tests.readiness import ServerFailed

SIZE = 64 << 20
START_TIMEOUT_S = 20.0

Arguments = Callable[[Path, Path], list[str]]

PEERS: dict[str, tuple[str, Arguments]] = {
    "nbdkit-1.32-memory": (
        "nbdkit",
        lambda path, _: ["-f", "-t", "1", "-U", str(path), "memory", str(SIZE)],
    ),
    "nbdkit-1.32-file": (
        "nbdkit",
        lambda path, image: ["-f", "-t", "1", "-U", str(path), "file", str(image)],
    ),
    "qemu-nbd-7.2": (
        "qemu-nbd",
        lambda path, image: [
            *("--persistent", "--shared=0", "--format=raw", "--export-name=disk"),
            *("--socket", str(path), str(image)),
        ],
    ),
}
"""Program and arguments, by the name of the file in known/."""

LEFT_OUT = {
    "nbdkit-1.32-file": {"zero-no-hole"},  # depends on the filesystem that the test runs on
    "qemu-nbd-7.2": {"half-closed"},  # depends on whether it sees the end before it has answered
}
"""What is not the same each time."""


class Peer:
    """One server, started again whenever it is gone."""

    def __init__(self, children: Children, directory: Path, program: str, make: Arguments) -> None:
        self.socket = directory / "peer.sock"
        self.uri = f"nbd+unix:///disk?socket={self.socket}"
        self._children = children
        self._argv = [program, *make(self.socket, directory / "disk.raw")]
        with (directory / "disk.raw").open("wb") as image:
            image.truncate(SIZE)
        self.start()

    def start(self) -> None:
        """Start the server, and wait until it accepts."""
        self.socket.unlink(missing_ok=True)
        self.process = self._children.start(*self._argv, log="peer.log")
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._accepts():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise ServerFailed(f"{self._argv[0]} did not start")
            time.sleep(0.01)

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0


@pytest.mark.requires("nbdkit", "qemu-nbd")
@pytest.mark.parametrize("name", PEERS)
def test_what_peers_do_differently_is_known(children: Children, tmp_path: Path, name: str) -> None:
    peer = Peer(children, tmp_path, *PEERS[name])
    left_out = LEFT_OUT.get(name, set())
    cases = [case for case in all_cases() if not case.slow and case.id not in left_out]
    results = outcomes(peer.uri, cases, restart=peer.start)
    assert explain(results, read_expected(KNOWN / f"{name}.txt")) == ""


@pytest.mark.requires("nbdkit")
def test_nbdkit_with_threads_dies_of_clients_that_leave(children: Children, tmp_path: Path) -> None:
    """So the table is about one thread."""
    peer = Peer(
        children, tmp_path, "nbdkit", lambda path, _: ["-f", "-U", str(path), "memory", "64M"]
    )
    leaving = [case for case in all_cases() if case.id in ("leave-with-requests", "never-reads")]
    deaths = 0

    def count() -> None:
        nonlocal deaths
        deaths += 1
        peer.start()

    for _ in range(20):
        outcomes(peer.uri, leaving, restart=count)
        if deaths:
            break
    assert deaths
    assert "raw_send_socket: Assertion" in (tmp_path / "peer.log").read_text()


@pytest.mark.parametrize("path", sorted(KNOWN.iterdir()), ids=lambda path: path.stem)
def test_every_file_of_known_differences_belongs_to_a_peer(path: Path) -> None:
    assert path.stem in PEERS
    assert read_expected(path)
