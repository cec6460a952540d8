"""The fuse driver at moments that a running relay does not wait in."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdstore.agent import relay
from nbdstore.agent.fuse_driver import FuseDriver
from nbdstore.agent.relay import RelayState, StateFile
from tests.agent.unserved import RECORD
from tests.children import Children

SIZE = 64 << 20
ROOM = 1 << 30


@pytest.mark.requires("root", "/dev/loop-control", "losetup", "mount")
def test_a_device_is_limited_to_its_volume_though_the_server_leaves_meanwhile(
    tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a limit it would have all the room of the file, for a filesystem to grow into."""
    mountpoint = tmp_path / "fuse" / RECORD.id
    mountpoint.mkdir(parents=True)
    children.run("mount", "--bind", mountpoint, mountpoint)
    with (mountpoint / "nbd").open("wb") as file:
        file.truncate(ROOM)
    state = StateFile(mountpoint.with_suffix(".relay"))
    state.report(SIZE)
    read_state = relay.read_state

    def read_then_leave(path: Path) -> RelayState | None:
        found = read_state(path)
        if found is not None:
            state.report(None)
        return found

    monkeypatch.setattr(relay, "read_state", read_then_leave)
    driver = FuseDriver(tmp_path, (), lambda *_: None)
    device, record = driver.attach(RECORD)
    found = (device.size, record.size)
    state.close()
    children.run("losetup", "--detach", device.path)
    (mountpoint / "nbd").unlink()
    driver.remove_remains(record)
    assert found == (SIZE, SIZE)
