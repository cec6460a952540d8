"""How a promise to Docker is kept: kills in the middle, users, and what stands in the status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from nbdstore.control.service import VolumeService
from nbdstore.docker_plugin import records as records_module
from nbdstore.docker_plugin.driver import VolumeDriver
from nbdstore.docker_plugin.records import Records
from nbdstore.docker_plugin.server import Protocol
from nbdstore.errors import AlreadyExists, Busy, ControlError, DeviceError, NotFound
from tests.docker_plugin.memory_store import Killed, MemoryAgent, MemoryStore


class Machine:
    """A machine with the plugin, which can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = MemoryStore()
        self.agent = MemoryAgent()
        self.start()

    def start(self) -> None:
        self.records = Records(self.directory)
        service = cast("VolumeService", self.store)
        self.driver = VolumeDriver(self.records, service, self.agent)

    def restart(self) -> None:
        self.records.close()
        self.start()

    @property
    def path(self) -> str:
        return str(self.directory / "mounts" / "db")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.records.close()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_create_that_was_killed_is_no_volume_and_can_be_done_again(
    machine: Machine, moment: str
) -> None:
    machine.store.dies = ("create", moment)
    with pytest.raises(Killed):
        machine.driver.create("db", {"size": "1G"})
    machine.restart()
    # Docker asks before it creates: were there a volume, it would not create it.
    with pytest.raises(NotFound):
        machine.driver.describe("db")
    assert machine.driver.list() == []
    machine.driver.create("db", {"size": "2G"})
    assert machine.store.volumes["db"].size == 2 << 30
    machine.driver.remove("db")
    assert machine.store.volumes == {}


def test_a_volume_that_somebody_wrote_to_meanwhile_is_not_made_anew(machine: Machine) -> None:
    machine.store.dies = ("create", "before")
    with pytest.raises(Killed):
        machine.driver.create("db", {"size": "1G"})
    machine.store.create_volume("db", 1 << 30)
    machine.store.update_volume("db", written=True)
    machine.driver.create("db", {"size": "1G"})
    machine.driver.remove("db")
    assert list(machine.store.volumes) == ["db"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_remove_that_was_killed_can_be_done_again(machine: Machine, moment: str) -> None:
    machine.driver.create("db", {"size": "1G"})
    machine.store.dies = ("delete", moment)
    with pytest.raises(Killed):
        machine.driver.remove("db")
    machine.restart()
    assert [item["Name"] for item in machine.driver.list()] == ["db"]
    machine.driver.remove("db")
    assert (machine.driver.list(), machine.store.volumes) == ([], {})


def test_the_last_user_unmounts_and_none_is_counted_twice(machine: Machine) -> None:
    machine.driver.create("db", {"size": "1G"})
    assert machine.driver.path("db") == ""
    for user in ("a", "b", "a"):
        assert machine.driver.mount("db", user) == machine.path
    machine.restart()
    machine.driver.unmount("db", "a")
    machine.driver.unmount("db", "a")
    machine.driver.unmount("db", "unknown")
    assert machine.agent.mounted == {("db", machine.path)}
    assert machine.driver.path("db") == machine.path
    machine.driver.unmount("db", "b")
    assert machine.agent.mounted == set()


def test_what_could_not_be_unmounted_is_unmounted_later(machine: Machine) -> None:
    machine.driver.create("db", {"size": "1G"})
    machine.driver.create("used", {"size": "1G"})
    machine.driver.mount("db", "a")
    machine.driver.mount("used", "a")
    machine.agent.failure = ControlError("no agent answers")
    with pytest.raises(ControlError):
        machine.driver.unmount("db", "a")
    machine.driver.sweep()
    machine.agent.failure = None
    machine.driver.sweep()
    assert [volume for volume, _ in machine.agent.mounted] == ["used"]


def test_a_mount_that_fails_has_no_user(machine: Machine) -> None:
    machine.driver.create("db", {"size": "1G"})
    machine.agent.failure = Busy("leased to another")
    with pytest.raises(Busy):
        machine.driver.mount("db", "a")
    assert machine.records.all()[0].users == ()


def test_users_of_an_earlier_boot_are_gone(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.driver.create("db", {"size": "1G"})
    machine.driver.mount("db", "a")
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another\n")
    monkeypatch.setattr(records_module, "BOOT_ID", boot_id)
    machine.restart()
    assert machine.records.all()[0].users == ()


def test_looking_never_fails_and_tells_what_is_wrong(machine: Machine) -> None:
    machine.driver.create("db", {"size": "1G"})
    machine.store.failure = machine.agent.failure = ControlError("nobody answers")
    (found,) = machine.driver.list()
    assert found["Name"] == "db"
    assert found["Status"]["trouble"] == "nobody answers"
    assert machine.driver.describe("db") == found


def test_a_second_create_must_ask_for_the_same(machine: Machine) -> None:
    machine.driver.create("db", {"size": "1G"})
    machine.driver.create("db", {"size": "1G"})
    machine.driver.create("db", {})
    with pytest.raises(AlreadyExists, match=f"with size={1 << 30}, not {2 << 30}"):
        machine.driver.create("db", {"size": "2G"})


def test_a_directory_has_one_plugin_and_records_that_it_understands(tmp_path: Path) -> None:
    first = Records(tmp_path)
    with pytest.raises(Busy, match="another plugin uses"):
        Records(tmp_path)
    first.close()
    (tmp_path / "volumes" / "db.json").write_text('{"version": 2}')
    with pytest.raises(DeviceError, match=r"db\.json cannot be read \(another version\)"):
        Records(tmp_path)


@pytest.mark.parametrize(
    ("path", "body", "complaint"),
    [
        ("/VolumeDriver.Dance", {}, "volume plugins have no call"),
        ("/VolumeDriver.Get", {}, "'None' is no name for a volume"),
        ("/VolumeDriver.Get", {"Name": "../etc"}, "'../etc' is no name"),
        ("/VolumeDriver.Get", {"Name": "a" * 201}, "is no name"),
        ("/VolumeDriver.Get", [], "a JSON object"),
        ("/VolumeDriver.Create", {"Name": "db", "Opts": {}}, "say with '-o size=10G'"),
        ("/VolumeDriver.Create", {"Name": "db", "Opts": ["size"]}, "Opts are ['size']"),
        ("/VolumeDriver.Mount", {"Name": "db", "ID": "a"}, "there is no volume db"),
    ],
)
def test_a_call_that_fails_is_told_in_its_answer(
    machine: Machine, path: str, body: Any, complaint: str
) -> None:
    answer = Protocol(machine.driver).answer(path, json.dumps(body).encode())
    assert complaint in answer["Err"]


def test_what_docker_asks_first(machine: Machine) -> None:
    protocol = Protocol(machine.driver)
    assert protocol.answer("/Plugin.Activate", b"")["Implements"] == ["VolumeDriver"]
    scope = protocol.answer("/VolumeDriver.Capabilities", b"{}")["Capabilities"]["Scope"]
    assert scope == "global"
    for body in (b"[", b"[" * 100_000, b"[]", b"\xff"):
        assert "JSON object" in protocol.answer("/VolumeDriver.List", body)["Err"]
