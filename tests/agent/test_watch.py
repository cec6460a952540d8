"""What the watch does again and again, and what it says of it."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from nbdstore.agent import watch
from nbdstore.agent.devices import BlockDevice
from nbdstore.agent.local import Setting, open_agent
from nbdstore.agent.watch import Watch
from nbdstore.control.model import VolumeInfo
from nbdstore.errors import DeviceError
from tests.agent.unserved import RECORD

TIMEOUT_S = 60.0


def test_a_device_that_cannot_grow_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that is mounted where Linux does not let it, for as long as it is mounted."""
    (tmp_path / "sys" / "loop7").mkdir(parents=True)
    (tmp_path / "sys" / "loop7" / "size").write_text("8\n")
    values = dict.fromkeys((field.name for field in dataclasses.fields(VolumeInfo)), 0)
    info = VolumeInfo(**{**values, "name": "db", "uuid": "u", "size": 8192})  # type: ignore[arg-type]
    tried = threading.Semaphore(0)

    def grow(volume: str, size: int) -> None:
        assert (volume, size) == ("db", 8192)
        tried.release()
        raise DeviceError("it cannot while it is in use")

    setting = Setting(state=tmp_path / "state", control_url=f"unix:{tmp_path}/none", driver="fuse")
    with open_agent(setting) as agent:
        agent.attachments.save(RECORD).device = BlockDevice("loop7", tmp_path / "sys")
        monkeypatch.setattr(agent.server, "volumes", lambda: [info])
        monkeypatch.setattr(agent, "needs_care", lambda _: False)
        monkeypatch.setattr(agent, "grow", grow)
        monkeypatch.setattr(watch, "POLL_S", 0.0)
        monkeypatch.setattr(watch, "TICK_S", 0.01)
        watching = Watch(agent)
        watching.start()
        assert all(tried.acquire(timeout=TIMEOUT_S) for _ in range(3))
        watching.stop()
    assert [item.getMessage() for item in caplog.records if "in use" in item.getMessage()] == [
        "volume db's device: it cannot while it is in use"
    ]
