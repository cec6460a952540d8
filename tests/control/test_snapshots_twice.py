"""Creating snapshots and clones again, and deleting again, as who has not heard the answer does."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdstore import unix_socket
from nbdstore.control.client import ControlClient
from nbdstore.errors import AlreadyExists, Busy, ControlError, InvalidArgument, NotFound
from tests.control.real_pool import TIMEOUT_S, Served

MIB = 1 << 20
A, B, C = (str(uuid.UUID(int=number)) for number in (0xA, 0xB, 0xC))


@pytest.fixture
def volumes(served: Served) -> Served:
    for name in ("db", "logs"):
        served.client.create_volume(name, MIB)
    return served


def names(served: Served) -> list[str]:
    return [info.snapshot for info in served.client.snapshots()]


def test_the_same_call_is_answered_with_the_same_snapshots(volumes: Served) -> None:
    body: dict[str, object] = {"snapshots": ["db@a", "logs@a"], "uuids": [A, B]}
    first = volumes.call("POST", "/v1/snapshots", body)
    again = volumes.call("POST", "/v1/snapshots", body | {"uuids": [A.upper(), B]})
    assert (first.status, again.status) == (201, 200)
    assert first.value == again.value
    assert [made["uuid"] for made in first.value["snapshots"]] == [A, B]
    assert names(volumes) == ["db@a", "logs@a"]


def test_of_many_calls_at_once_one_makes_it(volumes: Served) -> None:
    def create(_: int) -> list[str]:
        return [info.uuid for info in volumes.client.create_snapshots(["db@a"], uuids=[A])]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(create, range(16))) == [[A]] * 16
    assert names(volumes) == ["db@a"]


@pytest.mark.parametrize(
    ("wanted", "uuids"),
    [
        (["db@b"], [A]),
        (["logs@a"], [A]),
        (["db@a"], [B]),
        (["db@a"], None),
        (["db@a", "logs@a"], [A, B]),
    ],
    ids=["another name", "another volume", "another uuid", "no uuid", "more than was made"],
)
def test_snapshots_that_differ_are_refused(
    volumes: Served, wanted: list[str], uuids: list[str] | None
) -> None:
    volumes.client.create_snapshots(["db@a"], uuids=[A])
    with pytest.raises(AlreadyExists):
        volumes.client.create_snapshots(wanted, uuids=uuids)
    assert names(volumes) == ["db@a"]


def test_a_snapshot_in_the_trash_keeps_its_uuid(volumes: Served) -> None:
    volumes.client.create_snapshots(["db@a"], uuids=[A])
    volumes.client.delete_volume("db", snapshots=True)
    with pytest.raises(AlreadyExists, match="take a new one"):
        volumes.client.create_snapshots(["logs@a"], uuids=[A])


@pytest.mark.parametrize("text", ["", "x"])
def test_a_snapshot_whose_uuid_is_none_keeps_nobody_from_making_others(
    volumes: Served, text: str
) -> None:
    """Such as development versions made, or a received stream brought."""
    made = volumes.pool.create_snapshots([(volumes.pool.volumes["db"], "odd")], uuids=[text])
    volumes.run(made)
    for _ in range(2):
        volumes.client.create_snapshots(["db@a", "logs@a"], uuids=[A, B])
    with pytest.raises(AlreadyExists, match="exists already"):
        volumes.client.create_snapshots(["db@odd"], uuids=[C])
    volumes.client.delete_snapshot("db@odd", uuid=C)
    assert names(volumes) == ["db@odd", "db@a", "logs@a"]
    volumes.client.delete_snapshot("db@odd")
    assert names(volumes) == ["db@a", "logs@a"]


@pytest.mark.parametrize("uuids", [[], [A], [A, A], [A, B, C], [A, "b"]])
def test_each_snapshot_needs_a_uuid_of_its_own(volumes: Served, uuids: list[str]) -> None:
    with pytest.raises(InvalidArgument, match="uuid"):
        volumes.client.create_snapshots(["db@a", "logs@a"], uuids=uuids)
    assert names(volumes) == []


def test_the_same_call_is_answered_with_the_same_clone(volumes: Served) -> None:
    volumes.client.create_snapshots(["db@a"])
    body: dict[str, object] = {"name": "copy", "uuid": A}
    first = volumes.call("POST", "/v1/snapshots/db@a/clone", body)
    again = volumes.call("POST", "/v1/snapshots/db@a/clone", body)
    assert (first.status, again.status) == (201, 200)
    assert first.value == again.value
    assert (first.value["uuid"], first.value["origin"]) == (A, "db@a")


@pytest.mark.parametrize(
    ("snapshot", "name", "number"),
    [("db@b", "copy", A), ("db@a", "other", A), ("db@a", "copy", B), ("db@a", "copy", None)],
    ids=["another snapshot", "another name", "another uuid", "no uuid"],
)
def test_a_clone_that_differs_is_refused(
    volumes: Served, snapshot: str, name: str, number: str | None
) -> None:
    volumes.client.create_snapshots(["db@a"])
    volumes.client.create_snapshots(["db@b"])
    volumes.client.clone("db@a", "copy", uuid=A)
    with pytest.raises(AlreadyExists):
        volumes.client.clone(snapshot, name, uuid=number)
    assert [info.name for info in volumes.client.volumes()] == ["copy", "db", "logs"]


def test_an_empty_volume_is_not_taken_for_a_clone(volumes: Served) -> None:
    volumes.client.create_snapshots(["db@a"])
    volumes.client.create_volume("copy", MIB, uuid=A)
    with pytest.raises(AlreadyExists, match="no clone of db@a"):
        volumes.client.clone("db@a", "copy", uuid=A)


@pytest.mark.parametrize("now", [False, True])
def test_what_is_deleted_by_uuid_may_be_deleted_again(volumes: Served, now: bool) -> None:
    client = volumes.client
    client.create_volume("web", MIB, uuid=A)
    client.delete_volume("web", now=now, uuid=A)
    client.delete_volume("web", now=now, uuid=A)
    client.create_volume("web", MIB, uuid=B)
    client.delete_volume("web", now=now, uuid=A)
    assert client.volume("web").uuid == B
    with pytest.raises(NotFound):
        client.delete_volume("absent")


def test_a_volume_that_is_elsewhere_is_not_told_to_be_gone(volumes: Served) -> None:
    client = volumes.client
    number = client.volume("db").uuid
    client.update_volume("db", new_name="base")
    with pytest.raises(NotFound, match="is called 'base' now"):
        client.delete_volume("db", uuid=number)
    client.delete_volume("base", uuid=number)
    with pytest.raises(NotFound, match="in the trash as 'base'"):
        client.delete_volume("db", uuid=number, now=True)


def test_a_deletion_for_good_by_uuid_goes_on_in_the_trash(volumes: Served) -> None:
    client = volumes.client
    number = client.volume("db").uuid
    client.create_snapshots(["db@a"])
    client.delete_volume("db", snapshots=True)
    client.create_volume("db", MIB)
    with pytest.raises(Busy, match="db@a"):
        client.delete_volume("db", uuid=number, now=True)
    client.delete_volume("db", uuid=number)
    assert [info.name for info in client.trash()] == ["db"]
    for _ in range(2):
        client.delete_volume("db", uuid=number, snapshots=True, now=True)
    assert client.trash() == []
    assert client.volume("db").uuid != number


def test_a_snapshot_deleted_by_uuid_may_be_deleted_again(volumes: Served) -> None:
    client = volumes.client
    client.create_snapshots(["db@a"], uuids=[A])
    client.delete_snapshot("db@a", uuid=A)
    client.delete_snapshot("db@a", uuid=A)
    client.create_snapshots(["db@a"], uuids=[B])
    client.delete_snapshot("db@a", uuid=A)
    assert names(volumes) == ["db@a"]
    with pytest.raises(NotFound):
        client.delete_snapshot("db@b")


class Forgetful:
    """Hands requests on to a control socket, and loses the answers to the first `n_lost`."""

    def __init__(self, path: Path, target: Path, n_lost: int) -> None:
        self.n_asked = 0
        self._target = target
        self._n_lost = n_lost
        self._socket = unix_socket.listen(path)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            caller, _ = self._socket.accept()
            with caller, unix_socket.connect(self._target, TIMEOUT_S) as server:
                request = caller.recv(1 << 16)
                if not request:
                    return
                while not _is_whole(request):
                    request += caller.recv(1 << 16)
                server.sendall(request)
                answer = server.recv(1 << 16)  # it was done
                self.n_asked += 1
                if self.n_asked > self._n_lost:
                    caller.sendall(answer)

    def close(self, path: Path) -> None:
        with unix_socket.connect(path, TIMEOUT_S) as last:
            last.shutdown(socket.SHUT_WR)
            self._thread.join()
        self._socket.close()


def _is_whole(request: bytes) -> bool:
    head, _, body = request.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.partition(b":")[2])
    return b"\r\n\r\n" in request


@pytest.fixture
def forgetful(volumes: Served, tmp_path: Path) -> Iterator[Forgetful]:
    path = tmp_path / "forgetful.sock"
    between = Forgetful(path, volumes.directory / "control.sock", n_lost=1)
    yield between
    between.close(path)


def test_the_client_calls_again_when_an_answer_was_lost(
    volumes: Served, forgetful: Forgetful, tmp_path: Path
) -> None:
    client = ControlClient(f"unix:{tmp_path / 'forgetful.sock'}")
    made = client.create_snapshots(["db@a", "logs@a"])
    assert forgetful.n_asked == 2
    assert [info.uuid for info in made] == [info.uuid for info in volumes.client.snapshots()]


def test_the_client_does_not_repeat_what_might_be_done_twice(
    volumes: Served, forgetful: Forgetful, tmp_path: Path
) -> None:
    client = ControlClient(f"unix:{tmp_path / 'forgetful.sock'}")
    with pytest.raises(ControlError, match="see whether the change was made"):
        client.delete_volume("db", now=True)
    assert forgetful.n_asked == 1
    assert [info.name for info in volumes.client.volumes()] == ["logs"]
